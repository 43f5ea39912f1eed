"""Plans of models that share slots, made of numbers alone."""

import dataclasses

from tests.shard.spec.test_memory_layout import COLUMNS, RANKS, ROWS, unit
from yafsdp_like.memory.plan import MemoryPlan
from yafsdp_like.memory.slot_map import slot_map
from yafsdp_like.shard.spec.memory_layout import plan_memory
from yafsdp_like.shard.spec.schedule import Schedule, UnitSpan
from yafsdp_like.shard.spec.shared_layout import plan_of_all, plan_together, shared_regions
from yafsdp_like.shard.spec.unit_spec import RankSpec, UnitNeeds, UnitSpec

Model = tuple[list[UnitSpec], Schedule]
MAPPED = RankSpec(RANKS, RANKS, "paper", is_mapped=True, reduce_column_nbytes=1024, gather_column_nbytes=512)


def chain(name: str, num_units: int, **changes: object) -> Model:
    units = [unit(f"{name}.{i}", **changes) for i in range(num_units)]
    return units, Schedule(tuple(UnitSpan(i, i) for i in range(num_units)), num_units)


def plans(**models: Model) -> dict[str, MemoryPlan]:
    return {name: layout.plan for name, layout in plan_together(models).items()}


def test_each_model_has_the_largest_of_what_is_shared_and_the_sum_counts_it_once() -> None:
    short, long = chain("short", 1), chain("long", 4)
    found = plans(short=short, long=long)
    alone = [plan_memory(*model).plan for model in (short, long)]
    assert shared_regions(found["short"]) == shared_regions(found["long"]) == shared_regions(alone[1])
    for plan, of_one in zip(found.values(), alone, strict=True):
        assert plan.nbytes_of("main_shard") == of_one.nbytes_of("main_shard")
        assert plan.slots == of_one.slots
        assert plan.shared_by == ("short", "long")
    together = plan_of_all(found)
    assert together.nbytes == sum(p.nbytes for p in alone) - sum(r.nbytes for r in shared_regions(alone[0]))
    assert together.nbytes_of("gather slots") == 2 * 2 * ROWS * COLUMNS


def test_a_region_that_one_models_peers_map_is_mapped_for_all_and_ends_at_a_granule() -> None:
    found = plans(alone=chain("alone", 3), mapped=chain("mapped", 1, ranks=MAPPED))
    for plan in found.values():
        regions = {region.name: region for region in plan.regions}
        assert regions["gradient slots"].mapped
        mapped = [region for region in shared_regions(plan) if region.mapped]
        assert sum(region.nbytes for region in mapped) % (2 << 20) == 0
    assert "gather staging" in {region.name for region in found["mapped"].regions}
    assert "gather staging" not in {region.name for region in found["alone"].regions}  # other ranks read it


def test_regions_that_are_there_are_used_as_long_as_they_suffice() -> None:
    large, small = chain("large", 3), chain("small", 1)
    held = shared_regions(plans(large=large, small=small)["small"])
    kept = plan_together({"small": small}, held)["small"].plan
    assert shared_regions(kept) == held
    less = [dataclasses.replace(region, nbytes=region.nbytes // 2) for region in held]
    assert shared_regions(plan_together({"large": large}, less)["large"].plan) == held


def test_debug_modes_bytes_are_those_beyond_the_same_plan_without_it() -> None:
    checked = chain("checked", 2, needs=UnitNeeds(guards=True, own_gather_slot=True))
    plain = chain("checked", 2)
    found, without = plans(a=checked)["a"], plans(a=plain)["a"]
    assert found.debug_nbytes == found.nbytes - without.nbytes > 0


def test_models_are_drawn_one_after_the_other_and_no_slot_over_another() -> None:
    together = plan_of_all(plans(policy=chain("policy", 3), critic=chain("critic", 2)))
    panel = next(panel for panel in slot_map(together) if panel.title == "gather slots")
    assert [phase.name for phase in panel.phases] == [
        *("policy forward", "policy backward", "policy update"),
        *("critic forward", "critic backward", "critic update"),
    ]
    for i, one in enumerate(panel.rectangles):
        assert not any(one.overlaps(other) for other in panel.rectangles[:i])
    begin = next(phase.first for phase in panel.phases if phase.name == "critic forward")
    assert all((rectangle.first >= begin) is rectangle.name.startswith("critic") for rectangle in panel.rectangles)
