import pytest

from tests.model.outage import PROFILES, first_reset, phases_of


@pytest.mark.parametrize("nodes", [3, 4])
@pytest.mark.parametrize("name", PROFILES)
def test_an_outage_of_redis_resets_nobody(name: str, nodes: int) -> None:
    profile = PROFILES[name]
    end = 3 * profile.heartbeat
    for phases in phases_of(profile, nodes):
        for share in (0.05, 0.5, 0.95):
            gone_at = end + share * profile.heartbeat
            reset = first_reset(profile, phases, [(0, gone_at)], until=gone_at + 2.5 * profile.lease_ttl)
            assert not reset, f"Redis away from {gone_at:.2f} s, heartbeats at {phases}: {reset}"


def _flaps(*, waits_for_majority: bool) -> list[str]:
    """Redis is away for long, is back for a moment, and is away again."""
    profile = PROFILES["critical"]
    return [
        reset
        for phases in phases_of(profile, 3)
        for back_for in (0.1, 0.2, 0.3, 0.4, 1.0, 2.0)
        if (
            reset := first_reset(
                profile,
                phases,
                [(0, 2), (20, 20 + back_for)],
                until=34,
                waits_for_majority=waits_for_majority,
                margin=3,
            )
        )
    ]


def test_redis_that_comes_back_for_a_moment_resets_nobody() -> None:
    assert not _flaps(waits_for_majority=True)


def test_suspecting_at_once_would_reset_healthy_nodes() -> None:
    """Violation 11: some hear that others are suspect, and refuse them when Redis is away again."""
    assert _flaps(waits_for_majority=False)
