"""How one replica stands, as it says itself to those who route requests to it."""

from __future__ import annotations

from dataclasses import dataclass, field
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
