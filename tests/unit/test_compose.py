"""What compose.yaml and the Dockerfile promise, read off the files."""

from pathlib import Path
from typing import Any

import yaml

from orchestrator.settings import Settings

REPOSITORY = Path(__file__).parents[2]
NODE_ONLY = {
    "node",
    "worker_role",
    "libvirt_uri",
    "assume_shared_storage",
    "domain_type",
    "cpu_shares",
    "migration_uri",
    "state_dir",
    "host_shutdown_timeout",
    "host_shutdown_grace",
    "peer_address",
    "watchdog",
    "watchdog_mode",
}
CLIENTS_ONLY = {"server", "token", "token_file", "ca_file", "kubeconfig"}
OTHERWISE = {"flower_password_file", "flower_port", "metrics_port", "api_port"}
"""Fixed by the ports and secrets that the file publishes."""


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]
    return found


def test_each_setting_of_the_control_plane_can_be_given_from_the_environment() -> None:
    passed = {name for service in services().values() for name in service.get("environment", {})}
    wanted = set(Settings.model_fields) - NODE_ONLY - CLIENTS_ONLY - OTHERWISE
    assert {f"VMHERD_{name.upper()}" for name in wanted} <= passed


def test_each_process_is_unprivileged_has_a_health_check_and_publishes_on_loopback_unless_told() -> None:
    for name, service in services().items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        for port in service.get("ports", ()):
            assert port.startswith(("127.0.0.1:", "${VMHERD_REDIS_BIND:-127.0.0.1}:", "${VMHERD_API_BIND:-127.0.0.1}:"))
        assert service["healthcheck"]["test"], name
        if service.get("image") == "vmherd":
            assert service["read_only"] is True, name
    assert "USER 10001:10001" in (REPOSITORY / "Dockerfile").read_text()


def test_those_that_ask_bmcs_have_the_agents_and_the_passwords_and_nobody_else_has_these() -> None:
    assert (
        "apt-get install --yes --no-install-recommends fence-agents ipmitool" in (REPOSITORY / "Dockerfile").read_text()
    )
    folder = "${VMHERD_SECRETS:-./secrets}:/etc/vmherd/secrets:ro"
    found = services()
    assert {name for name, service in found.items() if folder in service.get("volumes", ())} == {"api", "fencing"}
    with_variable = {name for name, service in found.items() if "BMC_PASSWORD" in service.get("environment", {})}
    assert with_variable == {"api", "fencing"}


def test_a_witness_has_the_priority_of_its_unit() -> None:
    unit = (REPOSITORY / "config/systemd/vmherd-witness.service").read_text()
    witness = services()["witness"]
    assert "CPUSchedulingPolicy=rr\nCPUSchedulingPriority=50\n" in unit
    assert "exec chrt --rr 50 vmherd" in witness["entrypoint"][2]
    assert witness["ulimits"] == {"rtprio": 50, "memlock": -1}


def test_the_image_is_given_no_secret() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert "VMHERD_" not in dockerfile
    allowed = (REPOSITORY / ".dockerignore").read_text().split()
    assert allowed[0] == "*", "all that is not named stays out"
    assert {"!.env", "!config"}.isdisjoint(allowed)
