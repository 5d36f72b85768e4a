"""Celery, set up as `docs/adr` and the measurements behind it say: messages trigger, Redis documents decide.

Early acknowledgement and no prefetch: what a killed worker had taken is found by reconcile within seconds, where a
visibility timeout would have to exceed the longest migration. No gossip, no mingle, no remote control, JSON only.
"""

import ssl
from typing import Any

import kombu.exceptions
import redis
from celery import Celery
from kombu import Exchange, Queue

from orchestrator import queues
from orchestrator.logs import logger
from orchestrator.queues import Message
from orchestrator.settings import settings
from orchestrator.store.access import unacked_prefix

log = logger(__name__)

_VISIBILITY_TIMEOUT_S = 86_400
"""Far beyond any task; acknowledgement is early, so it never matters."""


def make_app(name: str, *, node: str = "", role: str = "", url: str = "") -> Celery:
    """Make a Celery app that speaks to the herd's Redis.

    Args:
        name: For logs.
        node: The node whose worker this is; empty for the control plane.
        role: `migrate` or `lifecycle`, on a node.
        url: Of the herd's Redis; by default the settings' one.
    """
    broker = broker_url(url or settings().redis_url.get_secret_value())
    app = Celery(name, broker=broker, backend=None if node else broker, set_as_current=False)
    transport: dict[str, Any] = {
        "visibility_timeout": _VISIBILITY_TIMEOUT_S,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 1,
        "socket_timeout": 5,
        "health_check_interval": 5,
        "priority_steps": [0],
    }
    if not broker.startswith("redis+socket"):
        transport |= {"socket_connect_timeout": 3, "socket_keepalive": True}
    if node:
        prefix = unacked_prefix(node, role)
        transport |= {
            "unacked_key": prefix,
            "unacked_index_key": f"{prefix}_index",
            "unacked_mutex_key": f"{prefix}_mutex",
        }
    if broker.startswith("rediss://"):
        tls = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
        app.conf.update(broker_use_ssl=tls, redis_backend_use_ssl=tls)
    app.conf.update(
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        task_ignore_result=True,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        result_expires=86_400,
        result_backend_always_retry=True,
        task_reject_on_worker_lost=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,
        worker_send_task_events=True,
        task_send_sent_event=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_publish_retry_policy={"max_retries": 0},
        broker_transport_options=transport,
        redis_socket_timeout=5,
        redis_socket_connect_timeout=3,
        redis_retry_on_timeout=False,
        task_default_queue=queues.CONTROL,
        task_create_missing_queues=True,
        enable_utc=True,
        timezone="UTC",
    )
    return app


def declare(app: Celery, *names: str) -> None:
    """Give an app the queues that it consumes."""
    app.conf.task_queues = [Queue(name, Exchange(name, type="direct"), routing_key=name) for name in names]


def broker_url(url: str) -> str:
    """Give a Redis URL in the form that kombu takes: it calls Unix sockets `redis+socket://`."""
    if not url.startswith("unix://"):
        return url
    return "redis+socket://" + url.removeprefix("unix://").replace("?db=", "?virtual_host=")


class CeleryMessenger:
    """Sends messages through a Celery app."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def send(self, message: Message) -> None:
        """Send a message, or log why it could not be sent; reconcile sends it again."""
        try:
            self._app.send_task(message.task.value, args=message.args, queue=message.queue, ignore_result=True)
        except (kombu.exceptions.OperationalError, redis.exceptions.RedisError, OSError) as error:
            log.warning("message not sent", task=message.task.value, queue=message.queue, error=str(error))

    def finish(self, task_id: str, result: dict[str, Any]) -> None:
        """Store the result of a task that ended without one, and tell Flower that it ended."""
        try:
            self._app.backend.store_result(task_id, result, "SUCCESS")
            with self._app.events.default_dispatcher() as dispatcher:
                dispatcher.send("task-succeeded", uuid=task_id, result=repr(result), runtime=0)
        except (kombu.exceptions.OperationalError, redis.exceptions.RedisError, OSError) as error:
            log.warning("result not stored", task_id=task_id, error=str(error))


app = make_app("vmherd")
app.set_default()
declare(app, queues.CONTROL, queues.LIVENESS, queues.FENCING)
app.conf.include = ["orchestrator.tasks"]
