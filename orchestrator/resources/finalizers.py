"""Finalizers: names that people's programs put on a resource, which then stays after its deletion until they are gone.

Ours (`vmop-cleanup`) is the server's to put on and to take off; what a client says of it counts for nothing.
"""

from orchestrator.errors import Invalid
from orchestrator.resources.meta import ObjectMeta
from orchestrator.resources.names import check_label_key
from orchestrator.resources.vmop import CLEANUP_FINALIZER

_OURS = frozenset({CLEANUP_FINALIZER})
_AT_MOST = 32
_PATH = "metadata.finalizers"


def at_creation(wanted: ObjectMeta, *ours: str) -> tuple[str, ...]:
    """Give what a new resource bears: ours, and those that its manifest names.

    Raises:
        Invalid: One can't be one.
    """
    return (*ours, *_checked(wanted))


def at_change(old: ObjectMeta, wanted: ObjectMeta) -> tuple[str, ...]:
    """Give what a changed resource bears: of ours what it had, of the others what is wanted.

    Raises:
        Invalid: One can't be one, or is new on what is being deleted.
    """
    others = _checked(wanted)
    new = [name for name in others if name not in old.finalizers]
    if new and old.deletion_timestamp is not None:
        raise _wrong(f"{new[0]} can't be added: it is being deleted")
    return (*(name for name in old.finalizers if name in _OURS), *others)


def others(meta: ObjectMeta) -> tuple[str, ...]:
    """Give those that are not ours: what a deletion waits for besides its own work."""
    return tuple(name for name in meta.finalizers if name not in _OURS)


def _checked(wanted: ObjectMeta) -> tuple[str, ...]:
    found = others(wanted)
    for name in found:
        try:
            check_label_key(name)
        except ValueError as error:
            raise _wrong(str(error)) from error
    if len(found) > _AT_MOST:
        raise _wrong(f"at most {_AT_MOST}")
    return tuple(dict.fromkeys(found))


def _wrong(why: str) -> Invalid:
    return Invalid(f"{_PATH}: {why}", ((_PATH, why),))
