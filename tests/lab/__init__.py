"""The lab: several real libvirt hosts on this one machine, with real QEMU guests and real faults.

Start with `tests.lab.lab.Lab`. Everything is in network and mount namespaces of the lab's own and in one folder,
`/run/vmherd-lab/NAME`; nothing leaves them, and nothing stays behind, however the test process ends.

This module imports nothing: the watchdog and the cleanup import the package, and must start fast and always.
"""
