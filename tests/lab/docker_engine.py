"""A Docker engine of a test's own, in a namespace of the lab.

`dockerd` runs in the control plane's network namespace (so a published port is one of 192.0.2.1, and its rules of
iptables go with the namespace), in a PID namespace and a mount namespace of its own: when it is killed, by whomever,
the kernel ends every container and takes every mount along, its images and volumes among them. Its cgroups are those
that `cleanup` removes with the lab.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from tests.lab.cleanup import CGROUPS, cgroup_name
from tests.lab.container_images import BASE_IMAGES, base_root, wheels
from tests.lab.lab import Lab
from tests.lab.namespaces import REPOSITORY, LabError
from tests.requirements import need_program, need_root
from tests.waiting import wait_until

_WHEELS_PORT = 8099
_WEIGHTS = {"cpu.shares": "10240", "cpu.weight": "1000"}
"""Ten times what one process has by default (cgroup v1, v2)."""
# A /run of its own with the lab's folder in it: it and its containerd leave things there, and in /etc/docker.
_START = """\
lab=$1 && shift
mkdir "$lab/docker/run"
mount -t tmpfs vmherd "$lab/docker/run"
mkdir -p "$lab/docker/$lab" "$lab/docker/run/mount" # mount keeps notes there
mount --bind "$lab" "$lab/docker/$lab"
mount --move "$lab/docker/run" /run
mkdir "$lab/docker/data"
mount -t tmpfs vmherd "$lab/docker/data" # images in memory: half a GiB, and no disk to wait for
[ ! -d /etc/docker ] || mount -t tmpfs vmherd /etc/docker
exec "$@"
"""


class DockerEngine:
    """An engine in the lab's control plane; a context manager.

    Args:
        lab: Up.
    """

    def __init__(self, lab: Lab) -> None:
        need_root("a Docker engine")
        self._dockerd = need_program("dockerd", "docker.io")
        self._docker = need_program("docker", "docker.io")
        self._compose = need_program("docker-compose", "docker-compose")
        self._lab = lab
        self.folder = lab.directory / "docker"
        self.socket = self.folder / "docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir()
        self._make_cgroup()
        argv = [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "private"),
            *("sh", "-euc", _START, "sh", str(self._lab.directory), str(self._dockerd)),
            f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/exec",
            f"--pidfile={self.folder}/pid",
            f"--host=unix://{self.socket}",
            f"--cgroup-parent=/{cgroup_name(self._lab.name)}",
            "--exec-opt=native.cgroupdriver=cgroupfs",
        ]
        self._process = self._lab.control.popen(argv, log="dockerd")
        try:
            wait_until(self._answers, 120, "dockerd answers (its log is in logs/dockerd.log)", interval=0.2)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def docker(self, *arguments: str, timeout: float = 100.0) -> str:
        """Run `docker` and return what it printed."""
        return self._run([str(self._docker), *arguments], timeout)

    def compose(self, project: Path, *arguments: str, timeout: float = 100.0) -> str:
        """Run `docker-compose` in a folder and return what it printed."""
        return self._run([str(self._compose), "--project-name", "vmherd", *arguments], timeout, project)

    def import_base_images(self) -> None:
        """Make the images from which ours are built, as a registry would give them."""
        first, *others = BASE_IMAGES
        self.docker("import", str(base_root()), first, timeout=300)
        for name in others:
            self.docker("tag", first, name)

    def make_prometheus_image(self, tag: str) -> None:
        """Make what stands in for Prometheus's own image: this distribution's program, and busybox's wget."""
        program, busybox = need_program("prometheus", "prometheus"), need_program("busybox", "busybox-static")
        with TemporaryDirectory() as folder:
            shutil.copy(program, Path(folder) / "prometheus")
            shutil.copy(busybox, Path(folder) / "wget")
            (Path(folder) / "Dockerfile").write_text(
                f"FROM {BASE_IMAGES[0]}\nCOPY prometheus wget /bin/\n"
                "RUN mkdir /prometheus && chown nobody:nogroup /prometheus\nUSER nobody\n"
                'ENTRYPOINT ["/bin/prometheus"]\n'
            )
            self.docker("build", "--network", "none", "--tag", tag, folder, timeout=300)

    def build(self, tag: str) -> None:
        """Build our image; its packages come from this machine's cache, by the namespace's own loopback."""
        serve = [sys.executable, "-m", "http.server", str(_WHEELS_PORT), "--bind", "127.0.0.1"]
        server = self._lab.control.popen([*serve, "--directory", str(wheels())], log="wheels")
        try:
            links = f"http://127.0.0.1:{_WHEELS_PORT}/"
            arguments = ("--build-arg", f"PIP_FIND_LINKS={links}", "--build-arg", "PIP_NO_INDEX=1", "--network", "host")
            wait_until(self._serves_wheels, 60, "the wheels are served")
            self.docker("build", *arguments, "--tag", tag, str(REPOSITORY), timeout=600)
        finally:
            server.terminate()
            server.wait(20)

    def _make_cgroup(self) -> None:
        """Make the CPU's cgroup of all containers, with the weight of several processes: it has that of one."""
        for hierarchy, weight in (("cpu", "cpu.shares"), ("", "cpu.weight")):
            if (CGROUPS / hierarchy / "cgroup.procs").exists():
                group = CGROUPS / hierarchy / cgroup_name(self._lab.name)
                group.mkdir(exist_ok=True)
                if (group / weight).exists():
                    (group / weight).write_text(_WEIGHTS[weight])

    def _serves_wheels(self) -> bool:
        try:
            self._lab.control.connect(("127.0.0.1", _WHEELS_PORT)).close()
        except OSError:
            return False
        return True

    def _run(self, argv: Sequence[str], timeout: float, cwd: Path | None = None) -> str:
        env = {"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "0", "COMPOSE_HTTP_TIMEOUT": "200"}
        env["DOCKER_CONFIG"] = str(self.folder / "client")
        done = self._lab.control.run(argv, env=env, log="docker", cwd=cwd, timeout=timeout, check=False)
        if done.returncode != 0:  # a build tells on its standard output why it failed
            raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise LabError("dockerd ended; its log is in logs/dockerd.log")
        try:
            self.docker("version", timeout=20)
        except (LabError, subprocess.TimeoutExpired):
            return False
        return True

    def _end(self) -> None:
        """Kill it, and the PID namespace with it; that processes of containers are gone is seen by their cgroups."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None
