"""`vmherd api`: the API server, in the foreground."""

from typing import Annotated

import typer

from orchestrator.settings import Settings, settings

EXAMPLES = """Examples:

$ vmherd api

$ vmherd api --address 0.0.0.0 --port 8080

"""


def api(
    address: Annotated[str, typer.Option(help="Where it listens (VMHERD_API_ADDRESS).", show_default=False)] = "",
    port: Annotated[int | None, typer.Option(help="Its port (VMHERD_API_PORT).", show_default=False)] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Without TLS: behind something that does it, or on loopback.")
    ] = False,
) -> None:
    """Serve the herd's API, which kubectl speaks. Run two or more, on any machines that reach Redis."""
    config = settings()
    given = {"api_address": address or None, "api_port": port, "api_tls": False if plain_http else None}
    config = config.model_copy(update={name: value for name, value in given.items() if value is not None})
    _serve(config)


def _serve(config: Settings) -> None:
    from orchestrator import logs, metrics  # noqa: PLC0415 - the other commands don't need these
    from orchestrator.api.app import create_app  # noqa: PLC0415
    from orchestrator.api.audit import Audit  # noqa: PLC0415
    from orchestrator.api.serving import Serving  # noqa: PLC0415
    from orchestrator.api.tls import ServerCertificate  # noqa: PLC0415
    from orchestrator.celery_app import CeleryMessenger, app  # noqa: PLC0415
    from orchestrator.services.context import Context  # noqa: PLC0415
    from orchestrator.store import Store  # noqa: PLC0415
    from orchestrator.store.connection import connect  # noqa: PLC0415

    logs.configure("api")
    metrics.serve("api")
    store = Store(connect(config.redis_url.get_secret_value(), retries=0), config)
    audit = Audit(store, config.audit_log, reads=config.audit_reads)
    tls = ServerCertificate(config, [config.api_address]) if config.api_tls else None
    ctx = Context(store, CeleryMessenger(app))
    served = create_app(ctx, audit, config)
    if config.console:
        from orchestrator.console.mounting import mount_console  # noqa: PLC0415 - a second, and much memory

        mount_console(served, ctx)
    Serving(served, config, tls).run()
