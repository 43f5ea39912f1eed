"""What was planned stands beside what is held: the same bytes on a CPU, and the allocator's peaks on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.memory.plan import readable
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.optim import AdamW
from yafsdp_like.shard import memory_report
from yafsdp_like.shard.forecast.training_forecast import ForecastOptions
from yafsdp_like.shard.memory_report import ALLOCATED, ARENAS, DEVICE, GRADIENTS, RESERVED, STATES, TRACED

MIB = 1 << 20
TOKENS = torch.zeros(2, 64, dtype=torch.int64)
AS_CPU = ForecastOptions(on_gpu=False)


def trained(num_steps: int = 2) -> tuple[Any, AdamW]:
    model: Any = Decoder(PRESETS["tiny"])
    for module in (*model.layers, model):
        fully_shard(module, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    optimizer = AdamW(model.parameters())
    for _ in range(num_steps):
        model(TOKENS, TOKENS).backward()
        optimizer.step()
    return model, optimizer


def reported() -> dict[str, Any]:
    model, optimizer = trained()
    report = model.memory_report((TOKENS, TOKENS), AS_CPU, optimizer)
    rows = {row.name: (row.planned_nbytes, row.measured_nbytes) for row in report.rows}
    grads = sum(p.grad.to_local().untyped_storage().nbytes() for p in model.parameters())
    states = sum(t.untyped_storage().nbytes() for s in optimizer.state.values() for t in map(local, s.values()))
    forecast = model.memory_plan((TOKENS, TOKENS), AS_CPU)
    plain = model.memory_report()
    optimizer.zero_grad()
    with torch.no_grad():
        model(TOKENS, TOKENS)
    later = {row.name: row.measured_nbytes for row in model.memory_report().rows}
    return {
        "rows": rows, "grads": grads, "states": states, "text": str(report), "later": later,
        "activations": max(
            sum(p.nbytes.get(name, 0) for name in ("activations", "logits and loss", "buffers", GRADIENTS))
            for p in forecast.phases
        ),
        "arenas": (report.arena_nbytes, model.memory_plan().nbytes),
        "plain": {row.name: (row.planned_nbytes, row.measured_nbytes) for row in plain.rows},
    }  # fmt: skip


def local(state: Any) -> Tensor:
    return state.to_local() if hasattr(state, "to_local") else state


def test_regions_gradients_and_states_are_held_as_planned() -> None:
    for found in run_ranks(reported):
        rows = found["rows"]
        assert rows[ARENAS] == found["arenas"] and rows[ARENAS][0] == rows[ARENAS][1]
        regions = [name for name in rows if name not in (ARENAS, GRADIENTS, STATES, TRACED)]
        assert {"main shards", "gather slots", "gradient slots"} <= set(regions)
        assert all(planned == measured for planned, measured in (rows[name] for name in regions))
        for name, held in ((GRADIENTS, found["grads"]), (STATES, found["states"])):
            planned, measured = rows[name]
            assert measured == held > 0 and planned == pytest.approx(measured, rel=0.1)  # blocks of 512 bytes
        assert rows[TRACED] == (found["activations"], None)
        assert "not known" in found["text"] and "0 slots beyond the plan" in found["text"]
        assert readable(found["arenas"][0]) in found["text"] and "+0.00%" in found["text"]


def test_without_a_batch_and_an_optimizer_only_the_plan_is_compared() -> None:
    for found in run_ranks(reported):
        assert set(found["plain"]) == set(found["rows"]) - {STATES, TRACED}
        assert found["plain"][GRADIENTS][1] == found["grads"]
        assert found["later"][GRADIENTS] is None  # no memory of theirs between a forward and its backward


def on_a_device() -> tuple[dict[str, tuple[int | None, int | None]], int, int]:
    model, optimizer = trained()
    held = sum(region.nbytes for region in memory_report.regions_of(model))
    figures = {
        "memory_allocated": held + 5 * MIB,
        "memory_reserved": held + 60 * MIB,
        "max_memory_allocated": held + 50 * MIB,
        "max_memory_reserved": held + 70 * MIB,
        "mem_get_info": (100 * MIB, 300 * MIB),
    }
    forecast = model.memory_plan((TOKENS, TOKENS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_report, "device_of", lambda _: torch.device("cuda", 0))
        for name, value in figures.items():
            patch.setattr(torch.cuda, name, lambda _, value=value: value)
        report = model.memory_report((TOKENS, TOKENS), optimizer=optimizer)
    outside = sum(r.nbytes for r in forecast.plan.regions if r.mapped or r.granule_nbytes)
    assert outside == 0 and forecast.peak.total_nbytes > 0
    return {r.name: (r.planned_nbytes, r.measured_nbytes) for r in report.rows}, held, forecast.peak.total_nbytes


def test_on_a_device_the_allocators_peaks_stand_beside_the_forecast() -> None:
    """Tensors are on the CPU here, so that gradients and states are none of the device's."""
    ((rows, held, total),) = run_ranks(on_a_device, world_size=1)
    assert [rows[name][1] for name in (TRACED, ALLOCATED, RESERVED, DEVICE)] == [
        50 * MIB, held + 50 * MIB, held + 70 * MIB, 200 * MIB,
    ]  # fmt: skip
    planned = [rows[name][0] for name in (TRACED, ALLOCATED, RESERVED, DEVICE)]
    assert all(planned) and planned == sorted(planned) and planned[-1] == total  # type: ignore[type-var]


def fresh() -> tuple[int, dict[str, int | None]]:
    model, _ = trained(num_steps=0)
    report = model.memory_report((TOKENS, TOKENS), AS_CPU)
    return len(model.memory_report().rows), {row.name: row.planned_nbytes for row in report.rows}


def test_of_a_model_that_has_not_run_a_batch_says_what_is_to_come() -> None:
    ((num_rows, planned),) = run_ranks(fresh, world_size=1)
    assert num_rows == 0 and planned[TRACED] and planned["gradient slots"]
