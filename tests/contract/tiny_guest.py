"""A guest of 348 bytes: it fills and dirties memory, powers off and reboots as told, and boots in a tenth of a second.

A Linux guest takes 5 s to boot and shows whether migration keeps it healthy; that is the lab's business. Here a
migration has only to last as long as a test wants, on two cores. QEMU boots this "kernel" by the Multiboot protocol; it
sleeps between the ticks of its timer, so it costs next to nothing.

Its source is `tiny_guest.S`. It prepares flat segments and a timer of 100 Hz, writes to each page that is to be filled
its own address, and then sleeps. At each tick it adds 1 to a word of the next pages of the filled ones, round and
round, and at the given tick it powers off by ACPI (S5 on port 0x604) or resets itself. If it heeds the power button it
looks at each tick whether that was pressed.
"""

import struct
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

PAGES_PER_MIB: Final = 256
TICKS_PER_S: Final = 100

_PARAMETERS_AT: Final = 0x20
_POWEROFF: Final = bytes.fromhex("66ba0406 66b80020 66ef")  # mov dx, 0x604; mov ax, 0x2000; out dx, ax
_PANIC: Final = bytes.fromhex("66ba0505 66b80100 66ef")  # mov dx, 0x505; mov ax, 1; out dx, ax
_PROGRAM: Final = bytes.fromhex(
    "02b0ad1b03000100fb4f51e400001000000010005c0110005c0110003800100000000000000000000100000000000000"
    "0000000000000000fabc000009000f011550011000ea4c001000080066b810008ed88ec08ed0b82b01100066a3000108"
    "0066c70502010800080066c70504010800008ec1e81066a3060108000f011d56011000b011e620b020e621b004e621b0"
    "01e621b0fee621b034e643b09ce640b02ee640bf000020008b0d20001000e30a893f81c700100000e2f6833d30001000"
    "00740a66ba020666b8000166ef31db31f6fbf4433b1d2c001000741c3b1d340010007420833d3000100000741b66ba00"
    "0666edf6c401741066ba040666b8002066efeb04b0fee6648b0d24001000e3c189f7c1e70c83870800200001463b3528"
    "001000720231f6e2e7eba650b020e62058cf8db6000000000000000000000000ffff0000009acf00ffff00000092cf00"
    "170038011000070100000800"
)


@dataclass(frozen=True)
class Behaviour:
    """What the guest does.

    Attributes:
        fill_mib: Memory that is not zero, so that a migration has to send it; the guest needs 4 MiB more than that.
        dirty_mib_s: Memory it rewrites per second, out of what it filled.
        poweroff_after_s: When it powers off; 0 for never.
        heeds_button: Whether it powers off when ACPI's power button is pressed.
        reboot_after_s: When it resets itself, again after each boot; 0 for never.
        panics: Whether, where it would power off, it says to a panic device (port 0x505) that it panicked.
    """

    fill_mib: int = 0
    dirty_mib_s: int = 0
    poweroff_after_s: int = 0
    heeds_button: bool = False
    reboot_after_s: int = 0
    panics: bool = False


def write_kernel(behaviour: Behaviour, directory: Path) -> Path:
    """Write the guest's kernel for `behaviour` into `directory` and return its path."""
    path = directory / ("tiny-guest-" + "-".join(str(int(part)) for part in astuple(behaviour)))
    program = bytearray(_PROGRAM.replace(_POWEROFF, _PANIC) if behaviour.panics else _PROGRAM)
    struct.pack_into(
        "<6I",
        program,
        _PARAMETERS_AT,
        behaviour.fill_mib * PAGES_PER_MIB,
        behaviour.dirty_mib_s * PAGES_PER_MIB // TICKS_PER_S,
        max(1, behaviour.fill_mib * PAGES_PER_MIB),
        behaviour.poweroff_after_s * TICKS_PER_S,
        behaviour.heeds_button,
        behaviour.reboot_after_s * TICKS_PER_S,
    )
    path.write_bytes(program)
    return path
