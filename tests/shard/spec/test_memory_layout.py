"""A plan is made of numbers alone: of specs that no model, no rank and no memory stands behind."""

import dataclasses

import torch

from yafsdp_like.memory.layout import RowShards, aligned
from yafsdp_like.memory.plan import MemoryPlan
from yafsdp_like.shard.spec.memory_layout import plan_memory
from yafsdp_like.shard.spec.schedule import Residency, Schedule, UnitSpan
from yafsdp_like.shard.spec.unit_spec import ParamSpec, RankSpec, UnitNeeds, UnitSpec

ROWS, COLUMNS, RANKS = 1024, 64, 4


def unit(name: str, **changes: object) -> UnitSpec:
    """One matrix, computed in bf16 and reduced in fp32."""
    weight = ParamSpec(
        f"{name}.weight",
        RowShards((ROWS, COLUMNS), RANKS),
        main_dtype=torch.float32,
        compute_dtype=torch.bfloat16,
        gradient_dtype=torch.float32,
        reduce_dtype=torch.float32,
        grad_dtype=torch.float32,
        has_gradient=True,
    )
    spec = UnitSpec(
        name,
        (weight,),
        RankSpec(RANKS, RANKS, "paper"),
        UnitNeeds(),
        Residency(after_forward=False, after_backward=False),
    )
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def plan(*units: UnitSpec) -> MemoryPlan:
    spans = tuple(UnitSpan(i, i) for i in range(len(units)))
    return plan_memory(units, Schedule(spans, len(units))).plan


def test_a_chain_of_specs_takes_its_shards_and_two_slots_of_each_kind() -> None:
    numel = ROWS * COLUMNS
    found = plan(*(unit(f"layers.{i}") for i in range(6)))
    assert found.nbytes_of("main_shard") == found.nbytes_of("grad_shard") == 6 * aligned(4 * numel // RANKS)
    assert found.nbytes_of("compute_shard") == 6 * aligned(2 * numel // RANKS)
    assert found.nbytes_of("gather slots") == 2 * aligned(2 * numel)
    assert found.nbytes_of("gradient slots") == 2 * aligned(4 * numel)


def test_what_a_unit_needs_and_its_ranks_change_the_regions() -> None:
    own = unit("own", needs=UnitNeeds(own_gather_slot=True, own_gradient_slot=True, unsynced_gradients=True))
    found = plan(unit("a"), own)
    assert found.nbytes_of("spill") == 2 * ROWS * COLUMNS
    assert found.nbytes_of("unsynced gradients") == 4 * ROWS * COLUMNS
    mapped = RankSpec(RANKS, RANKS, "paper", is_mapped=True, gather_column_nbytes=512, reduce_column_nbytes=1024)
    assert plan(unit("a", ranks=mapped)).nbytes_of("staging") == 4 * ROWS * COLUMNS + 1024 + 512


def test_units_that_stay_gathered_share_no_slot() -> None:
    kept = Residency(after_forward=True, after_backward=True)
    found = plan(*(unit(f"layers.{i}", residency=kept) for i in range(3)))
    assert found.nbytes_of("gather slots") == 3 * 2 * ROWS * COLUMNS
