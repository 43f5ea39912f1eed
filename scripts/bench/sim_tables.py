"""What simulated models and devices take, and how long requests are: small tables, each with its source.

H800: the profiles of Aegaeon's artifact (SOSP 2025; GitHub Zyyeric/Aegaeon at ca8caccf, ``aegaeon/profiles/MODEL/
H800``), about 90 measured batches of each model, fitted by least squares as its ``estimator.py`` does: prompts by their
tokens (its term with squares, below 0 for two of three, is left out), steps that decode by sequences and tokens of
context. Weights and bytes of keys and values follow from the models' published shapes in bf16; 60, 20 and 20 % of
models are Qwen2.5-7B, Yi-1.5-9B and Llama-2-13B as in ``models.py``. Of 80 GiB, 56 GB are for weights and 20 for keys
and values, which is assumed. A switch takes what this project's pool takes, the bytes that are missing at the measured
rate of the link; or, in comparison, 15 % of 64 GiB/s for all bytes, as the artifact's scheduler estimates it.

H200: this project's own measurements: decoding by the 8B shape from ``2026-11-23-h200x2-8b-serve.json`` (its line
through batches of 1 to 128, keys and values at the 4.25 TB/s that copies reach), prompts at its 36,676 tokens/s, the
link from ``2026-11-29-h200-pool.json``. The 3B and 1B shapes have no curve of their own: the 8B shape's times the ratio
of their weights, which decoding reads, is assumed.

Lengths: ``published`` are 21 quantiles of prompts and outputs of the artifact's traces (``sim/simdata/
synth-*-0.1-1.0-1.0.csv``, made of ShareGPT; the longest 1 % of prompts are cut at the 99th percentile), drawn
independently (their correlation is 0.02); ``sharegpt`` is log-normal with the means that vLLM's paper (SOSP 2023) gives
for ShareGPT, 161 and 338, and spreads that are assumed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.sim_device import SimHardware, SimModel
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.fleet.times import StepLines

GIB, MB = 2**30, 1e6
PCIE = 55.16e9  # bytes a second from pinned memory, 2026-11-29-h200-pool.json

H800_MODELS = {
    "qwen2.5-7b": SimModel(15_231_233_024, 57_344, StepLines(0.0083371, 0.00010228, 4.392e-8, 0.0050582, 2.2819e-5)),
    "yi-1.5-9b": SimModel(17_658_810_368, 98_304, StepLines(0.0107236, 9.2068e-5, 9.2555e-7, 0.0248127, 1.7068e-5)),
    "llama-2-13b": SimModel(
        26_031_728_640, 819_200, StepLines(0.0110326, 0.00013851, 1.65065e-6, 0.0338521, 2.6621e-5)
    ),
}
H800_MIX = (*["qwen2.5-7b"] * 6, *["yi-1.5-9b"] * 2, *["llama-2-13b"] * 2)


def _of_h200(weights_nbytes: int, kv_nbytes: int) -> SimModel:
    """Return a shape on one H200, scaled by its weights from the 8B shape's times."""
    ratio = weights_nbytes / 16_060_522_496
    lines = StepLines(0.0047144 * ratio, 7.2947e-6 * ratio, kv_nbytes / 4.25e12, 0.0, ratio / 36_676)
    return SimModel(weights_nbytes, kv_nbytes, lines)


H200_MODELS = {
    "8b": _of_h200(16_060_522_496, 131_072),
    "3b": _of_h200(6_425_499_648, 114_688),
    "1b": _of_h200(2_471_628_800, 32_768),
}
H200_MIX = ("8b", "3b", "1b")

OWN_SWITCHES, PUBLISHED_SWITCHES = "measured link", "published estimate"
H800 = {
    OWN_SWITCHES: SimHardware(int(56e9), int(20e9), PCIE, switch_s=0.004),
    PUBLISHED_SWITCHES: SimHardware(int(56e9), int(20e9), 0.15 * 64 * GIB, keeps_weights=False),
}
H200 = {OWN_SWITCHES: SimHardware(int(100e9), int(30e9), PCIE, switch_s=0.004)}


@dataclass(frozen=True)
class Platform:
    """Models and a device that were measured together."""

    models: dict[str, SimModel]
    mix: tuple[str, ...]  # kinds of the first models, again and again
    hardware: dict[str, SimHardware]


PLATFORMS = {"h800": Platform(H800_MODELS, H800_MIX, H800), "h200": Platform(H200_MODELS, H200_MIX, H200)}
PUBLISHED_TARGETS = Targets(10.0, 0.1)  # TTFT_SLO and TPOT_SLO of ``utils.py``

PROMPTS = [1, 8, 14, 24, 53, 118, 189, 288, 368, 451, 543, 660, 756, 836, 962, 1061, 1216, 1326, 1506, 1704, 2187]
OUTPUTS = [16, 28, 50, 78, 108, 130, 158, 183, 212, 239, 267, 290, 311, 339, 373, 410, 451, 503, 576, 767, 1309]

Lengths = Callable[[random.Random], tuple[int, int]]


def _quantile(table: list[int], share: float) -> int:
    place = share * (len(table) - 1)
    low = int(place)
    high = min(low + 1, len(table) - 1)
    return max(1, round(table[low] + (place - low) * (table[high] - table[low])))


def _published(source: random.Random) -> tuple[int, int]:
    return _quantile(PROMPTS, source.random()), _quantile(OUTPUTS, source.random())


def _lognormal(mean: float, sigma: float, source: random.Random) -> int:
    return max(1, round(source.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


def _sharegpt(source: random.Random) -> tuple[int, int]:
    return min(_lognormal(161, 1.1, source), 8192), min(_lognormal(338, 0.9, source), 2048)


LENGTHS: dict[str, Lengths] = {
    "published": _published,
    "sharegpt": _sharegpt,
    "512/128": lambda source: (512, 128),
}
