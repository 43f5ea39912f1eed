"""Measuring one iteration, and the depth that ranks choose by it, with a made-up clock instead of a GPU's.

Owns `Paced`, streams on which every mark is so many ms after the one before: a gather or a reduction takes that long,
and so does compute between two waits.
"""

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.laws.recording import Parent, events_of, forward
from tests.ranks import on_ranks, run_ranks
from tests.training import Recipe, assert_same_bits, world_mesh
from tests.training import train as train_specimen
from tests.twins import Twins
from tests.zoo import FEATURES, Block, Chain, Specimen, blocks, layers_of, vectors
from yafsdp_like import fully_shard
from yafsdp_like.memory.streams import COMPUTE, GATHER, REDUCE, InOrder
from yafsdp_like.shard import engine as engine_module
from yafsdp_like.shard import stopwatch as stopwatch_module
from yafsdp_like.shard.depth import Depth, Times
from yafsdp_like.shard.graph import repeatable_state
from yafsdp_like.shard.stopwatch import MEASURED, Found, Stopwatch, agreed

GIB = 1 << 30
HIDDEN = {GATHER: 1.0, COMPUTE: 5.0, REDUCE: 1.0}  # what a gather or a computation takes, in ms
EXPOSED = {GATHER: 50.0, COMPUTE: 1.0, REDUCE: 1.0}
LONG = Specimen(lambda: Chain(blocks(6)), vectors(FEATURES), layers_of)
BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
UNDECIDED = MEASURED + 1  # iterations that end before any may decide


@dataclass(frozen=True)
class At:
    """A mark that its stream passes at a time, in ms."""

    time: float
    streams: "Paced"

    def query(self) -> bool:
        return self.streams.has_passed

    def elapsed_time(self, later: "At") -> float:
        return later.time - self.time


class Paced(InOrder):
    """Streams whose marks are `ms` apart; none has been passed while `has_passed` is False."""

    def __init__(self, ms: Mapping[str, float]) -> None:
        self.ms, self.now = ms, Counter[str]()
        self.has_passed = True

    def record(self, stream: str) -> object:
        return object()  # that there is something to wait for

    def mark(self, stream: str) -> At:
        self.now[stream] += self.ms[stream]  # type: ignore[assignment]  # a Counter of floats
        return At(self.now[stream], self)


@contextlib.contextmanager
def measuring(ms: Mapping[str, float], room_nbytes: int = GIB) -> Iterator[Paced]:
    """Engines made inside measure, by a clock of their own."""
    streams = Paced(ms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "streams_of", lambda device: streams)
        patch.setattr(stopwatch_module, "room_nbytes", lambda device: room_nbytes)
        patch.setattr(engine_module, "can_measure", lambda units: True)
        yield streams


def chain() -> Any:
    """Blocks a, b, c, d and e below a root with parameters."""
    model: Any = Parent(*(Block() for _ in range(5)))
    for module in (*model.children(), model):
        fully_shard(module, mesh=world_mesh())
    model.follow_measured_times()
    return model


def train(model: Any, steps: int = 1, set_to_none: bool = True) -> None:
    for _ in range(steps):
        model(torch.ones(2, FEATURES)).sum().backward()
        model.zero_grad(set_to_none)


# --- measuring ---


@on_ranks()
def test_on_a_cpu_nothing_is_measured() -> None:
    model = chain()
    train(model, 2 * MEASURED)
    assert model._engine().stopwatch is None
    assert model._engine().depth == Depth()
    assert "gathering" not in str(model.memory_plan())


@on_ranks()
def test_times_are_those_of_one_iteration() -> None:
    """A block's backward waits for its gather and for its gradient slot, and computes behind each; a, b and c are
    gathered twice. Prevents: counting what is computed in other iterations, or what is waited for.
    """
    with measuring({GATHER: 2.0, COMPUTE: 5.0, REDUCE: 3.0}):
        model = chain()
        train(model, UNDECIDED)
        engine = model._engine()
        measured = engine.stopwatch.times(engine.units)
    assert dict(zip([unit.name for unit in engine.units], measured, strict=True)) == {
        "root": Times(2.0, 5.0, 10.0, 3.0),
        **{name: Times(2.0, 5.0, 10.0, 3.0) for name in "abcde"},
    }


@on_ranks()
def test_evaluations_are_not_measured() -> None:
    """Neither counted as iterations, nor added to the one that is measured."""
    with measuring(HIDDEN):
        model = chain()
        for _ in range(UNDECIDED):
            train(model)
            with torch.no_grad():
                model(torch.ones(2, FEATURES))
        engine = model._engine()
        assert {times.forward for times in engine.stopwatch.times(engine.units)} == {HIDDEN[COMPUTE]}


@on_ranks()
def test_forwards_without_backward_decide_nothing() -> None:
    with measuring(HIDDEN):
        model = chain()
        for _ in range(2 * MEASURED):
            model(torch.ones(2, FEATURES))
        assert model._engine().depth_reason == ""


def test_marks_are_made_in_one_iteration_only() -> None:
    watch, running = Stopwatch(Paced(HIDDEN)), []
    for _ in range(MEASURED + 4):
        watch.next_iteration()
        running.append(watch.is_running)
    assert running == [False] * MEASURED + [True] + [False] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["peer", "process_group"])
def test_on_gpus_times_are_measured_and_a_model_trains_on_with_what_they_decide(transport: str) -> None:
    """The chain is bound by its gathers and launches; whatever is chosen, bits are those of the least depth."""
    for decided, kept in run_ranks(train_on_gpus, transport, device="cuda", timeout=120):
        assert decided == kept


def train_on_gpus(transport: str) -> tuple[list[float], list[float]]:
    """Losses with the depth decided on the way, and with the least."""
    losses: list[list[float]] = []
    for decides in (True, False):
        torch.manual_seed(0)
        model: Any = Chain([Block(512, 2048) for _ in range(8)]).cuda()
        for module in (*model.layers, model):
            fully_shard(module, mesh=world_mesh("cuda"), transport=transport)
        if decides:
            model.follow_measured_times()
        losses.append([])
        for step in range(MEASURED + 6):
            batch = torch.randn(64, 512, generator=torch.Generator().manual_seed(step)).cuda()
            loss = model(batch).square().mean()
            loss.backward()
            losses[-1].append(loss.item())
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.1 * p.grad)
            model.zero_grad()
        plan, engine = model.memory_plan(), model._engine()
        assert plan.nbytes == engine.arena_nbytes
        assert ("ahead" in str(plan)) is decides and engine.stopwatch is None
    return losses[0], losses[1]


# --- deciding ---


@on_ranks()
def test_gathers_that_hide_leave_the_plan_as_it_is() -> None:
    with measuring(HIDDEN):
        model = chain()
        train(model, UNDECIDED)
        plan, engine = model.memory_plan(), model._engine()
        train(model)
    assert engine.depth == Depth()
    assert engine.num_layouts == 1
    assert model.memory_plan().nbytes == plan.nbytes
    assert f"  {Depth()}: " in str(model.memory_plan())
    assert engine.stopwatch is None


@on_ranks()
def test_gathers_that_a_greater_depth_spares_remake_the_plan_once() -> None:
    """Four slots for five blocks: two gathers fewer at the turn from forward to backward."""
    with measuring(EXPOSED):
        model = chain()
        train(model, UNDECIDED)
        before, engine = model.memory_plan(), model._engine()
        train(model, 3)
    plan = model.memory_plan()
    assert engine.depth == Depth(3, 2)
    assert engine.num_layouts == 2
    assert plan.nbytes > before.nbytes
    assert plan.nbytes == engine.arena_nbytes, "the plan is what is held"
    line = next(line for line in str(plan).splitlines() if "ahead" in line)
    assert line.startswith("  gathering 3 ahead, reducing 1 behind: ") and line.endswith(" 1.00 GiB free")
    gathers = [e for e in events_of(train, model) if e[0] == "gather"]
    assert gathers[:5] == forward("gather root", "gather a", "gather b", "gather c", "gather d")


@on_ranks()
def test_the_arena_of_the_plan_before_is_freed() -> None:
    """Prevents: two plans at once, which the room was not measured for. Slots refer to each other."""
    with measuring(EXPOSED):
        model = chain()
        train(model, UNDECIDED)
        arena = weakref.ref(model._engine().building.arena)
        gc.disable()
        try:
            train(model)
        finally:
            gc.enable()
        assert model._engine().depth.gathers > 1
        assert arena() is None


@on_ranks()
def test_the_rank_with_the_least_room_decides_for_all() -> None:
    with measuring(EXPOSED, room_nbytes=0 if dist.get_rank() == 1 else GIB):
        model = chain()
        train(model, UNDECIDED + 1)
    assert model._engine().depth == Depth()
    assert model._engine().num_layouts == 1
    assert str(model.memory_plan()).count(" 0 B free") == 1


@on_ranks()
def test_the_slowest_rank_decides_for_all() -> None:
    with measuring(EXPOSED if dist.get_rank() == 1 else HIDDEN):
        model = chain()
        train(model, UNDECIDED + 1)
    assert model._engine().depth.gathers == 3


@on_ranks()
def test_ranks_decide_when_all_of_them_have_their_times() -> None:
    """Prevents: ranks of different depths, whose collectives would not meet."""
    with measuring(EXPOSED) as streams:
        model = chain()
        train(model, MEASURED)
        streams.has_passed = dist.get_rank() == 0
        train(model, 3)
        assert model._engine().depth == Depth()
        streams.has_passed = True
        train(model)
        assert model._engine().depth.gathers == 3


@on_ranks()
def test_nothing_is_decided_while_gradients_are_held() -> None:
    """They lie in the arena that another plan would leave."""
    with measuring(EXPOSED):
        model = chain()
        train(model, UNDECIDED)
        model(torch.ones(2, FEATURES)).sum().backward()
        assert model._engine().num_layouts == 2, "decided before this forward"
        other = chain()
        train(other, UNDECIDED, set_to_none=False)
        train(other, 2, set_to_none=False)
        assert other._engine().depth == Depth() and other._engine().stopwatch is not None
        other.zero_grad()
        train(other)
        assert other._engine().depth.gathers == 3


@on_ranks()
def test_a_model_that_always_holds_gradients_is_left_alone_after_some_tries() -> None:
    """Prevents: steps that are never recorded, and ranks that ask each other for ever."""
    with measuring(EXPOSED), pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopwatch_module, "MAX_TRIES", 3)
        model = chain()
        train(model, MEASURED + 3, set_to_none=False)
        assert model._engine().stopwatch is not None
        train(model, 1, set_to_none=False)
        assert model._engine().stopwatch is None
        assert model._engine().depth == Depth()


@on_ranks(4)
def test_ranks_of_all_replicas_agree() -> None:
    """Prevents: replicas of different plans, each of which agreed among its own ranks."""
    mesh, rank = init_device_mesh("cpu", (2, 2)), dist.get_rank()
    mine = [Times(*(float(rank if kind == number else 0) for number in range(4))) for kind in range(4)]
    slowest = [Times(*(3.0 if kind == number else 0.0 for number in range(4))) for kind in range(4)]
    assert agreed(Found(mine, 100 - rank), mesh) == Found(slowest, 97)
    assert agreed(Found(mine, 100) if rank != 2 else None, mesh) is None


@on_ranks()
def test_lists_of_the_user_leave_gathers_as_they_are() -> None:
    with measuring(EXPOSED):
        model = chain()
        model.set_modules_to_forward_prefetch([model.a])
        train(model, UNDECIDED + 1)
    assert model._engine().depth.gathers == 1
    assert model._engine().depth_reason != ""


@on_ranks()
def test_steps_are_repeatable_once_the_depth_is_decided() -> None:
    """Prevents: a recording of a plan that is about to be remade, or of the measured iteration."""
    with measuring(EXPOSED):
        model = chain()
        states = []
        for _ in range(UNDECIDED + 2):
            train(model)
            states.append(repeatable_state(model._engine()))
    assert [state is None for state in states] == [True] * UNDECIDED + [False] * 2


@pytest.mark.parametrize("ms", [HIDDEN, EXPOSED], ids=["as it was", "deeper"])
@on_ranks()
def test_a_model_trains_on_as_its_unsharded_twin_when_the_plan_is_remade(ms: Mapping[str, float]) -> None:
    with measuring(ms):
        twins = Twins(LONG)
        twins.sharded.follow_measured_times()
        twins.train(*range(UNDECIDED + 3))
    twins.compare_parameters()
    assert twins.sharded._engine().num_layouts == (2 if ms == EXPOSED else 1)


@pytest.mark.parametrize("depth", [None, Depth(2, 3)], ids=["measured from the least", "measured from another"])
@pytest.mark.parametrize("transport", ["process_group", "peer"])
@on_ranks()
def test_units_that_an_update_gathered_ahead_are_gathered_again_when_the_plan_is_remade(
    transport: str, depth: Depth | None
) -> None:
    """Over peers they are in slots that the new plan leaves. The bits are those of a plan that stays."""
    recipe = Recipe(steps=UNDECIDED + 3, optimizer="our AdamW", transport=transport, precision=BF16, depth=depth)
    kept = train_specimen(LONG, "ours", recipe)
    with measuring(EXPOSED):
        assert_same_bits(train_specimen(LONG, "ours", recipe), kept)
