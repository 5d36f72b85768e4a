"""Services: load, decide, commit, then send. A lost compare-and-set means: load again and decide again."""
