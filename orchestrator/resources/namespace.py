"""`Namespace`: a project. One exists because a resource is in it, or a person made it; `default` always does."""

from enum import StrEnum
from typing import ClassVar, Literal

from orchestrator.resources.meta import Model, Resource


class NamespacePhase(StrEnum):
    """Whether a project is in use."""

    ACTIVE = "Active"


class NamespaceStatus(Model):
    """What is known of a project."""

    phase: NamespacePhase = NamespacePhase.ACTIVE


class Namespace(Resource):
    """A project: names of VMs and operations are unique within one."""

    kind_name: ClassVar[str] = "Namespace"
    group_version: ClassVar[str] = "v1"
    plural: ClassVar[str] = "namespaces"
    short: ClassVar[str] = "ns"
    namespaced: ClassVar[bool] = False

    api_version: Literal["v1"] = "v1"
    kind: Literal["Namespace"] = "Namespace"
    status: NamespaceStatus = NamespaceStatus()
