#!/bin/sh
# PID 1 of a lab guest. Everything it knows comes from the kernel command line:
#   lab.ip=ADDRESS/PREFIX  lab.dirty=MIB_PER_S  lab.ws=WORKING_SET_MIB  lab.acpi=0|1  lab.agent=works|hangs
# What it shows by HTTP (port 80): /status /ticks /uptime /boot_id /health, and the buttons /cgi-bin/*.
# Files are rewritten with `1<>` (no truncation), so that a reader never sees an empty one.
# Waiting is `read -t` on a pipe that nobody writes to: no fork, which emulation makes dear.
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o size=1m tmpfs /www
mkdir -p /www/cgi-bin
cp /cgi/* /www/cgi-bin/
while read -r module; do insmod "/modules/$module"; done </modules/order

ip='' dirty=0 ws=1 acpi=0 agent=''
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in
        lab.ip=*) ip=${word#*=} ;;
        lab.dirty=*) dirty=${word#*=} ;;
        lab.ws=*) ws=${word#*=} ;;
        lab.acpi=*) acpi=${word#*=} ;;
        lab.agent=*) agent=${word#*=} ;;
    esac
done

ifconfig lo 127.0.0.1 up
if [ -n "$ip" ]; then ifconfig eth0 up && ip address add "$ip" dev eth0; fi
mkfifo /never
read -r boot_id </proc/sys/kernel/random/boot_id
echo "$boot_id" >/www/boot_id
echo "$dirty" >/dirty_rate
echo "0 0" >/www/health
echo 0 >/stale
httpd -h /www
if [ "$acpi" = 1 ]; then acpid; fi

# Memory load: rewrite a file in tmpfs, round and round. Each page gets other random bytes than it had: QEMU finds out
# about dirtied pages by comparing what is in them, and sends pages of zeros for nothing. The bytes come from 64 random
# blocks of 64 KiB, written twice over so that any 64 in a row can be had at once, shifted by one with each round. What is
# about to be overwritten is looked at first: it must be what was written there one round ago.
dirtier() {
    blocks=$((ws * 16)) at=0 round=0 owed=0 rate=0 stale=0
    while [ "${rate:-0}" -le 0 ]; do read -r rate </dirty_rate; read -t 0.5 _ <>/never; done
    mount -t tmpfs -o "size=$((ws + 9))m" tmpfs /ws
    dd if=/dev/urandom of=/ws/source bs=64k count=64 2>/dev/null
    dd if=/ws/source of=/ws/source bs=64k count=64 seek=64 conv=notrunc 2>/dev/null
    read -r now _ </proc/uptime
    last=$((${now%.*} * 100 + 1${now#*.} - 100))
    while :; do
        read -r rate </dirty_rate
        read -r now _ </proc/uptime
        centiseconds=$((${now%.*} * 100 + 1${now#*.} - 100))
        # Blocks owed, in hundredths; a second's worth at most, so that a stall is not made good by a burst.
        owed=$((owed + ${rate:-0} * 16 * (centiseconds - last)))
        last=$centiseconds
        if [ $owed -gt $((${rate:-0} * 1600)) ]; then owed=$((${rate:-0} * 1600)); fi
        if [ $owed -ge 100 ] && [ $round -gt 0 ]; then
            cmp -s -n 65536 /ws/data /ws/source $((at * 65536)) $(((at + round + 63) % 64 * 65536)) || stale=$((stale + 1))
            echo $stale 1<>/stale
        fi
        while [ $owed -ge 100 ]; do
            run=$((owed / 100))
            if [ $run -gt 64 ]; then run=64; fi
            if [ $run -gt $((blocks - at)) ]; then run=$((blocks - at)); fi
            dd if=/ws/source of=/ws/data bs=64k count=$run skip=$(((at + round) % 64)) seek=$at conv=notrunc 2>/dev/null
            owed=$((owed - run * 100)) at=$((at + run))
            if [ $at -eq $blocks ]; then at=0 round=$((round + 1)); fi
        done
        read -t 0.1 _ <>/never
    done
}

# Health: kernel trouble in the log; a canary: a page written a second ago must say what the shell remembers; and the
# dirtier's own check. A migration that loses writes (see reference/libvirt.md, section 0) shows in one of them.
watch_health() {
    canary=0 lost=0
    echo $canary >/canary
    while :; do
        read -r found </canary
        if [ "$found" != "$canary" ]; then lost=$((lost + 1)); fi
        canary=$((canary + 1))
        echo $canary 1<>/canary
        faults=$(dmesg | grep -v 'soft lockup' | grep -cE \
            'Oops|BUG:|Kernel panic|general protection|unable to handle|segfault|invalid opcode|Bad page|corrupt')
        read -r stale </stale
        echo "$faults $((lost + stale))" 1<>/www/health
        [ -b /dev/vda ] && sync
        read -t 1 _ <>/never
    done
}

# As much of qemu-guest-agent as tells addresses and powers off. One that hangs has the port open and answers nothing.
# Without its other end (before libvirt connects, after a migration) the port reads as ended.
serve_agent() {
    read -t 0.1 _ <>/never
    for port in /dev/vport*p1; do exec 3<>"$port"; done
    while [ "$agent" = hangs ]; do read -t 9 _ <>/never; done
    while :; do
        while read -r line <&3; do
            case $line in
                *guest-sync*) line=${line##*\"id\":} && echo "{\"return\":${line%%\}*}}" >&3 ;;
                *guest-network-get-interfaces*)
                    echo '{"return":[{"name":"eth0","ip-addresses":' \
                        "[{\"ip-address-type\":\"ipv4\",\"ip-address\":\"${ip%/*}\",\"prefix\":24}]}]}" >&3
                    ;;
                *guest-shutdown*) poweroff -f ;;
                *) echo '{"error":{"class":"CommandNotFound","desc":"not in a lab guest"}}' >&3 ;;
            esac
        done
        read -t 0.2 _ <>/never
    done
}

if [ -n "$agent" ]; then serve_agent & fi
dirtier &
watch_health &
ticks=0
while :; do
    ticks=$((ticks + 1))
    read -r up _ </proc/uptime
    read -r health </www/health
    echo $ticks 1<>/www/ticks
    echo "$up" 1<>/www/uptime
    echo "$ticks $up $boot_id $health" 1<>/www/status
    [ -b /dev/vda ] && printf '%-511d\n' $ticks 1<>/dev/vda
    read -t 0.1 _ <>/never
done
