"""The takeover rules as models that are searched to exhaustion; docs/adr/0018-takeover.md says what they showed."""
