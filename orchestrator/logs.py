"""Logging: one line per transition, `old => new`, for people on a terminal and as JSON elsewhere."""

import logging
import sys

import structlog

from orchestrator.settings import settings


def configure(process: str) -> None:
    """Set up structlog and the standard library's logging for one process; lines go to standard error.

    Args:
        process: Put on each line, for example `intake`.
    """
    form = settings().log_format
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "json"
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if form == "console"
        else structlog.processors.JSONRenderer()
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processor=renderer, foreign_pre_chain=shared, keep_exc_info=False, keep_stack_info=False
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings().log_level.upper())
    structlog.contextvars.bind_contextvars(process=process, **({"node": settings().node} if settings().node else {}))


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """Give a logger; it may be made before `configure` is called."""
    log: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return log
