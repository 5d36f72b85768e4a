"""What a command says: whether a person looks at it, lines that leave at once, and errors of one line."""

import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import typer


def is_watched() -> bool:
    """Whether standard output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def has_colour() -> bool:
    """Whether phases are printed in colour (https://no-color.org)."""
    return is_watched() and not os.environ.get("NO_COLOR")


@contextmanager
def without_caret_c() -> Iterator[None]:
    """Keep the terminal from writing `^C` into what is drawn there, which would move it by a line."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    local_modes = 3
    during = [*before]
    during[local_modes] &= ~termios.ECHOCTL
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, during)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def write(text: str) -> None:
    """Print a text; it leaves at once, into a pipe too. Nothing is printed for an empty one."""
    if text:
        typer.echo(text)


def tell(message: str) -> None:
    """Say something on standard error, in one line."""
    typer.echo("vmherd: " + " ".join(message.split()), err=True)


class Failures:
    """Counts what went wrong with some of several things, so that the others are still done."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, message: str) -> None:
        """Tell one."""
        tell(message)
        self.count += 1

    def end(self) -> None:
        """End the command with code 1 when there was any."""
        if self.count:
            raise typer.Exit(1)
