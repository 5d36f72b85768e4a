"""What people's programs need of the herd (the CLI, `Cluster`), on Redis itself or through the API.

`port.Client` is the seam. Two adapters fill it: `local.LocalClient` calls the services on Redis, with the control
plane's rights; `remote.RemoteClient` asks the API, with a token's. One contract suite runs over both
(`tests/contract/test_client.py`): the same answers, the same errors, the same order of changes.

Commands for the herd's own machines (run, enroll, tokens, adoption, simulation) have no place in it: they work on
Redis.
"""

from orchestrator.client.port import Client, Scope

__all__ = ["Client", "Scope"]
