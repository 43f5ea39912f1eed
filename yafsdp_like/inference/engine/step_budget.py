"""How many tokens a step has at most. Owns the rule; who gets the tokens is the scheduler's.

[Note: budget of a step]
Sequences that decode wait for the chunks of prompts beside them, so a step has no more of these than pays. From about
twice a GPU's ratio of FLOP/s to bytes/s on (150 to 300 rows), more rows make no row cheaper but all of them later: a
step computes about ``CHUNK`` tokens of prompts beside rows that decode, and prompts that arrived together one after
the other. Where more than a few prompts could be computed, throughput counts, and chunks grow with their number.
Where nobody decodes, the first prompt may have the whole step. Rows that a step is padded to (``step_sizes.py``) are
used. So budgets depend on requests alone, not on clocks, and the same calls make the same steps.

A target (``EngineOptions.tpot_ms``) replaces the rule by times: beside rows that decode, a step has as many rows as
take so long (``StepTimes``), and ``MIN_CHUNK`` tokens of prompts in any case. Prompts are computed in order, so
the first one moves in every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.inference.engine.batch import ActiveRequest
    from yafsdp_like.inference.engine.step_times import StepTimes
    from yafsdp_like.inference.options import EngineOptions
    from yafsdp_like.inference.plan.step_sizes import StepBuckets

CHUNK = 512  # tokens of prompts beside rows that decode, see [Note: budget of a step]
PROMPTS_PER_CHUNK = 4  # that may wait for each other before chunks grow


def step_budget(
    nums_left: Sequence[int],
    waiting: Sequence[ActiveRequest],
    options: EngineOptions,
    buckets: StepBuckets,
    times: StepTimes | None,
) -> int:
    """Return the tokens of the next step; see [Note: budget of a step].

    ``nums_left`` are how many tokens each running sequence has left until it draws. ``times`` are needed where the
    options have a ``tpot_ms``.
    """
    num_drawing = nums_left.count(1)
    if num_drawing and times is not None and options.tpot_ms is not None:
        return min(options.max_batch_tokens, times.max_rows(options.tpot_ms / 1e3, num_drawing))
    prompts_left = [num_left for num_left in nums_left if num_left > 1]
    num_prompts = len(prompts_left) + min(len(waiting), options.max_batch_size - len(nums_left))
    chunk = CHUNK * max(1, num_prompts // PROMPTS_PER_CHUNK)
    if not num_drawing:
        first = prompts_left[0] if prompts_left else waiting[0].num_left if waiting else 0
        chunk = max(chunk, first)
    return min(options.max_batch_tokens, buckets.padded(num_drawing + chunk))
