"""Parameters of sampling one request. Imports no torch, so that a command line is checked before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

MAX_LOGPROBS = 20  # most probable tokens at each position whose log-probabilities a request may ask for
MAX_BIASES = 512  # tokens whose logits a request may raise or lower
_MIN_TEMPERATURE = 1e-3  # what is colder draws as 0 does; the inverse of much less makes scores overflow


class SamplingFloats(NamedTuple):
    """The float32 columns of a row that `kernels.sampling.sample` reads."""

    inverse_temperature: float  # 0: draw the most probable token
    top_p: float
    log_min_p: float  # -inf: none
    repetition: float
    inverse_repetition: float
    presence: float
    frequency: float


class SamplingInts(NamedTuple):
    """The int64 columns of a row that `kernels.sampling.sample` reads."""

    seed: int
    position: int  # of the token to be drawn, in its sequence
    top_k: int  # 0: all
    history_row: int  # -1: none


@dataclass(frozen=True)
class SamplingParams:
    """How one request draws its tokens. The defaults draw from the model's own distribution.

    Raises ValueError for a number out of its range.
    """

    temperature: float = 1.0  # 0, or below a thousandth: always the most probable token
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # in [0, 1]
    repetition_penalty: float = 1.0  # of tokens of the prompt too; above 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # any integer of 64 bits

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "finite"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "finite"),
            ("seed", -(2**63) <= self.seed < 2**63, "a signed integer of 64 bits"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def needs_history(self) -> bool:
        """Whether scores depend on what was said before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def floats(self) -> SamplingFloats:
        """Return this request's row of `SamplingRows.floats`."""
        return SamplingFloats(
            inverse_temperature=0.0 if self.temperature < _MIN_TEMPERATURE else 1 / self.temperature,
            top_p=self.top_p,
            log_min_p=math.log(self.min_p) if self.min_p else -math.inf,
            repetition=self.repetition_penalty,
            inverse_repetition=1 / self.repetition_penalty,
            presence=self.presence_penalty,
            frequency=self.frequency_penalty,
        )

    def ints(self, position: int, history_row: int = -1) -> SamplingInts:
        """Return this request's row of `SamplingRows.ints`.

        Args:
            position: of the token to be drawn, in its sequence.
            history_row: the request's row of the history, if it `needs_history`.
        """
        return SamplingInts(self.seed, position, self.top_k, history_row)
