"""What runs a scenario: simulated time, processes, faults, checks. The scenarios themselves are the folders beside."""
