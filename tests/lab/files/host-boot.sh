#!/bin/sh
# Turns a process in fresh network, mount and UTS namespaces into a lab host: host-boot.sh LAB_DIRECTORY HOST LIBVIRT_CACHE
# Says "ready" on standard output and then stays as the host's anchor: the namespaces live as long as it does.
set -eu
lab=$1
host=$2
cache=$3
own=$lab/$host

echo "$host" >/proc/sys/kernel/hostname

# The namespace files of every lab are mounted under /run/netns. A copy of those mounts in here would keep the
# namespaces of other labs alive after their teardown.
umount -R -l /run/netns 2>/dev/null || :

for folder in etc/libvirt var/lib/libvirt var/log/libvirt; do
    mount --bind "$own/$folder" "/$folder"
done
# Only what libvirt knows of QEMU binaries is in there, checked against the binary's and its own time stamps: shared.
mount --bind "$cache" /var/cache/libvirt
for file in etc/hosts etc/hostname etc/machine-id etc/resolv.conf proc/sys/kernel/random/boot_id; do
    [ -e "/$file" ] && mount --bind "$own/$file" "/$file"
done
# /run last, as it hides the lab's folder, which must stay visible at its own path: the same on each host, so that a
# path in a domain's XML means one file on all of them.
mount --bind "$lab" "$own$lab"  # $lab begins with /run
mount --rbind "$own/run" /run
echo "$lab" >/run/lab

echo ready
exec sleep infinity >/dev/null
