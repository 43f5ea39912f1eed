"""Whether a request can be admitted without anybody's targets being missed, and when it should come again if not.

[Note: admission]
A request is admitted if, with it, all models' requests can decode at the pace of their readers and still be switched
between: the sum of ``step / tpot`` over models with work, and of their switches over a round of the shortest ``ttft``,
is at most the limit; if the prompts that wait, switches to them included, leave it time for its own before its first
token is due; if its model's steps stay shorter than its ``tpot``; and if all keys and values have room beside the homes
of the models with work, since a sequence that loses its pages is computed again, and late. Where nothing is under way
it is admitted in any case: it would not be served sooner if it came again. A refused one should come again when, with
what is under way ending as expected, there will be room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.memory.plan import readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.inference.fleet.queues import Job, ModelQueue

MIN_WAIT_S = 1.0  # that a refused request is asked to wait
ROUNDS_IN_TTFT = 2.0  # that must pass within the shortest ttft: a request may have missed one that is under way


@dataclass(frozen=True)
class Refusal:
    """A request's targets cannot be met now."""

    reason: str
    retry_after_s: float


def refusal(
    job: Job, working: Sequence[ModelQueue], queue: ModelQueue, limit: float, memory_nbytes: float = math.inf
) -> Refusal | None:
    """Return why ``job`` for ``queue`` cannot be admitted beside ``working``, or None; see [Note: admission].

    ``limit`` is the share of the device that may be in use; ``memory_nbytes`` is what it has for weights and pages.
    """
    if not working:
        return None
    others = [other for other in working if other is not queue]
    kv_nbytes = sum(other.kv_nbytes for other in working) + queue.kv_nbytes_of(job)
    needed = _union_nbytes([other.spec.home for other in (*others, queue)]) + kv_nbytes
    if needed > memory_nbytes:
        words = f"weights of models under way, keys and values would take {readable(math.ceil(needed))}"
        return Refusal(f"{words} of {readable(int(memory_nbytes))}", min(map(_first_end, working)))
    num_rows = min(len(queue.running) + len(queue.waiting) + 1, queue.spec.max_batch)
    num_keys = sum(request.num_keys for request in queue.requests()) + job.num_prompt_tokens
    step_s = queue.times.decode_s(num_rows, num_keys)
    if step_s > queue.targets.tpot_s:
        return Refusal(f"a step of {num_rows} requests takes longer than tpot", _first_end(queue))
    if len(queue.running) + len(queue.waiting) >= queue.spec.max_batch:
        return Refusal(f"{queue.spec.max_batch} requests are under way", _first_end(queue))
    round_s = min(other.targets.ttft_s for other in (*others, queue)) / ROUNDS_IN_TTFT
    loads = [other.load + other.switch_s / round_s for other in others]
    own = step_s / queue.targets.tpot_s + (queue.switch_s / round_s if others else 0.0)
    if others and sum(loads) + own > limit:
        wait_s = _until(others, sum(loads) + own - limit, round_s)
        return Refusal(f"models under way would take {sum(loads) + own:.0%} of the device", wait_s)
    prefill_s = sum(other.prefill_s(other.waiting.values()) + other.switch_s for other in others if other.waiting)
    prefill_s += queue.prefill_s(queue.waiting.values())
    own_s, most_s = queue.switch_s + queue.times.prefill_s(job.num_prompt_tokens), queue.targets.ttft_s * limit
    if own_s > most_s:  # until nothing is under way
        words = (
            f"its own prompt and the switch to its model take {own_s:.1f} s, of a ttft of {queue.targets.ttft_s:.1f} s"
        )
        return Refusal(words, max(MIN_WAIT_S, *(_ends_in_s(other) for other in working)))
    if prefill_s + own_s > most_s:
        return Refusal(
            f"prompts that wait take {prefill_s:.1f} s, and its own {own_s:.1f} s", max(MIN_WAIT_S, prefill_s)
        )
    return None


def _union_nbytes(homes: Sequence[range]) -> int:
    """Return the bytes that lie in any home."""
    nbytes = end = 0
    for home in sorted(homes, key=lambda each: each.start):
        nbytes += max(0, home.stop - max(home.start, end))
        end = max(end, home.stop)
    return nbytes


def _ends_in_s(queue: ModelQueue) -> float:
    """Return in how many seconds all requests of a model will have ended, at the pace of their readers."""
    return max((queue.num_left(request) for request in queue.requests()), default=0) * queue.targets.tpot_s


def _first_end(queue: ModelQueue) -> float:
    left = min((queue.num_left(request) for request in queue.requests()), default=0)
    return max(MIN_WAIT_S, left * queue.targets.tpot_s)


def _until(queues: Sequence[ModelQueue], excess: float, round_s: float) -> float:
    """Return in how many seconds models with a load of ``excess`` will have ended."""
    wait_s = MIN_WAIT_S
    for ends_s, queue in sorted(((_ends_in_s(q), q) for q in queues), key=lambda entry: entry[0]):
        wait_s = max(MIN_WAIT_S, ends_s)
        excess -= queue.load + queue.switch_s / round_s
        if excess <= 0:
            break
    return wait_s
