"""A guest of 284 bytes: it fills memory, dirties memory and powers off as told, and needs a tenth of a second to boot.

A Linux guest takes 5 s to boot and shows whether migration keeps it healthy; that is the lab's business. Here a
migration has only to last as long as a test wants, on two cores. QEMU boots this "kernel" by the Multiboot protocol; it
sleeps between the ticks of its timer, so it costs next to nothing.

Its source is `tiny_guest.S`. It prepares flat segments and a timer of 100 Hz, writes to each page that is to be filled
its own address, and then sleeps. At each tick it adds 1 to a word of the next pages of the filled ones, round and
round, and at the given tick it powers off by ACPI (S5 on port 0x604).
"""

import struct
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

PAGES_PER_MIB: Final = 256
TICKS_PER_S: Final = 100

_PARAMETERS_AT: Final = 0x20
_PROGRAM: Final = bytes.fromhex(
    "02b0ad1b03000100fb4f51e400001000000010001c0110001c0110003000100000000000000000000100000000000000"
    "fabc000009000f011510011000ea44001000080066b810008ed88ec08ed0b8ee00100066a30001080066c70502010800"
    "080066c70504010800008ec1e81066a3060108000f011d16011000b011e620b020e621b004e621b001e621b0fee621b0"
    "34e643b09ce640b02ee640bf000020008b0d20001000e30a893f81c700100000e2f631db31f6fbf4433b1d2c00100075"
    "0a66ba040666b8002066ef8b0d24001000e3e389f7c1e70c83870800200001463b3528001000720231f6e2e7ebc850b0"
    "20e62058cf8d76000000000000000000ffff0000009acf00ffff00000092cf001700f8001000070100000800"
)


@dataclass(frozen=True)
class Behaviour:
    """What the guest does.

    Attributes:
        fill_mib: Memory that is not zero, so that a migration has to send it; the guest needs 4 MiB more than that.
        dirty_mib_s: Memory it rewrites per second, out of what it filled.
        poweroff_after_s: When it powers off; 0 for never.
    """

    fill_mib: int = 0
    dirty_mib_s: int = 0
    poweroff_after_s: int = 0


def write_kernel(behaviour: Behaviour, directory: Path) -> Path:
    """Write the guest's kernel for `behaviour` into `directory` and return its path."""
    path = directory / ("tiny-guest-" + "-".join(str(part) for part in astuple(behaviour)))
    program = bytearray(_PROGRAM)
    struct.pack_into(
        "<4I",
        program,
        _PARAMETERS_AT,
        behaviour.fill_mib * PAGES_PER_MIB,
        behaviour.dirty_mib_s * PAGES_PER_MIB // TICKS_PER_S,
        max(1, behaviour.fill_mib * PAGES_PER_MIB),
        behaviour.poweroff_after_s * TICKS_PER_S,
    )
    path.write_bytes(program)
    return path
