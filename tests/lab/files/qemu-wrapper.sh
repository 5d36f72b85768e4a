#!/bin/sh
# The <emulator> of lab domains: QEMU with two changes to what libvirt asks for.
# 1. RAM is 8 KiB more, so that it is no multiple of 256 KiB. Otherwise QEMU 7.2's TCG loses writes during a long
#    pre-copy and the guest dies on the target, while the API reports success (reference/libvirt.md, section 0). It must
#    be the same on source and target, so it is here and not in a test.
# 2. A second QMP monitor for the lab's recorder, which so sees each stop, resume and migration even while libvirtd is dead.
# exec keeps the process id, which is part of the socket's name. Nothing in here names a lab: the file and its path are the
# same for all, so that what libvirt finds out about an emulator (in 4 s) can be kept.
uuid='' previous=''
count=$#
while [ "$count" -gt 0 ]; do
    count=$((count - 1))
    argument=$1
    shift
    case $previous in
        -m)
            case $argument in
                size=*k*) kib=${argument#size=} kib=${kib%%k*} argument="size=$((kib + 8))k" ;;
                *[!0-9]*) ;;
                *) argument="size=$((argument * 1024 + 8))k" ;;
            esac
            ;;
        -object)
            case $argument in
                *'"qom-type":"memory-backend-'*'"size":'*)
                    bytes=${argument##*\"size\":}
                    rest=${bytes#"${bytes%%[!0-9]*}"}
                    bytes=${bytes%%[!0-9]*}
                    argument="${argument%\"size\":*}\"size\":$((bytes + 8192))$rest"
                    ;;
            esac
            ;;
        -uuid) uuid=$argument ;;
    esac
    previous=$argument
    set -- "$@" "$argument"
done
# A host's /run/lab holds the lab's folder. (libvirt also probes this program, without a UUID.)
if [ -n "$uuid" ] && read -r lab </run/lab; then
    read -r host </proc/sys/kernel/hostname
    set -- "$@" -qmp "unix:$lab/qmp/$uuid.$host.$$,server=on,wait=off"
fi
exec @QEMU@ "$@"
