"""Metrics of real processes over HTTP; alerts and dashboards under Prometheus's own promtool."""

import http.client
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import metrics
from orchestrator.metrics import Listener
from tests.fakes import Stage
from tests.processes import Processes
from tests.redis_server import free_port
from tests.requirements import need_program
from tests.waiting import wait_until

CONFIG = Path(__file__).parents[2] / "config"


def get(port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def scrape(port: int) -> dict[str, dict[str, float]]:
    status, text = get(port)
    assert status == 200, text
    return by_labels(text)


def by_labels(text: str) -> dict[str, dict[str, float]]:
    """By metric, values by their labels' values in the order of the labels' names."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[",".join(sample.labels[label] for label in sorted(sample.labels))] = (
                sample.value
            )
    return found


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener("127.0.0.1", 0, lambda: "vmherd_more 1\n")
    yield listener
    listener.close()


def test_a_listener_gives_metrics_and_health_and_nothing_else(listener: Listener) -> None:
    status, text = get(listener.port)
    assert status == 200
    assert text.endswith("vmherd_more 1\n")
    assert "vmherd_build_info" in text
    assert get(listener.port, "/healthz") == (200, "ok\n")
    assert get(listener.port, "/")[0] == 404
    assert get(listener.port, "/metrics", "POST")[0] == 501


def test_a_scrape_that_fails_is_an_error_and_the_next_one_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[str] = []

    def more() -> str:
        return answers.pop()

    listener = Listener("127.0.0.1", 0, more)
    try:
        assert get(listener.port)[0] == 500
        answers.append("vmherd_more 2\n")
        assert get(listener.port)[1].endswith("vmherd_more 2\n")
    finally:
        listener.close()


def test_without_an_address_there_is_no_listener() -> None:
    assert metrics.serve("control") is None


def test_a_migrations_figures_show_while_it_runs_and_no_longer() -> None:
    class Job:
        processed_bytes = 10
        remaining_bytes = 20
        memory_bps = 30
        throttle_percent = 40

    name = "d8_virtualization_virtualmachine_migration_data_remaining_bytes"
    metrics.show_migration("default/a", "h1", Job())
    assert by_labels(metrics.render()).get(name, {}) == {}, "it has not begun"
    with metrics.migration_shown("default/a", "h1"):
        metrics.show_migration("default/a", "h1", Job())
        assert by_labels(metrics.render())[name] == {"a,default,h1": 20}
    metrics.show_migration("default/a", "h1", Job())  # its watcher was late
    assert by_labels(metrics.render()).get(name, {}) == {}


def test_a_control_worker_gives_the_herds_metrics_and_its_own(stage: Stage, redis_url: str, tmp_path: Path) -> None:
    stage.add_vm("linux-vm", "n1")
    port, other = free_port(), free_port()
    where = {"VMHERD_METRICS_ADDRESS": "127.0.0.1"}
    with Processes(redis_url, tmp_path, **where) as processes:
        processes.run("control", "control", VMHERD_METRICS_PORT=str(port))
        processes.run("intake", "intake", VMHERD_METRICS_PORT=str(other))
        processes.run("beat", "beat")

        def answers() -> bool:
            try:
                return get(port)[0] == get(other)[0] == 200
            except OSError:
                return False

        wait_until(answers, 40, processes.logs)
        wait_until(
            lambda: scrape(port).get("vmherd_tasks_total", {}).get("SUCCESS,vmherd.reconcile", 0) >= 1,
            40,
            processes.logs,
        )
        shown = scrape(port)
        assert shown["vmherd_redis_up"][""] == 1
        assert shown["vmherd_slots_cap"][""] == 3
        assert len(shown["d8_virtualization_virtualmachine_status_phase"]) == 1
        assert shown["vmherd_task_ended_timestamp_seconds"]["vmherd.reconcile"] > 1.7e9
        assert "vmherd_slots_cap" not in scrape(other), "intake has no copy of the herd"
        taken = scrape(other).get("vmherd_reports_total", {}).get("taken", 0)
        stage.nodes["n1"].list_all()
        wait_until(lambda: scrape(other).get("vmherd_reports_total", {}).get("taken", 0) > taken, 20, processes.logs)
        # A second one that finds the port taken works all the same, and says so.
        processes.run("control-2", "control", VMHERD_METRICS_PORT=str(port))
        log = processes.log_file("control-2")
        wait_until(lambda: log.exists() and "VMHERD_METRICS_PORT" in log.read_text(), 40, processes.logs)
        assert processes.all["control-2"].pid is not None


def promtool(*arguments: str | Path, cwd: Path = CONFIG / "prometheus") -> "subprocess.CompletedProcess[str]":
    tool = need_program("promtool", "prometheus")
    return subprocess.run([tool, *arguments], cwd=cwd, capture_output=True, text=True, timeout=100, check=False)


def test_promtool_accepts_configuration_and_rules_and_each_alert_fires() -> None:
    checked = promtool("check", "config", "prometheus.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", "rules.test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_an_alert_that_never_fires_fails_its_test(tmp_path: Path) -> None:
    rules = (CONFIG / "prometheus" / "rules.yaml").read_text()
    (tmp_path / "rules.test.yaml").write_text((CONFIG / "prometheus" / "rules.test.yaml").read_text())
    (tmp_path / "rules.yaml").write_text(
        rules.replace("max(vmherd_recovery_mode) > 0", "max(vmherd_recovery_mode) > 1")
    )
    tested = promtool("test", "rules", "rules.test.yaml", cwd=tmp_path)
    assert tested.returncode != 0
    assert "VmherdRecoveryMode" in tested.stdout + tested.stderr


def test_prometheus_can_read_each_expression_of_the_dashboards(tmp_path: Path) -> None:
    found = set()
    for path in (CONFIG / "grafana" / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            found |= {re.sub(r"\$\w+", ".*", target["expr"]) for target in panel["targets"]}
    rules = [{"record": f"dashboard:{number}", "expr": expression} for number, expression in enumerate(sorted(found))]
    assert len(rules) > 30
    file = tmp_path / "dashboards.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    checked = promtool("check", "rules", file)
    assert checked.returncode == 0, checked.stdout + checked.stderr
