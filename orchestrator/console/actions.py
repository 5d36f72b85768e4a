"""What can be done from the console: each asks for the session's rights when it is clicked, and leaves its audit entry.

Buttons that somebody may not use are not drawn, but that is a courtesy: what counts is here. Pages call these methods,
and so does a POST to `/console/actions`, which is how the refusals are seen from outside.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orchestrator.api.access import Access
from orchestrator.api.errors import CODES, status_of
from orchestrator.api.limits import read_body
from orchestrator.api.mirror import Mirror
from orchestrator.api.rights import Identity, is_allowed
from orchestrator.console.rows import OFFERED
from orchestrator.console.sessions import Session, Sessions
from orchestrator.errors import BadRequest, Invalid, Refused, VmherdError
from orchestrator.logs import logger
from orchestrator.planner.drain import DrainPlan
from orchestrator.resources import NodeDrain, OperationType, VirtualMachineOperation, make_key
from orchestrator.resources.drain import DrainSpec
from orchestrator.resources.vmop import MigrateTo
from orchestrator.services import drain_plans, drains, nodes
from orchestrator.services.context import Context
from orchestrator.services.operations import create_operation, delete_operation, new_operation

T = TypeVar("T")
log = logger(__name__)

_OPERATIONS: Final = "virtualmachineoperations"
_DRAINS: Final = "nodedrains"
_UNCORDON: Final = "nodes/uncordon"
_LARGEST_BODY: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class Right:
    """One right, and what it is asked for, as the audit log has it.

    Attributes:
        resource: In the plural.
        namespace: None: of no namespace.
    """

    verb: str
    resource: str
    namespace: str | None
    name: str


class Actions:
    """Does what people click.

    Args:
        ctx: To work with.
        access: Knows rights, keeps the audit log.
        mirror: The server's copy.
        sessions: Known sessions.
    """

    def __init__(self, ctx: Context, access: Access, mirror: Mirror, sessions: Sessions) -> None:
        self._ctx = ctx
        self._access = access
        self._mirror = mirror
        self._sessions = sessions
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="console")

    async def operate(
        self, session: Session, namespace: str, vm: str, kind: OperationType, target: str = "", source: str = ""
    ) -> VirtualMachineOperation:
        """Ask for an operation on a VM.

        Args:
            session: Whose click it is.
            namespace: The VM's.
            vm: Its name.
            kind: One of `OFFERED`.
            target: Of a Migrate; empty leaves it to the planner.
            source: The client's address, for the audit log.

        Raises:
            Unauthorized: The session has ended.
            Forbidden: Its token has not the right.
            VmherdError: As admission says.
        """
        to = MigrateTo(node_name=target) if kind is OperationType.MIGRATE and target else None
        wanted = new_operation(vm, kind, namespace, migrate=to)
        right = Right("create", _OPERATIONS, namespace, wanted.metadata.generate_name)
        return await self._do(session, (right,), lambda _: create_operation(self._ctx, wanted), source)

    async def abort(
        self, session: Session, namespace: str, operation: str, source: str = ""
    ) -> VirtualMachineOperation:
        """Abort an operation; raises as `operate`."""
        right = Right("delete", _OPERATIONS, namespace, operation)
        key = make_key(operation, namespace)
        return await self._do(session, (right,), lambda _: delete_operation(self._ctx, key), source)

    async def plan(self, session: Session, node: str) -> DrainPlan:
        """Plan how a node would be emptied; raises as `operate`."""
        identity = (await self._sessions.renewed(session)).identity
        for right in _emptying(node):
            self._access.check(identity, right.verb, right.resource, right.namespace)
        return await self._in_thread(lambda: self._plan(node, identity))

    async def drain(self, session: Session, node: str, *, partial: bool = False, source: str = "") -> NodeDrain:
        """Cordon a node and have it emptied.

        Args:
            session: Whose click it is.
            node: Its name.
            partial: Do what can be done, though some VMs have no place.
            source: The client's address.

        Raises:
            VmherdError: As `operate`; `Refused` where some VMs have no place.
        """

        def begin(identity: Identity) -> NodeDrain:
            problem = self._plan(node, identity).problem()
            if problem and not partial:
                raise Refused(f"{node} can't be emptied: {problem}")
            return drains.begin(self._ctx, node, _drain_of(identity))

        return await self._do(session, _emptying(node), begin, source)

    async def uncordon(self, session: Session, node: str, source: str = "") -> bool:
        """Let a node take VMs again, which ends its drain; tells whether that is new. Raises as `operate`."""
        right = Right("create", _UNCORDON, None, node)
        return await self._do(
            session, (right,), lambda _: nodes.set_unschedulable(self._ctx, node, unschedulable=False), source
        )

    async def answer(self, request: Request, session: Session) -> Response:
        """Answer a POST: an object with `action`, and what that takes."""
        source = request.client.host if request.client is not None else ""
        try:
            asked = _read(await read_body(request, _LARGEST_BODY))
            done = await self._by_name(session, asked, source)
        except Exception as error:
            status = status_of(error)
            if status["code"] == CODES["InternalError"]:
                log.error("an action failed", exc_info=error)
            return JSONResponse(status, status["code"])
        return JSONResponse(done, 201)

    async def _by_name(self, session: Session, asked: Mapping[str, str], source: str) -> dict[str, Any]:
        action, namespace, name = asked.get("action", ""), asked.get("namespace", ""), asked.get("name", "")
        kind = next((kind for kind in OFFERED if kind.value == action), None)
        if kind is not None:
            made = await self.operate(session, namespace, name, kind, asked.get("target", ""), source)
            return {"operation": made.name}
        match action:
            case "Abort":
                return {"operation": (await self.abort(session, namespace, name, source)).name}
            case "Cordon + Drain":
                begun = await self.drain(session, name, partial=asked.get("partial") == "true", source=source)
                return {"drain": begun.name}
            case "Uncordon":
                return {"changed": await self.uncordon(session, name, source)}
            case _:
                raise BadRequest(f"action: {action[:40]!r} is none")

    def _plan(self, node: str, identity: Identity) -> DrainPlan:
        return drain_plans.plan(self._ctx, [node], _drain_of(identity), self._mirror.herd())

    async def _do(self, session: Session, rights: tuple[Right, ...], work: Callable[[Identity], T], source: str) -> T:
        """Do something if the session has all rights to it, now; what came of it is kept with the first of them."""
        identity, named = session.identity, rights[0]
        outcome, message, name = 201, "", named.name
        try:
            identity = (await self._sessions.renewed(session)).identity
            for right in rights:
                self._access.check(identity, right.verb, right.resource, right.namespace)
            done = await self._in_thread(lambda: work(identity))
            name = getattr(done, "name", name)
        except Exception as error:
            outcome = status_of(error)["code"]
            message = str(error) if isinstance(error, VmherdError) else type(error).__name__
            raise
        finally:
            self._access.audit(
                identity, named.verb, named.resource, named.namespace, name, outcome, message=message, source=source
            )
        await self._mirror.newest()
        return done

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def may_operate(identity: Identity, namespace: str) -> bool:
    """Whether somebody may ask for operations in a namespace: else their buttons are not drawn."""
    return is_allowed(identity, "create", _OPERATIONS, namespace)


def may_empty(identity: Identity) -> bool:
    """Whether somebody may cordon and drain nodes."""
    return all(is_allowed(identity, right.verb, right.resource, right.namespace) for right in _emptying(""))


def _emptying(node: str) -> tuple[Right, ...]:
    """What a drain takes through the API too."""
    return (Right("create", _DRAINS, None, node),)


def _drain_of(identity: Identity) -> DrainSpec:
    return DrainSpec(requested_by=f"{identity.name} (console)")


def _read(body: bytes) -> dict[str, str]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise BadRequest("the body is no JSON") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise Invalid("the body is an object of texts")
    return found
