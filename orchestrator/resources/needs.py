"""What a running machine needs of a host that it is to reach by live migration, and what hosts answered about it.

The node on which a VM runs reads the needs from its hypervisor, since only there is the machine known as the guest
sees it. They hold no secrets. A host that is asked whether it has what they name answers with its problems; the answer
counts for these needs, from this run of its agent, and for some minutes.
"""

from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from orchestrator.resources.meta import Model, Timestamp

STORAGE_COPY_ANNOTATION = "vmherd.dev/allow-storage-copy"
"""Of a VM: `true` lets disks that only its host has be copied with it when it migrates."""
DISK_PROBLEM = "disk "
"""How a problem begins that is about a disk (`workers.hypervisor.port`, `preflight`)."""

LONGEST_LINE = 300
MOST_LINES = 16


def _check_machine(value: str) -> str:
    # A node wrote it, and other nodes parse it.
    if "<!" in value:
        raise ValueError("must hold neither a document type nor entities")
    return value


Line = Annotated[str, StringConstraints(max_length=LONGEST_LINE)]
Lines = Annotated[tuple[Line, ...], Field(max_length=MOST_LINES)]


class LocalDisk(Model):
    """A writable disk whose image only its own host has.

    Attributes:
        target: What the guest's hypervisor calls it: `vda`.
        path: Of the image.
        size_mib: What its copy may have to carry; a migration is given time by it. 0 where it is not known.
    """

    target: Annotated[str, StringConstraints(max_length=32)]
    path: Annotated[str, StringConstraints(max_length=4096)]
    size_mib: Annotated[int, Field(ge=0, le=2**40)] = 0


class MachineNeeds(Model):
    """What a running machine needs of a host.

    Attributes:
        fingerprint: Of all the rest; equal ones ask for the same.
        incarnation: The VM's, of which this is told.
        machine: A libvirt domain XML with nothing but what a host may lack: CPU, disks, interfaces and the like.
        plain: It names nothing but a CPU: no disk, interface or file. Hosts that are alike are alike good for it.
        local_disks: Disks that would have to be copied.
        obstacles: What ties it to its host whatever the other one is like, for people.
        home: Where the newest state of its local disks is; empty where it has none. Kept by the control plane.
    """

    fingerprint: Annotated[str, StringConstraints(max_length=64)]
    incarnation: Annotated[int, Field(ge=0, le=2**40)] = 0
    machine: Annotated[str, StringConstraints(max_length=65_536), AfterValidator(_check_machine)] = ""
    plain: bool = False
    local_disks: Annotated[tuple[LocalDisk, ...], Field(max_length=256)] = ()
    obstacles: Lines = ()
    home: str = ""

    def at_home(self, node: str) -> "MachineNeeds":
        """Give them as they are where the machine runs, or ran, on that node."""
        return self.with_(home=node if self.local_disks else "")


class Arrival(Model):
    """What one node answered when it was asked whether a machine can arrive there.

    Attributes:
        about: What it was asked about (`Questions.about`).
        generation: Of the agent that answered: a new one may find another host.
        problems: For people, one an entry; empty: nothing is in the way.
    """

    about: str
    generation: str = ""
    answered_at: Timestamp
    problems: Lines = ()


class Question(Model):
    """One question to one node that it has not answered yet; `id` is answered once."""

    id: str
    asked_at: Timestamp


class Questions(Model):
    """What is asked on behalf of an operation before it is granted.

    Attributes:
        count: How many questions were asked for it; makes their ids new.
        about: The needs' fingerprint, and the disks that are to be copied. Empty: the node on which the VM runs is
            asked for the needs themselves.
        uuid: The domain.
        incarnation: The VM's.
        machine: See `MachineNeeds`.
        copied_disks: Target names of disks that are copied with it.
        open: By node.
    """

    count: int = 0
    about: str = ""
    uuid: str = ""
    incarnation: int = 0
    machine: str = ""
    copied_disks: tuple[str, ...] = ()
    open: dict[str, Question] = Field(default_factory=dict)
