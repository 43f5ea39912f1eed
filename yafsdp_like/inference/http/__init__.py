"""The HTTP interface. Needs the `serve` extra."""
