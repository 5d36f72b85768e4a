"""The question whether a silent host lives: another node's agent looks, by the libvirt daemon of that host."""

from typing import Literal

from pydantic import Field

from orchestrator.resources.meta import Model

LOOK_PREFIX = "look:"
"""How ids of these orders begin: `look:<node that is asked>/<random>`. No operation's key has a colon."""


LIBVIRT_PORTS = {"tls": 16_514, "tcp": 16_509}
"""Where a libvirt daemon listens, by the transport in its URI."""


class LookOrder(Model):
    """A numbered question to one node's agent.

    Attributes:
        uri: Of the suspect host's libvirt daemon, as other hosts reach it for migrations.
    """

    id: str
    kind: Literal["look"] = "look"
    uri: str


class SeenGuest(Model):
    """A domain of ours that runs there.

    Attributes:
        vm: `namespace/name`, as it is marked.
    """

    vm: str
    incarnation: int = 0


class Look(Model):
    """What an agent saw.

    Attributes:
        problem: Why it saw nothing; empty: the daemon answered.
        guests: That it showed.
    """

    problem: str = ""
    guests: tuple[SeenGuest, ...] = Field(default=(), max_length=10_000)
