"""Alerts and dashboards speak of metrics that there are, and each alert is tested both ways."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.metrics import REGISTRY
from orchestrator.services.herd_metrics import FAMILIES

CONFIG = Path(__file__).parents[2] / "config"
DASHBOARDS = sorted((CONFIG / "grafana" / "dashboards").glob("*.json"))
RULES = CONFIG / "prometheus" / "rules.yaml"
TESTS = CONFIG / "prometheus" / "rules.test.yaml"
METRIC = re.compile(r"\b(?:d8_virtualization|vmherd|process)_[a-z0-9_]+\b")
PROMETHEUS_OWN = {"up"}


def existing() -> dict[str, set[str]]:
    """All metrics' names as a scrape shows them, with their labels where these are fixed."""
    found = {family.name: set(family.labels) for family in FAMILIES}
    for collector in {id(c): c for c in REGISTRY._names_to_collectors.values()}.values():
        labels = set(getattr(collector, "_labelnames", ()))
        for metric in collector.describe() if hasattr(collector, "describe") else collector.collect():
            suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
            for suffix in suffixes:
                found[metric.name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            found.setdefault(sample.name, set(sample.labels))
    return found


def expressions(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def check(expression: str) -> None:
    known = existing()
    named = set(METRIC.findall(expression))
    assert named or "up" in expression, f"no metric in {expression}"
    for name in named:
        assert name in known, f"{name} does not exist: {expression}"
    for name, matchers in re.findall(r"([a-z0-9_]+)\{([^{}]*)\}", expression):
        for label in re.findall(r"(\w+)(?==|!=|=~|!~)", matchers):
            allowed = known.get(name, set()) | {"job", "instance"}
            assert label in allowed, f"{name} has no label {label}: {expression}"


def test_there_are_dashboards() -> None:
    assert [path.stem for path in DASHBOARDS] == ["herd", "nodes", "processes", "virtual-machines"]
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len(boards)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_refers_to_metrics_and_labels_that_exist(path: Path) -> None:
    board = json.loads(path.read_text())
    found = list(expressions(board))
    assert len(found) >= 5
    for expression in found:
        check(expression)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboards_panels_lie_beside_each_other_on_its_grid(path: Path) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in json.loads(path.read_text())["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']} covers {taken[cell]}"
            taken[cell] = panel["title"]


def test_an_expression_with_an_unknown_metric_or_label_is_found() -> None:
    with pytest.raises(AssertionError, match="does not exist"):
        check("max(vmherd_no_such_metric)")
    with pytest.raises(AssertionError, match="has no label"):
        check('vmherd_node_ready{nodes="n1"}')


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_refers_to_what_exists_and_says_what_to_do(alert: dict[str, Any]) -> None:
    check(alert["expr"])
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"]


def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_is_quiet() -> None:
    cases = yaml.safe_load(TESTS.read_text())["tests"]
    expected: dict[str, list[int]] = {}
    for case in cases:
        (query,) = case["promql_expr_test"]
        expected[case["name"]] = [sample["value"] for sample in query["exp_samples"]]
    for alert in alerts():
        assert expected.pop(f"{alert['alert']} fires") == [1]
        assert expected.pop(f"{alert['alert']} is quiet") == []
    assert not expected
