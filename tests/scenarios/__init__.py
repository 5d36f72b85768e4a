"""Scenarios: the real services, agents and workers over simulated hosts, in simulated time; README.md says how."""
