"""Between ranks: the transport protocol and its implementations. The only place that calls a collective."""

from typing import Literal

TransportName = Literal["auto", "peer", "hierarchical", "process_group"]
