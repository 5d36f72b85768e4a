"""Intake: reads the nodes' report streams and commits what they say.

Any number may run. The cursor of a stream moves in the same commit as what was read, so each report counts once; an
intake that lost the race reads the cursors again. It waits on all streams at once and is woken by any of them.
"""

import json
import signal
import threading
from datetime import datetime
from types import FrameType
from typing import Any, cast

from orchestrator.errors import Conflict, StoreUnavailable
from orchestrator.logs import logger
from orchestrator.metrics import REPORTS, REPORTS_LOST
from orchestrator.resources import Node
from orchestrator.services.context import Context
from orchestrator.services.reports import take_report
from orchestrator.store import keys
from orchestrator.store.access import enrolled
from orchestrator.store.connection import read_streams, redis_errors
from orchestrator.store.node_store import Report

log = logger(__name__)

_BLOCK_MS = 1000
_BATCH = 100
_RETRY_S = 0.5
_NODES_EVERY_S = 2.0


class Intake:
    """Reads all nodes' reports until it is stopped."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.stopped = threading.Event()
        self._nodes: set[str] = set()
        self._nodes_read_at = float("-inf")

    def run(self) -> None:
        """Read for ever; outages of Redis are waited out."""
        while not self.stopped.is_set():
            try:
                self.round()
            except StoreUnavailable as error:
                log.warning("intake lost Redis", error=str(error))
                self.stopped.wait(_RETRY_S)
            except Conflict as error:
                log.warning("intake lost a race too often", error=str(error))

    def round(self) -> int:
        """Wait for reports and take those that are there.

        Returns:
            How many were taken.
        """
        redis = self.ctx.store.redis
        self._find_nodes()
        if not self._nodes:
            self.stopped.wait(_RETRY_S)
            return 0
        with redis_errors(redis):
            cursors = cast("dict[str, str]", redis.hgetall(keys.CURSORS))
            wanted = {keys.reports(node): cursors.get(node, "0-0") for node in sorted(self._nodes)}
            answer = redis.xread(wanted, count=_BATCH, block=_BLOCK_MS)  # type: ignore[arg-type]
        if not answer:
            return 0
        at, taken = self.ctx.store.now(), 0
        for stream, entries in read_streams(answer):
            node = stream[len("node:{") : stream.index("}")]
            cursor = cursors.get(node, "")
            for entry_id, fields in entries:
                number = int(entry_id.partition("-")[0])
                if cursor and number != int(cursor.partition("-")[0]) + 1:
                    # The stream is bounded: older reports were dropped. The node's next listing makes up for them.
                    log.warning("reports were lost", node=node, after=cursor, before=entry_id)
                    REPORTS_LOST.inc()
                if not self._take(node, number, fields, cursor, at):
                    break  # another intake is at this stream
                cursor = entry_id
                taken += 1
                REPORTS.labels("taken").inc()
        return taken

    def _take(self, node: str, number: int, fields: dict[str, str], cursor: str, at: datetime) -> bool:
        try:
            report = Report(number, fields["kind"], _read_body(fields["body"]))
            return take_report(self.ctx, node, report, cursor, at)
        except (StoreUnavailable, Conflict):
            raise
        except Exception as error:  # noqa: BLE001 - one node's report must not end the intake of all
            # A node can write anything into its own stream. What can't be read is dropped, and said.
            log.error("unreadable report dropped", node=node, number=number, error=repr(error))
            REPORTS.labels("unreadable").inc()
            return take_report(self.ctx, node, Report(number, "Unreadable", {}), cursor, at)

    def _find_nodes(self) -> None:
        """Learn of nodes: those registered, and those enrolled that have not reported yet."""
        if self.ctx.clock.monotonic() - self._nodes_read_at < _NODES_EVERY_S:
            return
        self._nodes = {*self.ctx.store.names(Node), *enrolled(self.ctx.store.redis)}
        self._nodes_read_at = self.ctx.clock.monotonic()


def _read_body(text: str) -> dict[str, Any]:
    """Read a report's JSON.

    Raises:
        TypeError: It is no object.
        ValueError: It is no JSON, or has something that a document must not have: NaN, infinity, or half of a
            surrogate pair, which JSON can say and no reader of the document would take.
    """
    body = json.loads(text, parse_constant=_refuse)
    if not isinstance(body, dict):
        raise TypeError(f"a report is an object, not {type(body).__name__}")
    if "\\u" in text:
        json.dumps(body, ensure_ascii=False).encode()
    return body


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def main(ctx: Context) -> None:
    """Run one intake until SIGTERM or SIGINT."""
    intake = Intake(ctx)

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        intake.stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("intake ready")
    intake.run()
