"""The engine: requests in, outputs out, a step at a time."""
