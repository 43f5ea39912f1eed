"""A pool over two ranks, each with its part of every model: the tokens of models alone, and the same done on both."""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from tests.inference.engine.test_engine import GREEDY, decoder, expected, prompts, requests
from tests.inference.pool.test_model_pool import CONFIGS, LARGE, ONE, alone, check_idle, pooled, tokens
from tests.ranks import RankError, run_ranks
from yafsdp_like.inference.engine.request import FinishReason, Request
from yafsdp_like.inference.fleet.reader import Targets
from yafsdp_like.inference.options import PoolOptions
from yafsdp_like.inference.pool import pool as pool_module
from yafsdp_like.inference.pool.member import ModelState
from yafsdp_like.inference.pool.plan import PoolPlan, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.pool.weights import PooledWeights
from yafsdp_like.inference.weights.loading import Model, model_of
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES
from yafsdp_like.memory.streams import Event, InOrder

if TYPE_CHECKING:
    from collections.abc import Callable

    from yafsdp_like.inference.weights.loading import Source

SMALL = 140 << 10  # bytes of slabs on each rank, for the parts of one model
SECONDS = 30.0  # that nothing here should take, on the slowest machine


def plan_of(slabs_nbytes: int = SMALL, num_ranks: int = 2, **more: Any) -> PoolPlan:
    wide = plan_pool(pooled(), PoolOptions(1 << 30), num_ranks=num_ranks)
    limit = wide.memory.nbytes - wide.grid.region_nbytes + slabs_nbytes
    return plan_pool(pooled(), PoolOptions(limit, **{"host_kv_nbytes": 256 << 10, **more}), num_ranks=num_ranks)


def models_of(wrap: Callable[[Model], Model] = lambda model: model) -> dict[str, Model]:
    return {name: wrap(model_of(decoder(config))) for name, config in CONFIGS.items()}


def rank_pool(slabs_nbytes: int = SMALL, models: dict[str, Model] | None = None, **more: Any) -> ModelPool:
    """This rank's of a pool over all of them."""
    plan = plan_of(slabs_nbytes, **more)
    pool = ModelPool(plan, models_of() if models is None else models)
    assert (pool.arena.nbytes, pool.host.nbytes) == (plan.memory.nbytes, plan.host.nbytes)
    return pool


def facts(pool: ModelPool) -> tuple[Any, ...]:
    """What must be the same on all ranks once nothing is under way."""
    check_idle(pool)
    slabs = [sorted(member.residence.owned) for member in pool._members.values()]
    steps = [(member.engine.metrics().num_steps, member.engine.metrics().num_preempted) for member in pool._members.values()]
    return [*pool.switches], slabs, steps, pool.states(), pool.num_steps


# --- plans ---


def test_a_plan_over_two_ranks_is_of_one_of_them_and_says_so() -> None:
    whole, half = plan_of(LARGE, num_ranks=1), plan_of(LARGE)
    for name, plan in half.models.items():
        vocabulary = sum(part.nbytes for part in plan.serving.placement.packed_units[:: len(plan.units) - 1])
        assert plan.image_nbytes < whole.models[name].image_nbytes / 2 + vocabulary
        assert [group.shape.num_kv_heads for group in plan.serving.groups] == [1] * len(plan.serving.groups)
    assert str(half).startswith("2 ranks compute every step together, each with its part of every model:")
    assert "memory plan of one rank of 2" in str(half) and "over process group: sums" in str(half)


def test_a_model_that_cannot_be_cut_is_refused_by_name() -> None:
    models = {"odd": replace(pooled()["plain"], config=replace(CONFIGS["plain"], num_kv_heads=1))}
    with pytest.raises(ValueError, match=r"model 'odd': .*num_kv_heads 1; use fewer ranks"):
        plan_pool(models, PoolOptions(1 << 30), num_ranks=2)


def test_a_plan_for_other_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="planned for 2 ranks, found 1: .*num_ranks=1"):
        ModelPool(plan_of(), models_of())


# --- tokens ---


def serve_turns(texts: dict[str, list[tuple[int, ...]]], **more: Any) -> tuple[dict[str, dict[str, list[int]]], Any]:
    pool = rank_pool(max_turn_steps=5, **more)
    done = pool.generate({name: requests(found) for name, found in texts.items()})
    return tokens(done), facts(pool)


def test_models_over_two_ranks_asked_at_once_answer_as_they_do_alone() -> None:
    """With turns of a few steps, in the middle of which sequences are preempted, where only one or two models fit."""
    texts = {name: prompts(4, longest=30, seed=i) for i, name in enumerate(CONFIGS)}
    (first, did), (second, also) = run_ranks(serve_turns, texts)
    assert first == second == {name: alone(name, found) for name, found in texts.items()}
    assert did == also
    assert len(did[0]) > 6 and max(preempted for _, preempted in did[2]) > 0
