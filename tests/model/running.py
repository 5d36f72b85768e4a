"""Compiles the model, and runs it for one choice of sizes and switches."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("takeover.cpp")


@dataclass(frozen=True, slots=True)
class Result:
    """What a search came to.

    Attributes:
        safe: Whether no state is bad.
        states: Reached in all, or until the first bad one.
        way: To the bad state, one step a line.
    """

    safe: bool
    states: int
    way: str


def compile_model(compiler: Path, into: Path) -> Path:
    """Compile the model; the path of its program is given."""
    program = into / "takeover"
    subprocess.run([compiler, "-O2", "-std=c++17", "-Wall", "-Wextra", "-o", program, SOURCE], check=True, timeout=100)
    return program


def search(program: Path, words: str) -> Result:
    """Search all states; more than 110 s is an error.

    Raises:
        CalledProcessError: It says neither safe nor violated: a word that it does not know, sizes out of range.
    """
    done = subprocess.run([program, *words.split()], capture_output=True, text=True, timeout=110, check=False)
    verdict, _, rest = done.stdout.partition(" ")
    if (done.returncode, verdict) not in {(0, "safe"), (1, "violated")}:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    states, _, way = rest.partition("\n")
    return Result(verdict == "safe", int(states), way)
