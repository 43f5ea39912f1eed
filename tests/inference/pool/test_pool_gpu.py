"""A pool on a GPU: recordings hold after every switch, steps wait for units on their way, nothing is allocated."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.inference.engine.test_engine import allocations, decoder, prompts, requests
from tests.inference.pool.test_model_pool import CONFIGS, ONE, alone, tokens
from yafsdp_like.hardware import Hardware
from yafsdp_like.inference.options import EngineOptions, PoolOptions
from yafsdp_like.inference.pool.member import ModelState
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import model_of, random_model
from yafsdp_like.models import DecoderConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = [
    pytest.mark.gpu(count=1),
    pytest.mark.filterwarnings("ignore:.*CUDA graphs do not fit"),  # how many do is `plan/test_recordings.py`'s
]

OPTIONS = replace(ONE, costs=None)
SLABS = 280 << 10  # room for one model, or two


def cuda_pool(configs: Mapping[str, DecoderConfig], slabs_nbytes: int, dtype: torch.dtype, **more: Any) -> ModelPool:
    models = {name: PooledModel(config, dtype, more.pop(name, OPTIONS)) for name, config in configs.items()}
    hardware = Hardware.of(torch.device("cuda"))
    wide = plan_pool(models, PoolOptions(64 << 30), hardware)
    others_nbytes = wide.memory.nbytes - wide.grid.region_nbytes + wide.recordings_nbytes
    options = PoolOptions(others_nbytes + slabs_nbytes, host_kv_nbytes=64 << 20, **more)
    plan = plan_pool(models, options, hardware)
    is_small = dtype is torch.float32  # whose tokens are compared with those of the decoder on the CPU
    sources = {n: model_of(decoder(c)) if is_small else random_model(n, c) for n, c in configs.items()}
    return ModelPool(plan, sources, "cuda")


def test_switches_leave_tokens_recordings_and_the_allocator_as_they_were() -> None:
    pool = cuda_pool(CONFIGS, SLABS, torch.float32, max_turn_steps=4)
    texts = {name: prompts(4, longest=20, seed=i) for i, name in enumerate(CONFIGS)}
    wanted = {name: alone(name, found) for name, found in texts.items()}
    asked = {name: requests(found) for name, found in texts.items()}
    assert tokens(pool.generate(asked)) == wanted
    recordings = {name: dict(member.engine._runner._recordings) for name, member in pool._members.items()}
    before, num_switches = allocations(), len(pool.switches)
    for _ in range(30):
        assert tokens(pool.generate(asked)) == wanted
    assert allocations() == before and len(pool.switches) > num_switches + 60
    assert all(member.engine._runner._recordings == recordings[name] for name, member in pool._members.items())
    pool.check_integrity()


def test_a_model_is_read_beside_steps_and_changes_no_token_no_recording_and_no_allocation() -> None:
    pool = cuda_pool(CONFIGS, SLABS, torch.float32, max_turn_steps=4)
    texts = {name: prompts(4, longest=20, seed=i) for i, name in enumerate(CONFIGS)}
    wanted = {name: alone(name, found) for name, found in texts.items()}
    asked = {name: requests(found) for name, found in texts.items()}
    assert tokens(pool.generate(asked)) == wanted
    for name in CONFIGS:
        pool.unload(name)
        before = allocations()
        pool.start_loading(name)
        others = [other for other in CONFIGS if other != name]
        assert tokens(pool.generate({other: asked[other] for other in others})) == {o: wanted[o] for o in others}
        assert tokens(pool.generate({name: asked[name]})) == {name: wanted[name]}
        assert allocations() == before
        pool.check_integrity()


LARGE = DecoderConfig(4096, 8, 32, 8, 14336, vocab_size=32000, max_seq_len=2048, rope_theta=5e5)
OTHER = replace(LARGE, num_layers=6)
LARGE_OPTIONS = EngineOptions(max_batch_size=2, max_batch_tokens=256, max_seq_len=512, prefix_cache=False)


def test_the_first_layers_are_computed_while_the_last_are_on_their_way() -> None:
    configs = {"large": LARGE, "other": OTHER}
    pool = cuda_pool(configs, 5 << 30, torch.bfloat16, large=LARGE_OPTIONS, other=LARGE_OPTIONS)
    pool.load_all()
    text = tuple(range(200))
    first = pool.generate({"large": requests([text])})["large"]["0"].ids
    pool.generate({"other": requests([text])})
    torch.cuda.synchronize()
    pool.wake_up("large")
    assert pool.states()["large"] is ModelState.WAKING
    weights = pool._members["large"].weights
    num_units = len(pool.plan.models["large"].units)
    pool.add("large", requests([text])[0])
    pool.step()  # issued, units on their way
    assert not weights.is_arriving(), "a forward has waited for all units, one after the other"
    drawn = [token.id for _ in range(20) if pool.has_work for _, output in pool.step() for token in output.tokens]
    assert drawn == first and pool.states()["large"] is ModelState.AWAKE and num_units == 10
    assert pool.switches[-1].nbytes > 0.8 * pool.plan.models["large"].image_nbytes  # what still fitted had stayed
    pool.check_integrity()


def test_a_prefetched_model_is_replayed_at_once() -> None:
    configs = {"large": LARGE, "other": OTHER}
    pool = cuda_pool(configs, 12 << 30, torch.bfloat16, large=LARGE_OPTIONS, other=LARGE_OPTIONS)
    pool.load_all()
    text = tuple(range(200))
    pool.generate({"large": requests([text])})
    nbytes = pool.plan.models["other"].image_nbytes
    while nbytes:
        nbytes -= pool.prefetch("other")
    torch.cuda.synchronize()
    assert pool.wake_up("other").nbytes == 0
    assert pool.states() == {"large": ModelState.AWAKE, "other": ModelState.AWAKE}
    assert len(pool.generate({"other": requests([text])})["other"]["0"].ids) == 12
