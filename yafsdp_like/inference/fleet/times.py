"""How long prompts and steps of one model take: a line through what was measured, corrected by the steps that are made.

[Note: lines]
A step that decodes ``B`` sequences with ``T`` tokens of context in all takes ``base + B * row + T * key`` seconds, and
prompts of ``T`` tokens ``base + T * row``: Aegaeon's artifact (``aegaeon/estimator.py``) fits the same. A scale of
each, learned from the steps that are made, corrects what another device or other kernels make of it: the first step
sets it, and none after it changes it by much.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

_WEIGHT = 0.1  # of the last step in what is learned
_RATIOS = 0.25, 4.0  # of what is predicted: the least and most that a step may say


@dataclass(frozen=True)
class StepLines:
    """Seconds of prompts and of steps that decode, see [Note: lines]. Raises ValueError for a step of no time."""

    decode_base_s: float
    decode_row_s: float = 0.0  # for each sequence
    decode_key_s: float = 0.0  # for each token of context
    prefill_base_s: float = 0.0
    prefill_row_s: float = 0.0  # for each token of a prompt

    def __post_init__(self) -> None:
        if self.decode_base_s <= 0 or min(vars(self).values()) < 0:
            raise ValueError(f"expected a decode_base_s above 0 and nothing below 0, found {self}")

    def decode_s(self, num_rows: int, num_keys: int = 0) -> float:
        """Return the seconds of a step that decodes ``num_rows`` sequences, ``num_keys`` tokens of context in all."""
        return self.decode_base_s + num_rows * self.decode_row_s + num_keys * self.decode_key_s

    def prefill_s(self, num_tokens: int) -> float:
        """Return the seconds of a step that computes ``num_tokens`` of prompts."""
        return self.prefill_base_s + num_tokens * self.prefill_row_s


@dataclass
class LearnedTimes:
    """What steps of one model are expected to take, and how many tokens a request draws."""

    lines: StepLines
    decode_scale: float = 1.0
    prefill_scale: float = 1.0
    num_drawn: float | None = None  # of requests that have ended, on average; None before the first
    _counts: Counter[str] = field(default_factory=Counter, repr=False)  # of what was learned from

    def decode_s(self, num_rows: int, num_keys: int = 0) -> float:
        """Return the expected seconds of a step that decodes; see ``StepLines``."""
        return self.decode_scale * self.lines.decode_s(num_rows, num_keys)

    def prefill_s(self, num_tokens: int) -> float:
        """Return the expected seconds of a step of prompts."""
        return self.prefill_scale * self.lines.prefill_s(num_tokens) if num_tokens else 0.0

    def learn_decode(self, num_rows: int, num_keys: int, seconds: float) -> None:
        """Correct the scale by a step that only decoded."""
        found = seconds / self.lines.decode_s(num_rows, num_keys)
        self.decode_scale = self._learned("decode", self.decode_scale, found)

    def learn_prefill(self, num_tokens: int, seconds: float) -> None:
        """Correct the scale by a step of prompts; one of no predicted time says nothing."""
        expected = self.lines.prefill_s(num_tokens)
        if expected > 0:
            self.prefill_scale = self._learned("prefill", self.prefill_scale, seconds / expected)

    def learn_length(self, num_drawn: int) -> None:
        """Count the tokens that an ended request has drawn."""
        self._counts["length"] += 1
        mean = num_drawn if self.num_drawn is None else self.num_drawn
        self.num_drawn = mean + (num_drawn - mean) / min(self._counts["length"], 100)

    def _learned(self, kind: str, scale: float, found: float) -> float:
        """Return a scale that a step corrects."""
        self._counts[kind] += 1
        if self._counts[kind] == 1:
            return found
        low, high = _RATIOS
        return scale + _WEIGHT * (min(max(found, low * scale), high * scale) - scale)
