#!/bin/bash
# libvirt's QEMU hook of a lab host: one JSON line per call, with nothing forked (3 ms). It prints nothing, which libvirt
# takes as "the XML as it is", and never fails, as a failing hook would forbid the operation.
# bash for $EPOCHREALTIME. "mono" is /proc/uptime: CLOCK_MONOTONIC (no suspend here) to 10 ms.
LC_ALL=C
read -r mono _ </proc/uptime
printf '{"at": %s, "mono": %s, "host": "%s", "domain": "%s", "operation": "%s", "sub": "%s", "extra": "%s"}\n' \
    "$EPOCHREALTIME" "$mono" "@HOST@" "$1" "$2" "$3" "$4" >>"@LOG@"
exit 0
