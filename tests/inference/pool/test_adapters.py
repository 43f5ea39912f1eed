"""LoRA adapters of the models of a pool: they sleep and wake with their model, on slabs that are others' meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.inference.engine.test_adapters import check_completion, requests, write_adapter
from tests.inference.engine.test_engine import TINY, decoder
from tests.inference.pool.test_model_pool import ONE
from yafsdp_like.inference.options import PoolOptions
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import model_of

if TYPE_CHECKING:
    from pathlib import Path

CONFIGS = {"one": TINY, "two": replace(TINY, num_layers=3, qkv_bias=True)}
ADAPTERS = {"one": ("wide", "attention", "down"), "two": ("stabilized", "wide")}


def model_pool(directory: Path, slabs_nbytes: int) -> ModelPool:
    """With two slots for adapters of each model, of which one has more."""
    options = replace(ONE, adapter_slots=2, adapter_rank=8, host_adapters=3)
    models = {name: PooledModel(config, torch.float32, options) for name, config in CONFIGS.items()}
    large = plan_pool(models, PoolOptions(1 << 30))
    limit = large.memory.nbytes - large.grid.region_nbytes + slabs_nbytes
    plan = plan_pool(models, PoolOptions(limit, host_kv_nbytes=256 << 10))
    pool = ModelPool(plan, {name: model_of(decoder(config)) for name, config in CONFIGS.items()})
    assert (pool.arena.nbytes, pool.host.nbytes) == (plan.memory.nbytes, plan.host.nbytes)
    for model, names in ADAPTERS.items():
        (directory / model).mkdir()
        for name in names:
            adapters = pool.engine(model).adapters
            adapters.load(name, write_adapter(directory / model, CONFIGS[model], name))
    return pool


@pytest.mark.parametrize("slabs_nbytes", [360 << 10, 4 << 20], ids=["in turn", "together"])
def test_adapters_answer_as_merged_weights_do_whoever_sleeps(slabs_nbytes: int, tmp_path: Path) -> None:
    pool = model_pool(tmp_path, slabs_nbytes)
    for turn in range(3):  # each begins with what slots held at the end of the last, unless others wrote there
        order = {model: names[:: -1 if turn % 2 else 1] for model, names in ADAPTERS.items()}
        asked = {model: requests([None, *names, *names], seed=turn, max_tokens=5) for model, names in order.items()}
        done = pool.generate(asked)
        for model, found in asked.items():
            for request in found:
                check_completion(CONFIGS[model], request, done[model][request.id])
    assert (len(pool.switches) > 2) is (slabs_nbytes < 1 << 20)
    pool.check_integrity()


def test_an_adapter_is_copied_again_only_if_its_slot_was_overwritten(tmp_path: Path) -> None:
    pool = model_pool(tmp_path, 4 << 20)
    adapters = pool.engine("one").adapters
    asked = requests(["wide"])
    found = []
    for keep in (True, True, False, True):
        done = pool.generate({"one": asked})
        check_completion(CONFIGS["one"], asked[0], done["one"]["0"])
        found.append(adapters.num_woken)
        pool.check_integrity()
        pool.sleep("one", keep)
    assert found == [1, 1, 1, 2]
    pool.unload("one")
    done = pool.generate({"one": asked})
    check_completion(CONFIGS["one"], asked[0], done["one"]["0"])
    assert adapters.num_woken == 3
    assert pool._members["one"].residence.owned == set(pool.plan.models["one"].home), "a model that is awake has all"


def test_homes_hold_slots_and_host_memory_images(tmp_path: Path) -> None:
    plan = model_pool(tmp_path, 4 << 20).plan
    for model in plan.models.values():
        assert model.serving.adapters is not None
        home_nbytes = len(model.home) * plan.grid.slab_nbytes
        assert home_nbytes - plan.grid.slab_nbytes < model.image_nbytes + model.slots_nbytes <= home_nbytes
        assert model.slots_nbytes == 2 * model.serving.adapters.slot_nbytes
    slots = [model.serving.adapters.slot_nbytes for model in plan.models.values() if model.serving.adapters]
    assert plan.host.nbytes_of("adapter images") == 3 * sum(slots)
