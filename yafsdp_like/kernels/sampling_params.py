"""Parameters of sampling one request. Imports no torch, so that a command line is checked before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MIN_TEMPERATURE = 1e-3  # what is colder draws as 0 does; the inverse of much less makes scores overflow


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

    def numbers(self) -> tuple[float, ...]:
        """A row of `SamplingRows.numbers`."""
        inverse = 0.0 if self.temperature < _MIN_TEMPERATURE else 1 / self.temperature
        least = math.log(self.min_p) if self.min_p else -math.inf
        repetition = self.repetition_penalty
        return inverse, self.top_p, least, repetition, 1 / repetition, self.presence_penalty, self.frequency_penalty

    def integers(self, position: int, history_index: int = -1) -> tuple[int, ...]:
        """A row of `SamplingRows.integers`.

        Args:
            position: of the token to be drawn, in its sequence.
            history_index: the request's row of the history, if it `needs_history`.
        """
        return self.seed, position, self.top_k, history_index
