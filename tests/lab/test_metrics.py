"""Debian's Prometheus scrapes a herd of real hosts, during a migration, with the rules that we ship."""

import json
import shutil
import urllib.parse
from typing import Any

import pytest
import yaml

from orchestrator.metrics import PORTS
from tests.lab.herd import LabHerd
from tests.lab.lab import Lab
from tests.lab.mutants import replaced
from tests.lab.namespaces import REPOSITORY
from tests.lab.network import CONTROL_ADDRESS
from tests.requirements import need_program
from tests.waiting import wait_until

SETTINGS = {"VMHERD_METRICS_ADDRESS": "0.0.0.0"}
PROMETHEUS_PORT = 9090
pytestmark = pytest.mark.timeout(240)


class Prometheus:
    """Debian's Prometheus in the control plane's namespace; a context manager."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._program = need_program("prometheus", "prometheus")
        self._folder = lab.directory / "prometheus"

    def __enter__(self) -> "Prometheus":
        self._folder.mkdir()
        shutil.copy(REPOSITORY / "config" / "prometheus" / "rules.yaml", self._folder)
        control = [f"{CONTROL_ADDRESS}:{PORTS[name]}" for name in ("control", "liveness", "intake")]
        nodes = [
            f"{host.address}:{PORTS[name]}" for host in self._lab.hosts for name in ("agent", "migrate", "lifecycle")
        ]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {"job_name": "vmherd-control", "static_configs": [{"targets": control}]},
                {"job_name": "vmherd-node", "static_configs": [{"targets": nodes}]},
            ],
        }
        (self._folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        argv = [
            str(self._program),
            f"--config.file={self._folder}/prometheus.yaml",
            f"--storage.tsdb.path={self._folder}/data",
            f"--web.listen-address={CONTROL_ADDRESS}:{PROMETHEUS_PORT}",
        ]
        self._process = self._lab.control.popen(argv, log="prometheus")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer; None while it does not answer."""
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        try:
            text = self._lab.control.http_get(CONTROL_ADDRESS, f"/api/v1/{path}{query}", port=PROMETHEUS_PORT)
        except OSError:
            return None
        return json.loads(text)["data"]

    def value(self, expression: str) -> float | None:
        """The value of an expression; None when it has none."""
        found = (self.get("query", query=expression) or {}).get("result", [])
        return float(found[0]["value"][1]) if found else None


def test_prometheus_scrapes_each_process_and_sees_a_migration(herd: LabHerd) -> None:
    guest = herd.lab.guest("linux-vm", address="192.0.2.101", memory_mib=160, dirty_mib_s=40, working_set_mib=32)
    herd.start_guests((guest, "h1"))
    remaining = 'max_over_time(d8_virtualization_virtualmachine_migration_data_remaining_bytes{name="linux-vm"}[2m])'
    with Prometheus(herd.lab) as prometheus, replaced(herd, "control", settings={"VMHERD_BANDWIDTH_MIB_S": "10"}):
        wait_until(lambda: prometheus.value("sum(up)") == 12, 60, lambda: str(prometheus.get("targets")))
        wait_until(lambda: prometheus.value("max(vmherd_slots_cap)") == 3, 20)
        assert (
            prometheus.value('sum(max by (name) (d8_virtualization_virtualmachine_status_phase{phase="Running"}))') == 1
        )
        evict = herd.cluster.evict("linux-vm")
        wait_until(lambda: prometheus.value("max(vmherd_slots_in_use)") == 1, 30, "a slot in use")
        wait_until(lambda: (prometheus.value(remaining) or 0) > 0, 30, "what is left to send")
        # The source's own worker tells it, and names the VM and the node.
        (series,) = prometheus.get("query", query=remaining)["result"]
        assert (series["metric"]["namespace"], series["metric"]["node"]) == ("default", "h1")
        guest.set_dirty_rate(0)
        assert evict.wait(timeout=90).resource.status.phase == "Completed"
        target = herd.cluster.vm("linux-vm").status.node_name
        wait_until(lambda: prometheus.value(f'max(vmherd_node_virtualmachines{{node="{target}"}})') == 1, 20)
        wait_until(lambda: prometheus.value("max(vmherd_slots_in_use)") == 0, 20)
        name = "d8_virtualization_virtualmachine_migration_data_remaining_bytes"
        wait_until(lambda: prometheus.value(name) is None, 20, "its figures are gone with it")
        assert prometheus.value('max(vmherd_virtualmachineoperation_downtime_seconds{virtualmachine="linux-vm"})')
        # The rules are loaded, and a cordoned node shows at once.
        groups = prometheus.get("rules")["groups"]
        assert sum(len(group["rules"]) for group in groups) >= 20
        assert not [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]
        herd.cluster.cordon("h3")
        wait_until(lambda: prometheus.value('max(vmherd_node_cordoned{node="h3"})') == 1, 20)
    assert guest.trouble() == ""
