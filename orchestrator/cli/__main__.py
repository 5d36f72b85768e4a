"""`python -m orchestrator.cli`: the same as the command `vmherd`."""

from orchestrator.cli import main

main()
