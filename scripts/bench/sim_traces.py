"""Requests of a trace: when they arrive, for which model, how long they are. The same seed gives the same ones."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.sim_tables import Lengths


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace."""

    at: float
    model: str
    num_prompt_tokens: int
    num_tokens: int
    tenant: str = ""


def popularity(num_models: int, exponent: float) -> list[float]:
    """Return each model's share of the requests: Zipf's law, or equal ones where the exponent is 0."""
    weights = [(rank + 1) ** -exponent for rank in range(num_models)]
    return [weight / sum(weights) for weight in weights]


def trace(
    rates: dict[str, float],
    seconds: float,
    lengths: Lengths,
    seed: int,
    cv: float = 1.0,
    tenants: Sequence[str] = ("",),
) -> list[TraceRequest]:
    """Return the requests of all models by arrival; ``rates`` are requests a second of each.

    Times between a model's arrivals have the coefficient of variation ``cv``: 1 is Poisson, more is bursts (gamma).
    """
    found: list[TraceRequest] = []
    shape = 1 / cv**2
    for name, rate in rates.items():
        source = random.Random(f"{seed} {name}")
        at = source.gammavariate(shape, 1 / (rate * shape))
        while at < seconds:
            found.append(TraceRequest(at, name, *lengths(source), tenant=source.choice(tenants)))
            at += source.gammavariate(shape, 1 / (rate * shape))
    return sorted(found, key=lambda asked: (asked.at, asked.model))
