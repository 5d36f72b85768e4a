"""Fencing a node: what is tried for evidence, what a person says, and what is shown of it.

`run_fencing` is one attempt, in a worker of the fencing queue. BMC and watchdog's deadline (`services.liveness`) are
sought side by side; the first evidence that is committed ends the other. All of it may be run any number of times, by
several workers: one agent at a time works on a node, and evidence is committed against the fencing as it was read.
"""

from orchestrator.services.fencing.readings import read_power, read_powers
from orchestrator.services.fencing.seeking import power_on_again, run_fencing
from orchestrator.services.fencing.state import (
    BMC_CONTRADICTS,
    BMC_OF_ANOTHER,
    begin,
    end_renewed,
    say_deadline,
    say_suspect,
)
from orchestrator.services.fencing.tools import Tools, default_tools, is_listening
from orchestrator.services.fencing.words import arm, confirm, disarm, set_fencing, test_power

__all__ = [
    "BMC_CONTRADICTS",
    "BMC_OF_ANOTHER",
    "Tools",
    "arm",
    "begin",
    "confirm",
    "default_tools",
    "disarm",
    "end_renewed",
    "is_listening",
    "power_on_again",
    "read_power",
    "read_powers",
    "run_fencing",
    "say_deadline",
    "say_suspect",
    "set_fencing",
    "test_power",
]
