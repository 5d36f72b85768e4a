"""vmherd's tests, from fast (`unit`) to real (`lab`)."""
