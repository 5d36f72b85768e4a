"""Every error that vmherd raises, in one tree; each class says whether trying again helps.

A refusal (no node fits, a limit is reached) is a value with a reason and not an exception. `OutcomeUnknown` is
neither "failed" nor "done": it means that the world has to be asked. Only entry points catch broadly; they show
`str(error)`, which names the thing, the reason and what to do.
"""

from typing import ClassVar


class VmherdError(Exception):
    """Root of the tree.

    Attributes:
        retryable: Whether the same call may succeed later without anything being changed by a person.
        reason: The `reason` of the Kubernetes `Status` that this error becomes in the API.
    """

    retryable: ClassVar[bool] = False
    reason: ClassVar[str] = "InternalError"


class NotFound(VmherdError):
    """No resource of that kind and name."""

    reason = "NotFound"


class AlreadyExists(VmherdError):
    """A resource of that kind and name is there already."""

    reason = "AlreadyExists"


class Conflict(VmherdError):
    """The resource changed since it was read: load it again and decide again."""

    retryable = True
    reason = "Conflict"


class Invalid(VmherdError):
    """The input breaks the resource's schema or rules; nothing was stored.

    Args:
        message: One line for a person.
        causes: Pairs of field path (`spec.cpu.cores`) and what is wrong with it.
    """

    reason = "Invalid"

    def __init__(self, message: str, causes: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.causes = causes


class Refused(VmherdError):
    """Admission said no: the request is well-formed, but may not be done now."""

    reason = "Forbidden"


class Forbidden(Refused):
    """Whoever asks has not the right to that; another token may have."""


class Unauthorized(VmherdError):
    """Who asks is not known: no token, or one that is wrong, revoked or out of date."""

    reason = "Unauthorized"


class StoreUnavailable(VmherdError):
    """Redis does not answer, or refuses us."""

    retryable = True
    reason = "ServiceUnavailable"


class VersionExpired(VmherdError):
    """A watch asked for changes since a version that is too old, or that this Redis never had: list again."""

    reason = "Expired"


class RecoveryMode(VmherdError):
    """Redis restarted or failed over: no grant until each live node's domains have been read anew."""

    retryable = True
    reason = "ServiceUnavailable"


class OutcomeUnknown(VmherdError):
    """Whether the call took effect is not known. Ask the world; never read this as failed, nor as done."""

    retryable = False
    reason = "OutcomeUnknown"


class WaitTimeout(VmherdError):
    """What was waited for did not happen in time. It may still happen."""

    reason = "Timeout"


class HypervisorError(VmherdError):
    """The hypervisor refused, or failed at, a call; it took no effect."""

    reason = "HypervisorError"


class HypervisorUnavailable(HypervisorError):
    """The hypervisor's management daemon does not answer. Says nothing about its guests: they may well run."""

    retryable = True


class DomainNotFound(HypervisorError):
    """No such domain on that host."""

    reason = "NotFound"


class InvariantBroken(VmherdError):
    """A promise of the design does not hold. Stop, and tell a person."""


class BadRequest(VmherdError):
    """What was sent can't be read, or a parameter is wrong."""

    reason = "BadRequest"


class MethodNotAllowed(VmherdError):
    """The resource has no such verb."""

    reason = "MethodNotAllowed"


class NotAcceptable(VmherdError):
    """None of the forms that the client takes is ours."""

    reason = "NotAcceptable"


class UnsupportedMediaType(VmherdError):
    """The body is in a form that is not taken."""

    reason = "UnsupportedMediaType"


class TooLarge(VmherdError):
    """The body is larger than what is taken."""

    reason = "RequestEntityTooLarge"


class TooManyRequests(VmherdError):
    """Not now. No Retry-After goes with it: kubectl would wait silently in place of telling the message."""

    retryable = True
    reason = "TooManyRequests"


class RequestTimeout(VmherdError):
    """It was not done in time; what it changes may still come."""

    reason = "Timeout"
