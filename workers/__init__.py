"""What runs on a node: the agent, the node's Celery workers, and the hypervisor port with its drivers."""
