"""Lines of the log: one each, with what they are about, and no secret in any."""

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator

import pytest
import structlog

from orchestrator import logs
from orchestrator.settings import Settings

PASSWORD = "s3cret-pass/word"
URL = "redis://node-h1:s3cret-pass%2Fword@192.0.2.1:6379/0"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a process writes that was given a password."""
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    given = Settings(redis_url=URL, node="h1", log_format="json")  # type: ignore[arg-type]
    monkeypatch.setattr(logs, "settings", lambda: given)
    logs.configure("agent")
    yield said
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**config)


def read(said: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in said.getvalue().splitlines()]


def test_a_line_names_process_node_and_what_it_is_about_in_any_thread(lines: io.StringIO) -> None:
    log = structlog.get_logger("test")

    def in_a_thread() -> None:
        with logs.about(vm="default/a", operation="default/evict-a"):
            log.info("migration begins")
        log.info("idle")

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    first, second = read(lines)
    assert (first["process"], first["node"], first["vm"], first["operation"]) == (
        "agent",
        "h1",
        "default/a",
        "default/evict-a",
    )
    assert "vm" not in second


@pytest.mark.parametrize(
    "text",
    [
        f"no Redis at {URL}",
        "connecting to rediss://:s3cret-pass%2Fword@host/0 failed",
        f"AUTH default {PASSWORD}",
        f"<graphics type='vnc' passwd='{PASSWORD}'/>",
        "<auth><password>other-one</password></auth>",
        '{"password": "other-one", "user": "x"}',
        "Authorization: Bearer other-one.abc",
        "VMHERD_FLOWER_PASSWORD=other-one --port 1",
        "https://host/?token=other-one&x=1",
    ],
)
@pytest.mark.parametrize("way", ["event", "value", "nested", "library", "exception"])
def test_no_secret_is_logged_whatever_its_way(lines: io.StringIO, text: str, way: str) -> None:
    log = structlog.get_logger("test")
    match way:
        case "event":
            log.info(text)
        case "value":
            log.info("it failed", error=text, why=RuntimeError(text))
        case "nested":
            log.info("it failed", details={"where": [text]}, settings=("x", {"y": text}))
        case "library":
            logging.getLogger("celery").error("lost %s", text)
        case _:
            try:
                raise RuntimeError(text)  # noqa: TRY301 - to be logged with its traceback
            except RuntimeError:
                log.exception("unexpected")
    said = lines.getvalue()
    assert said.count("\n") == 1
    assert logs.MASK in said
    for secret in (PASSWORD, "s3cret-pass", "other-one"):
        assert secret not in said, said


@pytest.mark.parametrize(
    "field", ["password", "bmcPassword", "token", "api_key", "secret_value", "VMHERD_FLOWER_PASSWORD"]
)
def test_a_field_that_is_called_a_secret_is_masked(lines: io.StringIO, field: str) -> None:
    structlog.get_logger("test").info("made", **{field: "xyz", "spec": {field: "xyz"}})
    (line,) = read(lines)
    assert (line[field], line["spec"]) == (logs.MASK, {field: logs.MASK})


def test_what_is_no_secret_stays_as_it_is(lines: io.StringIO) -> None:
    about = {"operation": "default/evict-a", "node": "h2", "epoch": 7, "progress": 0.5, "cancel": False, "end": None}
    message = "qemu+tcp://192.0.2.11/system: 45 % of 192 MiB, tokens are not shown; a: b"
    structlog.get_logger("test").info("operation", **about, message=message, phase="Pending => InProgress")
    (line,) = read(lines)
    assert about.items() <= line.items()
    assert line["message"] == message
    assert line["phase"] == "Pending => InProgress"


def test_a_librarys_message_of_several_lines_is_one(lines: io.StringIO) -> None:
    logging.getLogger("celery").warning("first\nsecond")
    (line,) = read(lines)
    assert line["event"] == "first second"


def test_celerys_word_on_each_message_is_for_debugging_only(lines: io.StringIO) -> None:
    logging.getLogger("celery.app.trace").info("Task vmherd.reconcile[1] succeeded")
    assert lines.getvalue() == ""
    logging.getLogger("celery.app.trace").error("Task vmherd.reconcile[1] raised")
    assert len(read(lines)) == 1
