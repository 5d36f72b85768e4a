"""The lab itself: is what it shows the truth, do its faults happen, and does it leave nothing behind."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import libvirt
import pytest
import redis

from tests.lab.cleanup import leftovers, namespaces_of, processes_of
from tests.lab.lab import Lab, require_lab
from tests.lab.namespaces import REPOSITORY, LabError, Namespace
from tests.lab.observer import (
    DoubleRunObserver,
    ObservedMigration,
    downtimes,
    max_concurrent,
    max_concurrent_per_source,
    observed_migrations,
    stream_migrations,
)
from tests.lab.watch import LibvirtWatch
from tests.waiting import wait_until

pytestmark = pytest.mark.lab

LIVE = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER
LIBVIRTD_PORT = 16509


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    require_lab()
    # libvirt prints each error; here they are part of the game.
    libvirt.registerErrorHandler(lambda *_: None, None)
    with Lab(hosts=2, name=f"self{os.getpid()}") as lab:
        yield lab


def reaches(space: Namespace, address: str) -> bool:
    try:
        space.connect((address, LIBVIRTD_PORT), timeout=0.7).close()
    except OSError:
        return False
    return True


def test_a_guest_migrates_and_all_observers_agree(lab: Lab) -> None:
    source, target = lab.hosts
    guest = lab.guest("linux-vm", address="192.0.2.101", memory_mib=128, dirty_mib_s=4, working_set_mib=16, disk_mib=1)
    doubles = DoubleRunObserver(lab)
    domain = source.connect().createXML(guest.xml)
    before = guest.wait_up()
    with LibvirtWatch(lab) as watch, lab.sampler(guest) as sampler:
        # UNSAFE: the lab's folder is shared by all hosts, which libvirt, on a local file system, can't know.
        flags = LIVE | libvirt.VIR_MIGRATE_UNSAFE
        domain.migrateToURI3(target.migration_uri, {libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 60}, flags)
        samples = sampler.stop()
        wait_until(lambda: all(job.ended_at < math.inf for job in watch.jobs()), 20, "the job is over")

    assert guest.trouble() == ""
    after = guest.status()
    assert after.boot_id == before.boot_id
    assert after.ticks > before.ticks
    assert source.qemu_pid(guest.uuid) is None
    assert target.qemu_pid(guest.uuid) == target.qemu_pid(guest.domain) != None  # noqa: E711 - chained
    assert guest.disk is not None
    assert int(guest.disk.read_bytes()[:511]) > 0

    (stream,) = stream_migrations(lab)
    (hooked,) = observed_migrations(lab)
    (job,) = watch.jobs()
    for seen in (stream, hooked):
        assert (seen.domain, seen.source, seen.target, seen.outcome) == (guest.domain, "h1", "h2", "completed")
    assert (job.host, job.domain) == ("h1", guest.domain)
    assert job.began_at < hooked.began_at < stream.began_at < stream.ended_at < hooked.ended_at
    assert "RESUMED/MIGRATED" in [event.what for event in watch.events() if event.host == "h2"]
    (downtime,) = downtimes(lab)[guest.domain]
    assert 0 < downtime <= samples.longest_gap_s + 0.1
    doubles.check()


def test_an_aborted_migration_is_seen_as_one(lab: Lab) -> None:
    source, target = lab.hosts
    guest = lab.blank("aborted", memory_mib=64)
    domain = source.connect().createXML(guest.xml)
    began_at = time.time()
    order = ["migrate", "--live", "--p2p", "--bandwidth", "1", guest.domain, target.migration_uri]
    migration = source.popen(["virsh", *order])
    wait_until(lambda: bool(stream_migrations(lab, since=began_at)), 20, "the stream begins")
    domain.abortJob()
    assert migration.wait(20) != 0
    assert [m.outcome for m in stream_migrations(lab, since=began_at)] == ["cancelled"]
    (hooked,) = observed_migrations(lab, since=began_at)
    assert (hooked.source, hooked.target, hooked.outcome) == ("h1", "h2", "cancelled")
    domain.destroy()


def test_a_double_run_is_found(lab: Lab) -> None:
    # No disk, so no lock: nothing keeps libvirt from it.
    guest = lab.blank("double")
    doubles = DoubleRunObserver(lab)
    first = lab.hosts[0].connect().createXML(guest.xml)
    doubles.check()
    second = lab.hosts[1].connect().createXML(guest.xml, libvirt.VIR_DOMAIN_START_PAUSED)
    doubles.check()
    second.resume()
    first.destroy()
    (found,) = doubles.found()
    assert (found.domain, sorted(found.hosts)) == (guest.domain, ["h1", "h2"])
    assert found.began_at < found.ended_at < math.inf
    with pytest.raises(AssertionError):
        doubles.check()
    second.destroy()


def test_cuts_between_hosts_and_of_cables(lab: Lab) -> None:
    one, two = lab.hosts
    one.block_peer(two)
    assert not reaches(one.space, two.address)
    assert not reaches(two.space, one.address)
    assert reaches(lab.control, one.address)
    assert reaches(lab.control, two.address)
    two.unblock_peer(one)
    assert reaches(one.space, two.address)
    for silent in (False, True):
        one.cut_link(silent=silent)
        assert not reaches(two.space, one.address)
        one.heal_link()
        wait_until(lambda: reaches(two.space, one.address), 20, "healed")


def test_a_shaped_cable_is_slow(lab: Lab) -> None:
    host = lab.hosts[0]
    host.shape(rate_mbit=8)
    assert "8Mbit" in host.run(["tc", "qdisc", "show", "dev", "eth0"]).stdout
    host.unshape()
    assert "8Mbit" not in host.run(["tc", "qdisc", "show", "dev", "eth0"]).stdout


def test_a_power_cut_ends_all_of_a_host_and_power_brings_it_back(lab: Lab) -> None:
    host = lab.hosts[1]
    guest = lab.blank("doomed")
    host.connect().createXML(guest.xml)
    survivor = lab.blank("survivor")
    lab.hosts[0].connect().createXML(survivor.xml)
    service = lab.supervise(lambda: host.popen(["sleep", "infinity"]), "service")
    boot_id = host.boot_id

    host.power_cut()
    assert host.processes() == {}
    assert not reaches(lab.control, host.address)
    with pytest.raises(LabError, match="is off"):
        host.popen(["true"])
    assert lab.hosts[0].qemu_pid(survivor.uuid) is not None

    host.power_on()
    assert host.connect().listAllDomains() == []
    assert host.run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout.strip() == host.boot_id != boot_id
    assert host.run(["hostname"]).stdout.strip() == host.name
    service.wait_restarts(1)
    service.stop()
    lab.hosts[0].kill_qemu(survivor.uuid)


def test_libvirtd_dies_and_its_guest_does_not(lab: Lab) -> None:
    host = lab.hosts[0]
    guest = lab.blank("lasting")
    host.connect().createXML(guest.xml)
    pid = host.qemu_pid(guest.uuid)
    host.kill_libvirtd()
    assert not host.libvirtd_answers()
    assert host.qemu_pid(guest.uuid) == pid
    host.start_libvirtd()
    assert guest.uuid in [domain.UUIDString() for domain in host.connect().listAllDomains()]
    # Not by destroy(), which libvirtd, while it takes up its guests again, may answer with "no domain" and yet do.
    host.kill_qemu(guest.uuid)


def test_a_supervised_process_comes_back(lab: Lab) -> None:
    with lab.supervise(lambda: lab.control.popen(["sleep", "infinity"]), "sleeper") as sleeper:
        first = sleeper.pid
        sleeper.kill()
        sleeper.wait_restarts(1)
        assert sleeper.pid not in (None, first)
        sleeper.hold()
        sleeper.kill()
        wait_until(lambda: sleeper.pid is None, 20, "killed")
        sleeper.release()
        sleeper.wait_restarts(2)
        last = sleeper.pid
    assert last not in processes_of(lab.name)


def test_redis_keeps_its_data_when_killed(lab: Lab) -> None:
    server = lab.start_redis()
    client = redis.Redis.from_url(server.url)
    client.set("key", "value")
    server.kill()
    server.start()
    assert client.get("key") == b"value"
    asked = f"import redis; print(redis.Redis.from_url({server.url_for_hosts!r}).get('key'))"
    assert lab.hosts[0].run([sys.executable, "-c", asked]).stdout.strip() == "b'value'"
    client.close()
    server.stop()


def test_a_name_in_use_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match="has a lab"):
        Lab(hosts=1, name=lab.name).up()
    assert reaches(lab.control, lab.hosts[0].address)


# What an owner that is about to be killed has running: a guest, Redis, and processes that left their parents.
DOOMED_OWNER = """
import sys, time
from tests.lab.lab import Lab
lab = Lab(hosts=1, name=sys.argv[1]).up()
lab.start_redis()
lab.hosts[0].connect().createXML(lab.blank("orphan").xml)
lab.hosts[0].popen(["setsid", "-f", "sleep", "600"]).wait()
lab.control.popen(["setsid", "-f", "sleep", "600"]).wait()
print("up", flush=True)
if sys.argv[2] == "down":
    lab.down()
else:
    time.sleep(600)
"""


@pytest.mark.parametrize("end", ["down", "kill"])
def test_nothing_is_left(end: str) -> None:
    require_lab()
    name = f"gone{os.getpid()}"
    owner = subprocess.Popen(
        [sys.executable, "-c", DOOMED_OWNER, name, end], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    with owner.stdout:
        assert owner.stdout.readline() == "up\n"
        if end == "kill":
            assert len(processes_of(name)) >= 8
            # Held open, the namespaces keep their numbers, so that a process left in one would still be found.
            held = [os.open(path, os.O_RDONLY) for path in namespaces_of(name)]
            inodes = [os.fstat(descriptor).st_ino for descriptor in held]
            owner.send_signal(signal.SIGKILL)
            owner.wait()
            wait_until(lambda: not leftovers(name), 20, lambda: f"removal: {leftovers(name)}")
            assert processes_of(name, inodes) == {}
            for descriptor in held:
                os.close(descriptor)
        else:
            assert owner.wait(30) == 0
    assert leftovers(name) == []
    wait_until(lambda: f"tests.lab.watchdog {name} " not in _all_command_lines(), 20, "the watchdog ends")


def _all_command_lines() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def _migration(source: str, began_at: float, ended_at: float) -> ObservedMigration:
    return ObservedMigration("default.vm", source, "t", began_at, ended_at, "completed")


def test_concurrency_counts_overlaps_and_not_touches() -> None:
    migrations = [_migration("a", 0, 2), _migration("a", 2, 4), _migration("b", 1, math.inf), _migration("b", 3, 5)]
    assert max_concurrent(migrations) == 3
    assert max_concurrent_per_source(migrations) == {"a": 1, "b": 2}
    assert max_concurrent([]) == 0
