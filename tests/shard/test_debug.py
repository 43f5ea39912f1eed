"""Debug mode finds reads and writes of memory where there should be none; each test plants one."""

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from tests.ranks import on_ranks
from tests.shard.test_optimizer_step import TRANSPORTS
from tests.training import ours, world_mesh
from tests.twins import Twins
from tests.zoo import FEATURES, Chain, Specimen, blocks, layers_of, vectors
from yafsdp_like.memory.guards import CANARY, POISON_INTEGER
from yafsdp_like.memory.layout import GUARD_NBYTES, FlatLayout
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.runtime import allocated_memory
from yafsdp_like.shard.runtime.engine import engine_of
from yafsdp_like.shard.runtime.unit_state import Unit, unit_of
from yafsdp_like.shard.spec import memory_layout

transports = pytest.mark.parametrize("transport", TRANSPORTS)
pytestmark = pytest.mark.filterwarnings("ignore::yafsdp_like.SpillWarning")  # an error holds its forward's graph


def debugged(transport: Any, **options: Any) -> Any:
    """Three equal blocks in debug mode."""
    model: Any = Chain(blocks(3))
    for unit in (*model.layers, model):
        ours.fully_shard(unit, mesh=world_mesh(), transport=transport, debug=True, **options)
    return model


def step(model: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
    model(torch.ones(2, FEATURES)).sum().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def unit(module: nn.Module) -> Unit:
    found = unit_of(module)
    assert found is not None
    return found


def beside(t: torch.Tensor, arena: Any, region: str, past_end: bool) -> torch.Tensor:
    """The eight bytes behind ``t``, or before it, which lies in a region of an arena: what a wrong kernel writes."""
    storage, _ = arena.storage(region)
    offset = t.data_ptr() - storage.data_ptr() + (t.nbytes if past_end else -8)
    return torch.empty(0, dtype=torch.uint8).set_(storage, offset, (8,), (1,))


def told(*words: str) -> str:
    """A pattern of an error of this rank that has these words in this order."""
    return r"debug mode: [\s\S]*" + r"[\s\S]*".join([*map(re.escape, words), ""]) + "(?=.*)"


def runs_during(module: nn.Module, work: Callable[[], object]) -> None:
    module.register_forward_hook(lambda *_: work() and None)


# --- writes outside of what is one's own ---


@transports
@pytest.mark.parametrize(
    ("past_end", "words"),
    [
        (True, "a write past the end of 'layers.1.rise.weight'"),
        (False, "a write before the start of 'layers.1.rise.weight'"),
    ],
)
@on_ranks()
def test_a_write_beside_a_parameter_in_its_slot_names_both_neighbours(
    past_end: bool, words: str, transport: Any
) -> None:
    model = debugged(transport)
    step(model)
    block = model.layers[1]

    def write() -> None:
        slot = unit(block).gather_slot
        assert slot.extent is not None
        rise = next(p for p in slot.params if p.shape == block.rise.weight.shape)
        beside(rise.detach(), slot.extent.arena, slot.extent.region, past_end).zero_()

    runs_during(block.rise, write)
    expected = told("in the all-gather slot of 'layers.1'", "between 'layers.1.", words, f"rank {dist.get_rank()}")
    with pytest.raises(RuntimeError, match=expected) as found:
        step(model)
    assert str(found.value).endswith(
        "'layers.2' all-gathers into its all-gather slot; 'layers.1' releases its all-gather slot"
    )


@transports
@on_ranks()
def test_a_write_past_the_end_of_a_gradient_in_its_slot_is_noticed_when_it_is_reduced(transport: Any) -> None:
    model = debugged(transport)
    step(model)
    slot = unit(model.layers[1]).gradient_slot
    assert slot.extent is not None
    last = slot.inputs[max(slot.inputs)]
    arena, region = slot.extent.arena, slot.extent.region

    def write(_: torch.Tensor) -> None:
        beside(last, arena, region, past_end=True).zero_()

    model.layers[0].register_forward_hook(lambda module, args, output: output.register_hook(write) and None)
    with pytest.raises(RuntimeError, match=told("in the gradient slot of 'layers.", "in backward")):
        step(model)


@transports
@pytest.mark.parametrize("kind", ["main_shard", "compute_shard"])
@on_ranks()
def test_a_shard_that_a_kernel_writes_with_a_wrong_number_of_elements_is_noticed(kind: str, transport: Any) -> None:
    policy = ours.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = debugged(transport, mp_policy=policy)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    owner = unit(model.layers[2])
    p = next(p for p in owner.params if p.name.endswith("fall.weight"))
    arena = engine_of(owner).memory.arena if kind == "compute_shard" else owner.arena  # type: ignore[union-attr]
    region = f"{owner.name}.{kind}" if kind == "compute_shard" else kind
    shard = p.compute if kind == "compute_shard" else p.main

    def write(*_: Any) -> None:
        beside(shard, arena, region, past_end=True).zero_()

    optimizer.register_step_post_hook(write)
    what = f"in the {kind.replace('_', ' ')} of 'layers.2'"
    with pytest.raises(RuntimeError, match=told(what, "a write past the end of 'layers.2.fall.weight'")):
        step(model, optimizer)


@transports
@on_ranks()
def test_a_write_behind_a_reduced_gradient_is_noticed(transport: Any) -> None:
    model = debugged(transport)
    step(model)
    grad = unit(model.layers[0]).params[0].grad_shard
    assert grad is not None and grad.guard is not None
    grad.guard[:4] = 0
    with pytest.raises(RuntimeError, match=told("a write past the end of the gradient of 'layers.0.norm.weight'")):
        step(model)


# --- what was released ---


@transports
@on_ranks()
def test_a_gradient_that_is_written_after_its_reduction_began_is_noticed_when_the_backward_ends(transport: Any) -> None:
    model = debugged(transport)
    step(model)
    late = unit(model.layers[2]).gradient_slot.views[0]

    def write(_: torch.Tensor) -> None:
        late.zero_()

    model.layers[0].register_forward_hook(lambda module, args, output: output.register_hook(write) and None)
    expected = told("the gradient slot of 'layers.2' was written after it had been released", "reduce-scatter")
    with pytest.raises(RuntimeError, match=expected):
        step(model)


class Counted(nn.Linear):
    """Has an integer parameter, which is all-gathered as any other."""

    def __init__(self) -> None:
        super().__init__(FEATURES, FEATURES)
        self.count = nn.Parameter(torch.arange(8), requires_grad=False)


@on_ranks()
def test_released_integers_hold_a_byte_pattern() -> None:
    model: Any = Chain([Counted(), *blocks(2)])
    for module in (*model.layers, model):
        ours.fully_shard(module, mesh=world_mesh(), debug=True)
    step(model)
    (count,) = (p for p in unit(model.layers[0]).gather_slot.params if not p.is_floating_point())
    assert set(count.detach().view(torch.uint8).tolist()) == {POISON_INTEGER}


# --- who holds what ---


def place_all_at_the_start(requests: Any) -> Any:
    segments, _ = place_right(requests)
    nbytes = max((segment.nbytes for segment in segments), default=0)
    return tuple(memory_layout.Segment(0, segment.nbytes) for segment in segments), nbytes


place_right = memory_layout.place


@transports
@on_ranks()
def test_two_units_that_a_wrong_schedule_puts_into_the_same_bytes_are_named(transport: Any) -> None:
    model = debugged(transport)
    wrong_plan = mock.patch.object(memory_layout, "place", place_all_at_the_start)
    blind = mock.patch.object(allocated_memory, "find_neighbours", lambda slots: None)
    with wrong_plan, blind, mock.patch.dict("os.environ", YAFSDP_DEBUG="planned"):
        model.set_debug_mode(True, own_slots=False)
        expected = told("two units hold the same bytes: the all-gather slot of 'layers.", "is taken", "is held")
        with pytest.raises(RuntimeError, match=expected):
            step(model)


@transports
@on_ranks()
def test_a_unit_that_uses_a_slot_which_it_does_not_hold_is_named(transport: Any) -> None:
    model = debugged(transport)
    step(model)
    slot = unit(model.layers[1]).gather_slot
    with pytest.raises(RuntimeError, match=told("'layers.1' computes with its all-gather slot, which it does not")):
        slot.hold()


# --- what it changes, and what it does not ---


@transports
@pytest.mark.parametrize("own_slots", [True, False])
@on_ranks()
def test_numbers_stay_and_the_plan_is_what_the_arenas_hold(own_slots: bool, transport: Any) -> None:
    twins = Twins(Specimen(lambda: Chain(blocks(4)), vectors(FEATURES), layers_of), transport=transport)
    twins.train(0)
    before = twins.sharded.memory_plan()
    twins.sharded.set_debug_mode(True, own_slots)
    twins.train(1, 2, 3)
    twins.compare_parameters()
    plan, report = twins.sharded.memory_plan(), twins.sharded.memory_report()
    assert report.arena_nbytes == plan.nbytes > before.nbytes and not report.spills
    assert plan.debug_nbytes >= plan.nbytes - before.nbytes and "for debug mode" in str(plan)
    twins.sharded.set_debug_mode(False)
    twins.train(4)
    after = twins.sharded.memory_plan()
    assert (after.nbytes, after.debug_nbytes) == (before.nbytes, 0)


def sharded_with(environment: str, **options: Any) -> bool:
    with mock.patch.dict("os.environ", YAFSDP_DEBUG=environment):
        layer: Any = ours.fully_shard(nn.Linear(4, 4), mesh=world_mesh(), **options)
    layer(torch.ones(2, 4))
    return bool(layer.memory_plan().debug_nbytes)


@on_ranks()
def test_the_environment_sets_it_unless_the_call_says_otherwise() -> None:
    found = {setting: sharded_with(setting) for setting in ("1", "planned", "", "0")}
    assert found == {"1": True, "planned": True, "": False, "0": False}
    assert not sharded_with("1", debug=False)
    assert sharded_with("", debug=True)


def test_guards_lie_around_every_segment_that_is_not_empty() -> None:
    layout = FlatLayout.pack([100, 0, 256], guard_nbytes=GUARD_NBYTES)
    assert [(s.offset_nbytes, s.nbytes) for s in layout.segments] == [(256, 100), (512, 0), (768, 256)]
    assert [(a, b, gap.offset_nbytes, gap.nbytes) for a, b, gap in layout.gaps] == [
        (None, 0, 0, 256),
        (0, 2, 356, 412),
        (2, None, 1024, 256),
    ]
    assert layout.nbytes == 1280 and CANARY != 0
