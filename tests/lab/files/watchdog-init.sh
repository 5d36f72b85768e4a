#!/bin/busybox sh
# The initramfs of the guest with a watchdog: drivers, network, and then Python of the real root, which is told what to
# do through the second serial port (tests/lab/files/watchdog-guest.py, from the second disk).
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module" || echo "insmod $module failed"; done </modules/order
ip link set lo up
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
mount -t ext4 -o ro /dev/vda /new
mount -t tmpfs tmpfs /new/opt
mount -t tmpfs tmpfs /new/tmp
tar -xf /dev/vdb -C /new/opt
mount --move /dev /new/dev
mount --move /proc /new/proc
mount --move /sys /new/sys
exec switch_root /new /usr/bin/python3 /opt/tests/lab/files/watchdog-guest.py
