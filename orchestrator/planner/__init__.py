"""Pure decisions: same input, same output, no clock and no I/O. Results carry their reasons."""
