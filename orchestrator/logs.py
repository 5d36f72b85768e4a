"""Logging: one line per transition, `old => new`, for people on a terminal and as JSON elsewhere.

Each line names its process, and in a worker's threads the operation and the VM that they are about (`about`). Secrets
are masked in all that is logged, libraries' lines and tracebacks included: a password in a URL, what a field is called
that holds one, secrets in a domain's XML, and wherever they stand the very secrets that this process was given.
"""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import structlog

from orchestrator.settings import settings

MASK: Final = "***"
_SHORTEST_SECRET: Final = 4
"""A given secret that is shorter is not looked for: it would be found everywhere, and is none."""
_SECRET_WORDS: Final = r"[\w.-]{0,40}(?:passw(?:or)?d|secret|token|api[-_]?key|authorization|credential)[\w.-]{0,40}"  # noqa: S105
_SECRET_FIELD: Final = re.compile(_SECRET_WORDS, re.IGNORECASE)
_PATTERNS: Final = (
    # redis://user:password@host, also with nobody as the user
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@'\"]*):[^\s@'\"]+@", re.IGNORECASE), rf"\1:{MASK}@"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{4,}", re.IGNORECASE), rf"\1 {MASK}"),
    # <secret ...>text</secret>, <password>text</password>
    (re.compile(rf"(<({_SECRET_WORDS})(?:\s[^>]*)?>)[^<]+(</\2>)", re.IGNORECASE), rf"\1{MASK}\3"),
    # passwd='x', "password": "x", token=x
    (re.compile(rf"(\b{_SECRET_WORDS}[\"']?\s*[=:]\s*)([\"'])(?:(?!\2).)+\2", re.IGNORECASE), rf"\1\2{MASK}\2"),
    (re.compile(rf"(\b{_SECRET_WORDS}=)[^\s\"'&,;<>*]+", re.IGNORECASE), rf"\1{MASK}"),
)

Line = structlog.typing.EventDict


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
    always = {"process": process, **({"node": settings().node} if settings().node else {})}

    def add_process(_logger: Any, _method: str, line: Line) -> Line:
        return {**always, **line}

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_process,  # not in the context, which threads that were begun before don't see
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        masking(*_given_secrets()),
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
    if root.level > logging.DEBUG:
        # Celery tells of each message that it came and went, ticks included: no transition of anything.
        for name in ("celery.worker.strategy", "celery.app.trace"):
            logging.getLogger(name).setLevel(max(root.level, logging.WARNING))


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """Give a logger; it may be made before `configure` is called."""
    log: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return log


@contextmanager
def about(**names: str) -> Iterator[None]:
    """Put names (`vm`, `operation`, `order`) on each line that this thread logs meanwhile."""
    with structlog.contextvars.bound_contextvars(**names):
        yield


def masking(*secrets: str) -> structlog.typing.Processor:
    """Make a processor that masks secrets in a line's event and values, and puts its event on one line.

    Args:
        secrets: Masked wherever they stand.
    """
    known = sorted((secret for secret in secrets if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)

    def masked_text(text: str) -> str:
        for secret in known:
            text = text.replace(secret, MASK)
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        return text

    def masked(name: str, value: Any) -> Any:
        match value:
            case bool() | int() | float() | None:
                return value
            case str() if value and _SECRET_FIELD.fullmatch(name):
                return MASK
            case str():
                return masked_text(value)
            case dict():
                return {key: masked(str(key), item) for key, item in value.items()}
            case list() | tuple() | set() | frozenset():
                return [masked(name, item) for item in value]
            case _:
                return masked_text(str(value))

    def mask(_logger: Any, _method: str, line: Line) -> Line:
        result = {key: value if key.startswith("_") else masked(key, value) for key, value in line.items()}
        if isinstance(result.get("event"), str):
            result["event"] = " ".join(result["event"].split("\n"))
        return result

    return mask


def _given_secrets() -> list[str]:
    """The secrets that this process was given, as they are and as they stand in a URL."""
    config = settings()
    in_url = urlsplit(config.redis_url.get_secret_value()).password or ""
    others = (config.flower_password, config.token)
    return [secret for secret in (in_url, unquote(in_url), *(it.get_secret_value() for it in others)) if secret]
