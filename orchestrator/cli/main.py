"""The `vmherd` command: entry point, and what all commands share.

Whatever goes wrong is one line on standard error and exit code 1; wrong usage is exit code 2. A traceback is for us:
`VMHERD_DEBUG=1` shows it.

A command's module is imported when that command is wanted, so `get` does not wait for what `create` needs.
"""

import os
import signal
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from orchestrator.cli.output import AsDocument, Results
from orchestrator.cli.terminal import tell
from orchestrator.errors import VmherdError

EPILOG = """Examples:

$ vmherd get vm -w

$ vmherd evict linux-vm

Redis is where VMHERD_REDIS_URL says; by default redis://127.0.0.1:6379/0.
"""
VERSION_EXAMPLE = """Example:

$ vmherd version -o json
"""
_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command is.

    Attributes:
        module: In `orchestrator.cli`.
        function: Its function, or a `typer.Typer` with commands of its own.
        examples: The module's constant that ends its help; commands of a `typer.Typer` have their own.
    """

    module: str
    function: str
    examples: str = "EXAMPLES"


COMMANDS = {
    "get": Place("get", "get"),
    "top": Place("top", "top"),
    "describe": Place("describe", "describe"),
    "create": Place("create", "create"),
    "apply": Place("apply", "apply"),
    "delete": Place("delete", "delete"),
    "start": Place("moves", "start", "START_EXAMPLE"),
    "stop": Place("moves", "stop", "STOP_EXAMPLES"),
    "restart": Place("moves", "restart", "RESTART_EXAMPLES"),
    "evict": Place("moves", "evict", "EVICT_EXAMPLES"),
    "migrate": Place("moves", "migrate", "MIGRATE_EXAMPLES"),
    "drain": Place("drain", "drain"),
    "cordon": Place("nodes", "cordon", "CORDON_EXAMPLE"),
    "uncordon": Place("nodes", "uncordon", "UNCORDON_EXAMPLES"),
    "maintain": Place("maintain", "maintain"),
    "maintenance": Place("maintain", "maintenance"),
    "node": Place("nodes", "node"),
    "fence": Place("fence", "fence"),
    "failover": Place("fence", "failover"),
    "rebalance": Place("rebalance", "rebalance", "REBALANCE_EXAMPLES"),
    "explain": Place("rebalance", "explain", "EXPLAIN_EXAMPLE"),
    "plan": Place("rebalance", "plan"),
    "token": Place("tokens", "token"),
    "kubeconfig": Place("kubeconfig", "kubeconfig"),
    "adopt": Place("adopt", "adopt", "ADOPT_EXAMPLES"),
    "release": Place("adopt", "release", "RELEASE_EXAMPLES"),
    "doctor": Place("doctor", "doctor", "EXAMPLE"),
    "api": Place("api", "api"),
    "run": Place("run", "run"),
    "up": Place("up", "up", "UP_EXAMPLES"),
    "down": Place("up", "down", "DOWN_EXAMPLE"),
    "sim": Place("sim", "sim"),
    "version": Place("main", "version", "VERSION_EXAMPLE"),
}


class Commands(TyperGroup):
    """Finds commands in `COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Name them all, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """Load one; None where there is none of that name."""
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        module = import_module(f"orchestrator.cli.{place.module}")
        found = getattr(module, place.function)
        if isinstance(found, typer.Typer):
            return get_group(found)
        alone = typer.Typer(add_completion=False)
        alone.command(cmd_name, epilog=getattr(module, place.examples))(found)
        return get_command(alone)


app = typer.Typer(
    cls=Commands,
    help="Keep virtual machines running on a herd of libvirt hosts.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _all() -> None:
    """Makes it a group of commands."""


def version(output: AsDocument = None) -> None:
    """Print the version."""
    from importlib import metadata  # noqa: PLC0415 - the other commands don't need it

    results = Results(output)
    found = metadata.version("vmherd")
    results.add(f"vmherd {found}", version=found)
    results.end()


def main() -> None:
    """Run the command."""
    sys.unraisablehook = _press_again
    try:
        app()
    except Exception as error:
        if os.environ.get("VMHERD_DEBUG"):
            raise
        tell(explain(error))
        raise SystemExit(1) from None


def _press_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Have Ctrl-C come once more where Python drops it: where it comes while a destructor runs."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(dropped)


def explain(error: Exception) -> str:
    """Say in one line what went wrong."""
    from redis import RedisError  # noqa: PLC0415 - nor does help need it

    match error:
        case VmherdError():
            return str(error)
        case RedisError():
            from orchestrator.settings import settings  # noqa: PLC0415
            from orchestrator.store.connection import without_password  # noqa: PLC0415

            return f"Redis at {without_password(settings().redis_url.get_secret_value())}: {error}"
        case OSError() if error.strerror:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        case _:
            return f"unexpected {type(error).__name__}: {error} (VMHERD_DEBUG=1 shows where)"
