"""What a hypervisor's words, and the evidence, make of a start that a lock refuses."""

import pytest

from workers.hypervisor.port import is_lock_refusal


@pytest.mark.parametrize(
    "words",
    [
        'qemu-system-x86_64: -blockdev {...}: Failed to get "write" lock\nIs another process using the image [/a]?',
        'process exited while connecting to monitor: Failed to get shared "write" lock',
        "resource busy: Lockspace resource '/srv/vm/a.qcow2' is locked",
        "internal error: Failed to acquire lock: error -243",
    ],
)
def test_a_lock_is_recognised(words: str) -> None:
    assert is_lock_refusal(words)


@pytest.mark.parametrize(
    "words",
    [
        "Cannot allocate memory",
        "Timed out during operation: cannot acquire state change lock (held by monitor=remoteDispatchDomainCreate)",
        "Could not open '/srv/vm/a.qcow2': No such file or directory",
        "Failed to lock byte 100: No locks available",
        "cannot limit locked memory",
    ],
)
def test_nothing_else_is_taken_for_one(words: str) -> None:
    assert not is_lock_refusal(words)
