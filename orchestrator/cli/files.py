"""Files that a command writes."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import Invalid


@contextmanager
def private_file(path: Path) -> Iterator[Path]:
    """Give a file beside `path`, readable by its owner alone, that takes its place when all went well.

    Raises:
        Invalid: It can't be made there.
    """
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
