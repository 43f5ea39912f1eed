"""The engine: requests in, events out, a step at a time."""
