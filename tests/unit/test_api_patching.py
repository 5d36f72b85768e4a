from typing import Any

import pytest

from orchestrator.api.patching import APPLY, JSON_PATCH, MERGE_PATCH, STRATEGIC, merge, read_patch, strategic_merge
from orchestrator.errors import BadRequest, Invalid, UnsupportedMediaType

NODE: dict[str, Any] = {
    "metadata": {"name": "h1", "labels": {"a": "1", "b": "2"}, "finalizers": ["x", "y"]},
    "spec": {"unschedulable": True, "taints": [{"key": "a", "effect": "NoSchedule"}]},
}


@pytest.mark.parametrize(
    ("document", "patch", "result"),
    [  # RFC 7396, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch(document: Any, patch: Any, result: Any) -> None:
    assert merge(document, patch) == result


@pytest.mark.parametrize(
    ("patch", "path", "result"),
    [
        ({"spec": {"unschedulable": None}}, "spec", {"taints": NODE["spec"]["taints"]}),
        ({"spec": {"taints": []}}, "spec", {"unschedulable": True, "taints": []}),
        ({"spec": {"$patch": "replace", "taints": []}}, "spec", {"taints": []}),
        ({"spec": {"$retainKeys": ["taints"], "taints": []}}, "spec", {"taints": []}),
        ({"metadata": {"labels": {"a": None, "c": "3"}}}, "labels", {"b": "2", "c": "3"}),
        ({"metadata": {"labels": {"$patch": "delete"}}}, "labels", {}),
        ({"metadata": {"finalizers": ["z"], "$setElementOrder/finalizers": ["z"]}}, "finalizers", ["x", "y", "z"]),
        ({"metadata": {"$deleteFromPrimitiveList/finalizers": ["x"]}}, "finalizers", ["y"]),
    ],
)
def test_strategic_merge(patch: dict[str, Any], path: str, result: Any) -> None:
    new = strategic_merge(NODE, patch)
    assert (new["spec"] if path == "spec" else new["metadata"][path]) == result
    assert NODE["spec"]["unschedulable"] is True, "what is patched stays as it was"


def test_an_unknown_directive_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"spec: unknown directive 'explode'"):
        strategic_merge(NODE, {"spec": {"$patch": "explode"}})


def test_json_patch() -> None:
    patch = read_patch(JSON_PATCH, [{"op": "add", "path": "/metadata/labels/c", "value": "3"}], takes_strategic=False)
    assert patch(NODE)["metadata"]["labels"] == {"a": "1", "b": "2", "c": "3"}
    assert NODE["metadata"]["labels"] == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    "operations",
    [
        [{"op": "replace", "path": "/nope/x", "value": 1}],
        [{"op": "remove", "path": "/metadata/finalizers/9"}],
        [{"op": "explode", "path": "/spec"}],
        [{"op": "add"}],
        [{"path": "/spec"}],
        [{"op": "replace", "path": "", "value": 3}],
        [{"op": "add", "path": 7, "value": 1}],
        [{"op": "move", "from": "/spec", "path": "/spec/taints/0"}],
        [{"op": "copy", "path": "/x"}],
    ],
)
def test_a_json_patch_that_does_not_fit_is_the_clients_error(operations: list[dict[str, Any]]) -> None:
    patch = read_patch(JSON_PATCH, operations, takes_strategic=False)
    with pytest.raises(BadRequest, match="JSON patch"):
        patch(NODE)


def test_a_failed_test_is_told_as_such() -> None:
    patch = read_patch(JSON_PATCH, [{"op": "test", "path": "/metadata/name", "value": "h2"}], takes_strategic=False)
    with pytest.raises(Invalid, match="test failed"):
        patch(NODE)


@pytest.mark.parametrize("body", [None, 1, {}, "x", [1], [None], [[]]])
def test_a_json_patch_is_a_list_of_operations(body: Any) -> None:
    with pytest.raises(BadRequest, match="list of operations"):
        read_patch(JSON_PATCH, body, takes_strategic=False)


@pytest.mark.parametrize("body", [None, 1, [], "x"])
def test_a_merge_patch_is_an_object(body: Any) -> None:
    with pytest.raises(BadRequest, match="is an object"):
        read_patch(f"{MERGE_PATCH}; charset=utf-8", body, takes_strategic=False)


@pytest.mark.parametrize("media_type", [APPLY, STRATEGIC, "text/plain", ""])
def test_what_is_not_taken_is_told_with_what_is(media_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="application/merge-patch"):
        read_patch(media_type, {}, takes_strategic=False)
    if media_type == STRATEGIC:
        assert read_patch(media_type, {"spec": {"taints": None}}, takes_strategic=True)(NODE)["spec"] == {
            "unschedulable": True
        }
