#!/usr/bin/env bash
# Brings a fresh Debian or Ubuntu to where vmherd's commands run; `make` calls it before each of them. The second time
# it only looks, and takes a fraction of a second. What it can't mend it says in one message, and exits with 1.
#
#   tools/setup.sh python   for `make check` and `make fast`: Redis, a compiler, the Python environment in .venv
#   tools/setup.sh lab      for `make demo` and `make test`: also libvirt, QEMU and the guest image; needs root
#
# Environment: PYTHON, the interpreter to use (3.11 or later; else the first that is found).
#
# Services: what Debian's packages would start or enable (redis-server on port 6379, libvirtd) is neither started nor
# enabled when this script installs them. The lab and the tests start programs of their own, in places of their own.
set -Eeuo pipefail

cd "$(dirname "$0")/.."
level=${1:-lab}
case $level in
    python | lab) ;;
    *) echo "usage: tools/setup.sh [python|lab]" >&2 && exit 2 ;;
esac

export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" # libvirtd is there, and not every user's PATH has them
readonly VENV=.venv STAMP=.venv/.setup-done LOG=.setup.log
readonly WHAT_FOR="make ${VMHERD_MAKE_GOAL:-setup}"

say() { printf 'setup: %s\n' "$*"; }

give_up() { # in one message: each argument is a problem and what to do about it
    {
        printf 'setup: %s cannot run here yet.\n' "$WHAT_FOR"
        printf -- '- %s\n' "$@"
    } >&2
    exit 1
}

trap 'echo "setup: tools/setup.sh itself failed at line $LINENO" >&2' ERR

is_root() { [ "$(id -u)" -eq 0 ]; }
has() { command -v "$1" >/dev/null 2>&1; }
is_python_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# ---------------------------------------------------------------------------------------------------- what is there

find_python() { # prints the interpreter; nothing if none is new enough
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if is_python_new_enough "$PYTHON"; then command -v "$PYTHON"; fi
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if is_python_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

python_packages() { # what Debian packages the interpreter lacks to make a venv in which C extensions build
    "$1" - <<'PYTHON'
import importlib.util
import os
import sys
import sysconfig

here = f"python{sys.version_info.major}.{sys.version_info.minor}"
default = os.path.basename(os.path.realpath("/usr/bin/python3"))
package = "python3" if here == default else here  # Debian's default version, or another one beside it
if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
    print(f"{package}-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print(f"{package}-dev")
PYTHON
}

is_libvirt_complete() { # the lab's hosts mount theirs over these folders
    has libvirtd && has virtlogd && [ -d /etc/libvirt ] && [ -d /var/lib/libvirt ] && [ -d /var/log/libvirt ]
}

is_busybox_static() { # a dynamic program names its loader near its beginning
    has busybox && ! head -c 4096 "$(command -v busybox)" | grep -q /ld-linux
}

missing_packages() { # prints Debian's names of what is missing, one a line
    need() { # PACKAGE COMMAND...: the package is there when the command succeeds
        local package=$1
        shift
        "$@" >/dev/null 2>&1 || echo "$package"
    }
    need gcc has gcc
    need g++ has g++
    need libc6-dev test -e /usr/include/stdio.h
    need pkg-config has pkg-config
    need libvirt-dev pkg-config --exists libvirt
    need redis-server has redis-server
    need systemd has systemd-analyze # its check of the units; nothing of it runs
    if [ "$level" = lab ]; then
        need libvirt-daemon-system is_libvirt_complete
        need libvirt-clients has virsh
        need qemu-system-x86 has qemu-system-x86_64
        need qemu-utils has qemu-img
        need iproute2 has ip
        need busybox-static is_busybox_static
        need cpio has cpio
        need openipmi has ipmi_sim
        need ipmitool has ipmitool
        need fence-agents has fence_ipmilan
        need xz-utils has xz # Debian's and Ubuntu's kernel modules are compressed with one or the other
        need zstd has zstd
        need e2fsprogs has mkfs.ext4 # the guest with a watchdog
        need prometheus has promtool
        need docker.io has dockerd # an engine of the tests' own: tests/lab/docker_engine.py
        need docker-compose has docker-compose
        need iptables has iptables
        need chromium has chromium # tests/browser
    fi
    if [ -n "$python" ]; then
        python_packages "$python"
    elif [ -z "${PYTHON:-}" ] && ! has python3; then
        printf '%s\n' python3 python3-venv python3-dev
    fi
}

python_problem() {
    local which=${PYTHON:-python3}
    if has "$which"; then
        echo "Python 3.11 or later is needed; $(command -v "$which") is $("$which" -V 2>&1 | cut -d' ' -f2)." \
            "Install a newer one and name it: $WHAT_FOR PYTHON=/path/to/python3"
    else
        echo "Python 3.11 or later is needed, and there is no ${which}. Install one, or name it:" \
            "$WHAT_FOR PYTHON=/path/to/python3"
    fi
}

# ------------------------------------------------------------------------------------------------ Debian's packages

enabled_services() { # units of the packages below that start at boot
    { systemctl list-unit-files --state=enabled --no-legend --no-pager 'redis*' 'libvirt*' 'virt*' \
        'docker*' 'containerd*' 2>/dev/null || true; } |
        cut -d' ' -f1 | sort
}

forbid_service_starts() { # asks Debian's packaging to start nothing, for as long as this process lives
    policy=/usr/sbin/policy-rc.d
    # The machine may have a rule of its own; one of ours is left over from a run that was killed.
    if [ -e "$policy" ] && ! grep -q tools/setup.sh "$policy"; then return; fi
    # shellcheck disable=SC2064  # the path is to be read now
    trap "rm -f $policy" EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\n# made by %s, process %s; safe to delete\nkill -0 %s 2>/dev/null && exit 101\nexit 0\n' \
        "$PWD/tools/setup.sh" $$ $$ >"$policy"
    chmod +x "$policy"
}

install_packages() {
    say "installing with apt-get: $*"
    local before new
    before=$(enabled_services)
    forbid_service_starts
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get -q update && apt-get -q install -y --no-install-recommends "$@"; } >"$LOG" 2>&1 </dev/null; then
        tail -n 15 "$LOG" >&2
        give_up "apt-get could not install: $*. Its last lines are above, all of them in $LOG."
    fi
    new=$(comm -13 <(echo "$before") <(enabled_services))
    if [ -n "$new" ]; then
        # shellcheck disable=SC2086  # one word a unit
        systemctl disable --quiet $new >>"$LOG" 2>&1 || true
        say "left switched off (systemctl enable --now NAME starts one):" $new
    fi
}

# ---------------------------------------------------------------------------------------------------------- Python

stamp() { cat requirements.lock pyproject.toml tools/setup.sh | sha256sum; }

make_venv() {
    if ! is_python_new_enough $VENV/bin/python || ! $VENV/bin/python -m pip --version >/dev/null 2>&1; then
        say "making $VENV with $python ($("$python" -V 2>&1))"
        "$python" -m venv --clear $VENV >"$LOG" 2>&1 || {
            tail -n 15 "$LOG" >&2
            give_up "$python could not make a virtual environment; its last lines are above."
        }
    fi
    say "installing the Python packages of requirements.lock into $VENV"
    rm -f $STAMP
    pip_install --require-hashes -r requirements.lock
    pip_install --no-deps --no-build-isolation -e . # hatchling is in the lock
    stamp >$STAMP
    if is_root; then chown -R --reference=pyproject.toml $VENV $LOG; fi # under sudo: it stays its owner's
}

pip_install() {
    PIP_ROOT_USER_ACTION=ignore $VENV/bin/python -m pip install --disable-pip-version-check "$@" >"$LOG" 2>&1 || {
        tail -n 15 "$LOG" >&2
        give_up "pip install $* failed. Its last lines are above, all of them in $LOG. Is PyPI reachable?"
    }
}

is_venv_current() {
    [ "$(cat $STAMP 2>/dev/null)" = "$(stamp)" ] && is_python_new_enough $VENV/bin/python
}

make_guest_image() { # cached under /var/cache/vmherd; from a kernel package that is downloaded, not installed
    if $VENV/bin/python -m tests.lab.guest build >"$LOG" 2>&1; then return; fi
    apt-get -q update >"$LOG" 2>&1 || true # a machine that had all packages may have no lists of them
    $VENV/bin/python -m tests.lab.guest build >>"$LOG" 2>&1 || {
        tail -n 15 "$LOG" >&2
        give_up "The guest image could not be built. The last lines are above, all of them in $LOG."
    }
}

make_container_images() { # cached likewise: what stands in for a registry of images
    $VENV/bin/python -m tests.lab.container_images >"$LOG" 2>&1 || {
        tail -n 15 "$LOG" >&2
        give_up "What the containers are built from could not be made. The last lines are above, all of them in $LOG."
    }
}

# ------------------------------------------------------------------------------------------------------------ steps

exec 9<.
flock 9 # two `make`s at once: the second one waits, and finds all done

if is_venv_current; then python=$VENV/bin/python; else python=$(find_python); fi
mapfile -t packages < <(missing_packages)

problems=()
if [ ${#packages[@]} -gt 0 ]; then
    line="apt-get install --no-install-recommends ${packages[*]}"
    if ! has apt-get; then
        problems+=("There is no apt-get here. Install, by your system's own means, what Debian calls: ${packages[*]}")
    elif ! is_root; then
        problems+=("Packages are missing. Ask an administrator to run, or run as root: $line")
    fi
fi
if [ -z "$python" ] && { [ -n "${PYTHON:-}" ] || has python3; }; then
    problems+=("$(python_problem)")
fi
if ! is_venv_current && ! [ -w . ]; then
    problems+=("$PWD is not writable for $(id -un): the Python environment is made in it.")
fi
if [ "$level" = lab ] && ! is_root; then
    problems+=("The lab's hosts are network namespaces with a libvirtd each, which needs root. Run: sudo $WHAT_FOR")
fi
if [ ${#problems[@]} -gt 0 ]; then give_up "${problems[@]}"; fi

if [ ${#packages[@]} -gt 0 ]; then
    install_packages "${packages[@]}"
    if [ -z "$python" ]; then python=$(find_python); fi
    if [ -z "$python" ]; then give_up "$(python_problem)"; fi
    mapfile -t packages < <(missing_packages)
    if [ ${#packages[@]} -gt 0 ]; then
        give_up "apt-get installed all that was asked for, and this is still missing: ${packages[*]}"
    fi
fi
if ! is_venv_current; then make_venv; fi
exec 9>&-
if [ "$level" = lab ]; then
    make_guest_image
    make_container_images
fi
