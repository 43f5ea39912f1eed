"""The plan of a pool of models, in exact bytes: homes of weights, slabs of pages, buffers that are shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from yafsdp_like.hardware import H200
from yafsdp_like.inference.options import EngineOptions, PoolOptions
from yafsdp_like.inference.plan.packed_weights import pack_units
from yafsdp_like.inference.pool.plan import PooledModel, PoolPlan, plan_pool
from yafsdp_like.models import PRESETS, DecoderConfig

GIB = 2**30
LONG = EngineOptions(max_batch_size=32, max_seq_len=8192)
TINY = DecoderConfig(32, 2, 4, 2, 64, vocab_size=97, max_seq_len=128)
TWO = {
    name: PooledModel(replace(TINY, dim=dim), torch.float32, EngineOptions(max_batch_size=2, max_seq_len=128))
    for name, dim in (("small", 32), ("large", 96))
}
LARGE = {name: PooledModel(PRESETS[name], options=LONG) for name in ("8b", "3b", "1b")}


def weights_nbytes(name: str) -> int:
    return sum(packed.nbytes for packed in pack_units(PRESETS[name], torch.bfloat16))


def homes(plan: PoolPlan) -> dict[str, tuple[int, int]]:
    return {name: (model.home.start, model.home.stop) for name, model in plan.models.items()}


def test_every_byte_of_a_pool_has_a_name_and_all_are_within_the_limit() -> None:
    plan = plan_pool(LARGE, PoolOptions(40 * GIB, host_kv_nbytes=4 * GIB), H200)
    regions = {region.name: region.nbytes for region in plan.memory.regions}
    serving = [model.serving for model in plan.models.values()]
    sizes = {kind: [r.nbytes for s in serving for r in s.buffers.regions if r.name == kind] for kind in regions}
    slab = plan.grid.slab_nbytes
    assert regions == {
        "slabs": plan.grid.num_slabs * slab,
        "workspace": max(sizes["workspace"]),
        "logits": max(sizes["logits"]),
        **{f"{name}: tables": s.buffers.regions[2].nbytes for name, s in zip(LARGE, serving, strict=True)},
    }
    assert plan.memory.nbytes == sum(regions.values())
    assert plan.recordings_nbytes == sum(s.recordings_nbytes for s in serving) > 0
    assert "MiB for CUDA graphs of all models' steps" in str(plan)
    assert 0 <= 40 * GIB - plan.memory.nbytes - plan.recordings_nbytes < slab
    images = sum(weights_nbytes(name) for name in LARGE)
    assert plan.host_grid is not None
    assert plan.host.nbytes == images + plan.host_grid.region_nbytes <= images + 4 * GIB
    assert "8b: 14.96 GiB of weights, 34 units in bfloat16" in str(plan) and "host weights" in str(plan)


def test_models_that_fit_together_have_homes_of_their_own() -> None:
    plan = plan_pool(LARGE, PoolOptions(40 * GIB), H200)
    slab, end = plan.grid.slab_nbytes, 0
    for name, (start, stop) in homes(plan).items():
        assert start == end and stop - start == -(-weights_nbytes(name) // slab)
        end = stop
    assert "awake beside all others" in str(plan)
    assert plan.lend_late == dict.fromkeys(range(end), 1)


def test_those_that_do_not_lie_on_each_other_so_that_the_rest_has_room() -> None:
    plan = plan_pool(LARGE, PoolOptions(20 * GIB), H200)
    found = homes(plan)
    (_, end), (_, small), (start, stop) = found["8b"], found["3b"], found["1b"]
    assert found["8b"][0] == found["3b"][0] == 0 and start == end and small < end
    meets = {(a, b): plan.models[a].meets(plan.models[b]) for a, b in (("8b", "3b"), ("8b", "1b"), ("3b", "1b"))}
    assert meets == {("8b", "3b"): True, ("8b", "1b"): False, ("3b", "1b"): False}
    assert plan.lend_late == {slab: 2 if slab < small else 1 for slab in range(stop)}
    assert stop + plan.least_slabs("8b") <= plan.grid.num_slabs
    assert (
        "3b: 5.98 GiB of weights, 29 units in bfloat16; sequences of at most 8,192 tokens; awake in turn with 8b"
        in str(plan)
    )


def test_pages_that_no_weights_may_displace_are_as_many_as_asked_for() -> None:
    few, many = (plan_pool(LARGE, PoolOptions(40 * GIB, kv_nbytes=n * GIB), H200) for n in (4, 20))
    assert max(few.lend_late) < few.grid.num_slabs - 4 * GIB // few.grid.slab_nbytes
    assert {stop for _, stop in homes(few).values()} == {365, 511, 568}
    assert max(many.lend_late) < many.grid.num_slabs - 20 * GIB // many.grid.slab_nbytes
    assert many.models["3b"].meets(many.models["8b"]) and not many.models["1b"].meets(many.models["8b"])


def test_units_follow_each_other_and_say_which_slabs_they_lie_in() -> None:
    plan = plan_pool(LARGE, PoolOptions(40 * GIB), H200)
    model, slab = plan.models["3b"], plan.grid.slab_nbytes
    assert model.units[0].offset_nbytes == 0 and model.image_nbytes == weights_nbytes("3b")
    for unit, segment in enumerate(model.units):
        slabs, start = model.slabs_of(unit), model.home.start * slab + segment.offset_nbytes
        assert slabs.start * slab <= start < (slabs.start + 1) * slab
        assert (slabs.stop - 1) * slab < start + segment.nbytes <= slabs.stop * slab
    assert model.slabs_of(0).start == model.home.start and model.slabs_of(len(model.units) - 1).stop == model.home.stop


def test_a_model_awake_alone_has_all_slabs_but_its_own_for_pages() -> None:
    plan = plan_pool(
        {name: replace(model, options=EngineOptions()) for name, model in LARGE.items()}, PoolOptions(20 * GIB), H200
    )
    for model in plan.models.values():
        grid, longest = model.serving.grid, model.serving.max_seq_len
        assert grid.num_slabs == plan.grid.num_slabs - len(model.home)
        assert model.serving.capacity.fits(grid, longest)
    assert plan.models["8b"].serving.max_seq_len < plan.models["1b"].serving.max_seq_len


def test_what_does_not_fit_is_refused_with_the_model_and_the_bytes_that_are_missing() -> None:
    with pytest.raises(ValueError, match=r"model '8b': the model does not fit memory_limit_nbytes=.*are missing"):
        plan_pool(LARGE, PoolOptions(15 * GIB), H200)
    with pytest.raises(ValueError, match=r"model 'one': memory is the pool's; leave it out"):
        plan_pool({"one": PooledModel(PRESETS["1b"], options=EngineOptions(kv_nbytes=1))}, PoolOptions(GIB))
    with pytest.raises(ValueError, match="at least one model"):
        plan_pool({}, PoolOptions(GIB))
    with pytest.raises(ValueError, match=r"host_kv_nbytes 1 hold no pages; of these one has 12288"):
        plan_pool(TWO, PoolOptions(GIB, host_kv_nbytes=1))
    with pytest.raises(ValueError, match=r"model 'large' does not fit.*it fits with memory_limit_nbytes=") as refused:
        plan_pool(TWO, PoolOptions(5_046_272))
    enough = int(str(refused.value).rsplit("=", 1)[1])
    assert plan_pool(TWO, PoolOptions(enough)).memory.nbytes <= enough
    with pytest.raises(ValueError, match="policy must be one of lru, gdsf, found 'fifo'"):
        PoolOptions(GIB, policy="fifo")  # type: ignore[arg-type]
