"""How one replica stands, as it says itself to those who route requests to it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ModelStanding:
    """How one model of a replica stands."""

    num_requests: int  # under way
    wake_s: float  # until its weights are on the device; inf: it could not be loaded
    prompt_token_s: float  # of computing a token of a prompt
    request_load: float  # what one request more takes of the replica's time


@dataclass(frozen=True)
class Standing:
    """How a replica stands: what its time goes to, and its models by name."""

    load: float  # the share of its time that models at work take, 1: all
    models: Mapping[str, ModelStanding]
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of models, and adapters
    number: int = 0  # of the report: a later one has a higher number
    # The number of the last request of each sender that it counts.
    arrived: Mapping[str, int] = field(default_factory=dict)

    def with_at_least(self, num_requests: Mapping[str, int]) -> Standing:
        """Return this with at least ``num_requests`` of each model under way, by any of the model's names.

        A request that has arrived is read and tokenized before it is in the queues that a standing is made from.
        """
        counts = Counter[str]()
        for name, count in num_requests.items():
            counts[self.aliases.get(name, name)] += count
        models, load = dict(self.models), self.load
        for name, count in counts.items():
            if name in models and (num_more := count - models[name].num_requests) > 0:
                load += num_more * models[name].request_load
                models[name] = replace(models[name], num_requests=count)
        return replace(self, load=load, models=models)
