"""`vmherd doctor`: run on a node. It looks with the node's own code, which is not loaded here."""

from orchestrator.cli.output import AsDocument
from orchestrator.cli.run import check_node, execute

EXAMPLE = """Example, on a node, in its own environment:

$ set -a; . /etc/vmherd/node.env

$ vmherd doctor
"""


def doctor(output: AsDocument = None) -> None:
    """On a node: say whether it could be fenced, by what, and what is missing. It changes nothing.

    Exits with 1 if something is wrong, or only a BMC or a person could fence it.
    """
    check_node()
    execute("workers.doctor", *([output.value] if output is not None else []))
