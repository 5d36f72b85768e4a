"""Files that a command writes."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.errors import Invalid

ToFile = Annotated[
    Path | None,
    typer.Option("--to-file", metavar="FILE", help="Write it there, readable by its owner alone.", show_default=False),
]


@contextmanager
def private_file(path: Path | None) -> Iterator[Path | None]:
    """Give a file beside `path`, readable by its owner alone, that takes its place when all went well.

    What can't be shown again is made inside: a file that can't be written is told before. Without a path there is none.

    Raises:
        Invalid: It can't be made there.
    """
    if path is None:
        yield None
        return
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}") from error
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
