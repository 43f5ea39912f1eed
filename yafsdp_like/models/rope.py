"""Rotary positions: tables of cosines and sines, how they turn a head, and how frequencies stretch to longer texts.

Owns formulas and their constants. It must not know of models, modules or checkpoints.

Shapes: T tokens, H head dim.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor`.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023,
    equation 4.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_at_least_one("factor", self.factor)

    amplitude = 1.0

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale the frequencies (H / 2,) of base `theta`."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies divided by `factor`, fast ones kept, a linear blend in r between: the scheme of Llama 3.1.

    r = original_seq_len * frequency / 2 pi counts a frequency's turns over the original length; it is slow below
    `slow_turns` and fast above `fast_turns`. Source: `apply_scaling` in Meta's `llama_models` reference code
    (there `low_freq_factor` and `high_freq_factor`).
    """

    factor: float
    slow_turns: float
    fast_turns: float
    original_seq_len: int

    amplitude = 1.0

    def __post_init__(self) -> None:
        _check_at_least_one("factor", self.factor)
        _check_at_least_one("original_seq_len", self.original_seq_len)
        if not 0 < self.slow_turns < self.fast_turns:
            raise ValueError(f"expected 0 < slow_turns < fast_turns, got {self.slow_turns} and {self.fast_turns}")

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale the frequencies (H / 2,) of base `theta`."""
        turns = self.original_seq_len * frequencies / (2 * math.pi)
        kept = ((turns - self.slow_turns) / (self.fast_turns - self.slow_turns)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class YarnScaling:
    """As `Llama3Scaling`, but blended linearly over the frequencies' indices, with larger cosines and sines.

    Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023, section 3.2; the index of
    the frequency that turns `n` times over the original length L is H ln(L / 2 pi n) / (2 ln theta), rounded outwards
    if `truncate`.
    Scores are multiplied by (0.1 ln factor + 1)^2 (section 3.4), here by as much in each of query and key, unless
    `attention_factor` says otherwise.
    """

    factor: float
    original_seq_len: int
    slow_turns: float = 1.0
    fast_turns: float = 32.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_at_least_one("factor", self.factor)
        _check_at_least_one("original_seq_len", self.original_seq_len)
        if not 0 < self.slow_turns < self.fast_turns:
            raise ValueError(f"expected 0 < slow_turns < fast_turns, got {self.slow_turns} and {self.fast_turns}")

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines."""
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """Scale the frequencies (H / 2,) of base `theta`."""
        head_dim = 2 * len(frequencies)
        first, last = (self._index(turns, head_dim, theta) for turns in (self.fast_turns, self.slow_turns))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        indices = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
        stretched = ((indices - first) / max(last - first, 1e-3)).clamp(0, 1)
        return stretched * frequencies / self.factor + (1 - stretched) * frequencies

    def _index(self, turns: float, head_dim: int, theta: float) -> float:
        return head_dim * math.log(self.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))


RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class Rope:
    """Which angle each pair of a head's elements turns by per position: position * theta^(-2 i / H), then scaled.

    Su et al., "RoFormer", 2021, section 3.4.2.
    """

    head_dim: int
    theta: float
    scaling: RopeScaling | None = None

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, H) of positions (T,), in `dtype` and on their device.

        Computed in fp32 once a forward, a handful of small kernels: a table kept on a module would be lost by
        `to_empty`, and one cached at first use may be a fake tensor or one of inference mode.
        """
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        frequencies = 1.0 / self.theta**exponents
        amplitude = 1.0
        if self.scaling is not None:
            frequencies, amplitude = self.scaling.stretch(frequencies, self.theta), self.scaling.amplitude
        angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
        return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, heads, T, H) by the angles of its positions; element i is paired with element i + H / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _check_at_least_one(name: str, value: float) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
