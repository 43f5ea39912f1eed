"""Between ranks: the transport protocol and its implementations. The only place that calls a collective."""
