"""The learning rate as a function of the step: integers in, one number out, no state to save."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from `peak / num_warmup_steps` to `peak`, then half a cosine down to `final_ratio * peak`.

    The last of `num_steps` steps has the lowest rate.
    """

    peak: float
    num_warmup_steps: int
    num_steps: int
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.num_warmup_steps <= self.num_steps:
            raise ValueError(
                f"warm-up must take between 0 and all of the {self.num_steps} steps, got {self.num_warmup_steps}"
            )
        if self.peak < 0 or not 0 <= self.final_ratio <= 1:
            raise ValueError(
                f"the peak must not be negative and the final ratio lie in [0, 1], got {self.peak} and "
                f"{self.final_ratio}"
            )

    def __call__(self, step_index: int) -> float:
        """Return the rate of step `step_index`, counted from 0."""
        if step_index < self.num_warmup_steps:
            return self.peak * (step_index + 1) / self.num_warmup_steps
        num_decay_steps = max(1, self.num_steps - 1 - self.num_warmup_steps)
        progress = min(1.0, (step_index - self.num_warmup_steps) / num_decay_steps)
        return self.peak * (self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
