"""The Kubernetes-shaped HTTP API: people's own `kubectl` manages the herd through it; no Kubernetes runs anywhere.

Each server follows the change stream into a copy in memory (`mirror`) and answers get, list and watch from it. Writes
go through the services, as those of every other way in. Any number of servers may run.
"""
