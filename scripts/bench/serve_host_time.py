"""What the CPU does for a step of serving: time, and calls of Python functions.

    PYTHONPATH=.:scripts python -m bench.serve_host_time [--rows 32] [--steps 400] [--functions 30]

Steps of a GPU are graphs, so what is left to the CPU is scheduling, staging, launching and reading. Method: a tiny
model on a CPU with recordings that do nothing, and steps padded as those of a GPU are. Requests of 512 tokens arrive so
often that about ``--rows`` decode, each of which draws 128 tokens. The KV cache is full, as a server's is after its
first minutes, so that pages of prompts are those of others that are evicted. Numbers of calls are the same in every
run. Copies to and from the device are those of a CPU; times are the CPU's, of the thread that steps.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import pstats
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

import yafsdp_like
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.engine.step_log import quantile
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.weights.loading import model_of
from yafsdp_like.kernels.sampling_params import SamplingParams
from yafsdp_like.models.decoder import Decoder, DecoderConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, FrameType

PACKAGE = str(Path(yafsdp_like.__file__).parent)
PROMPT_TOKENS, NEW_TOKENS = 512, 128
NUM_COUNTED = 64  # steps
CONFIG = DecoderConfig(16, 1, 2, 1, 32, vocab_size=1024, max_seq_len=1024)
KV_NBYTES_PER_TOKEN = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * torch.float32.itemsize
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class StepCosts:
    """Of one step of the engine."""

    mixed: bool  # whether it computes parts of prompts
    us: float
    package_calls: int = 0  # of this package's Python functions
    python_calls: int = 0  # of all Python functions, those included
    c_calls: int = 0  # of functions in C from Python


class _NoWork:
    """Recordings of all steps, which do nothing."""

    def get(self, size: Any) -> _NoWork:
        return self

    def replay(self) -> None:
        pass


def steps_between(num_rows: int) -> int:
    """Return the number of steps of which at least one has a prompt, where about so many rows decode."""
    return math.ceil(NEW_TOKENS / num_rows)


class SteadyTraffic:
    """Steps of an engine that leaves out what a GPU would do, whose requests arrive so that ``num_rows`` decode."""

    def __init__(self, num_rows: int) -> None:
        kv_nbytes = 2 * num_rows * (PROMPT_TOKENS + NEW_TOKENS) * KV_NBYTES_PER_TOKEN
        options = EngineOptions(kv_nbytes=kv_nbytes, max_batch_size=2 * num_rows, max_batch_tokens=2048)
        self._engine = cast("Any", Engine.load(model_of(Decoder(CONFIG)), options, device="cpu", dtype=torch.float32))
        self._engine._runner._recordings, self._engine._runner._on_gpu = _NoWork(), True
        self._between, self._draw = NEW_TOKENS / num_rows, random.Random("traffic")
        self.num_rows = num_rows
        self._num_steps = self._num_added = 0
        for _ in range(3 * NEW_TOKENS):
            self.step()

    def step(self) -> StepCosts:
        """Add what has arrived, make a step, and return its time."""
        self._arrive()
        begin = time.thread_time()
        self._engine.step()
        return StepCosts(self._is_mixed, 1e6 * (time.thread_time() - begin))

    def counted_step(self) -> StepCosts:
        """Add what has arrived, make a step, and return all costs of it."""
        self._arrive()
        is_ours: dict[CodeType, bool] = {}
        counts = dict.fromkeys(("package", "call", "c_call"), 0)

        def note(frame: FrameType, event: str, arg: Any) -> None:
            if event == "call":
                code = frame.f_code
                if code not in is_ours:
                    is_ours[code] = code.co_filename.startswith(PACKAGE)
                counts["package"] += is_ours[code]
            if event in counts:
                counts[event] += 1

        begin = time.thread_time()
        sys.setprofile(note)
        try:
            self._engine.step()
        finally:
            sys.setprofile(None)
        us = 1e6 * (time.thread_time() - begin)
        return StepCosts(self._is_mixed, us, counts["package"], counts["call"], counts["c_call"])

    def _arrive(self) -> None:
        while self._num_added * self._between <= self._num_steps:
            prompt = tuple(self._draw.choices(range(CONFIG.vocab_size), k=PROMPT_TOKENS))
            self._engine.add(Request(str(self._num_added), prompt, GREEDY, max_tokens=NEW_TOKENS))
            self._num_added += 1
        self._num_steps += 1

    @property
    def _is_mixed(self) -> bool:
        return self._engine._unread is not None and self._engine._unread[0].runs[-1].num_tokens > 1


def mean_counts(traffic: SteadyTraffic, mixed: bool) -> StepCosts:
    """Return the mean counts of the steps of one kind among the next ones; times are left out."""
    num_counted = max(NUM_COUNTED, steps_between(traffic.num_rows))
    steps = [step for step in (traffic.counted_step() for _ in range(num_counted)) if step.mixed is mixed]
    means = {
        name: round(sum(getattr(step, name) for step in steps) / len(steps))
        for name in ("package_calls", "python_calls", "c_calls")
    }
    return replace(steps[0], us=0.0, **means)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the costs of steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=32, help="that decode, about (default: 32)")
    parser.add_argument("--steps", type=int, default=400, help="that are timed (default: 400)")
    parser.add_argument("--functions", type=int, default=0, help="print so many lines of a profile too")
    options = parser.parse_args(arguments)
    if not 1 <= options.rows <= NEW_TOKENS // 2:
        parser.error(f"--rows must be from 1 to {NEW_TOKENS // 2}, above which each step has a prompt: {options.rows}")
    if options.steps < steps_between(options.rows):
        parser.error(
            f"--steps must be at least {steps_between(options.rows)}, of which one has a prompt: {options.steps}"
        )
    torch.set_num_threads(1)
    traffic = SteadyTraffic(options.rows)
    steps = [traffic.step() for _ in range(options.steps)]
    for mixed in (False, True):
        us = [step.us for step in steps if step.mixed is mixed]
        if not us:
            continue
        print(f"{'mixed' if mixed else 'decode'}: {len(us)} steps, us least {min(us):.0f}, p50 {quantile(us, 0.5):.0f}")
        print(f"  {mean_counts(traffic, mixed)}")
    if options.functions:
        profile = cProfile.Profile(time.thread_time)
        profile.runcall(lambda: [traffic.step() for _ in range(options.steps)])
        pstats.Stats(profile).sort_stats("tottime").print_stats(options.functions)


if __name__ == "__main__":
    main()
