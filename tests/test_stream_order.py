"""Law 3, stream order, without a GPU: every access to planned memory is ordered by an event.

Each test trains a small model under vector clocks. The planted races leave out one kind of wait, or one line of the
engine, and must be found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.clocks import RaceDetector, VectorClocks
from tests.ranks import run_ranks
from tests.zoo import FEATURES, SPECIMENS, Chain, Specimen, blocks, layers_of, vectors, world_mesh
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.comm.process_group import ProcessGroupTransport
from yafsdp_like.memory.streams import COMPUTE, GATHER, REDUCE
from yafsdp_like.shard import engine as engine_module
from yafsdp_like.shard.engine import Engine
from yafsdp_like.shard.unit import unit_of

Plant = Callable[[pytest.MonkeyPatch], None]


def watch_transport(patch: pytest.MonkeyPatch, detector: RaceDetector) -> None:
    """Collectives do not pass the dispatcher as the detector reads it: their accesses are noted by hand."""
    gather, reduce = ProcessGroupTransport.all_gather, ProcessGroupTransport.reduce_scatter

    def all_gather(self: Any, outputs: Any, inputs: Any) -> None:
        detector.note(inputs, False, "all_gather")
        detector.note(outputs, True, "all_gather")
        gather(self, outputs, inputs)

    def reduce_scatter(self: Any, outputs: Any, inputs: Any, reduction: Any) -> None:
        detector.note(inputs, False, "reduce_scatter")
        detector.note(outputs, True, "reduce_scatter")
        reduce(self, outputs, inputs, reduction)

    patch.setattr(ProcessGroupTransport, "all_gather", all_gather)
    patch.setattr(ProcessGroupTransport, "reduce_scatter", reduce_scatter)


class EarlyExit(Chain):
    """Never runs its last layer, which is gathered ahead all the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


EARLY_EXIT = Specimen(lambda: EarlyExit(blocks(2)), vectors(FEATURES), layers_of)


@dataclass(frozen=True)
class Found:
    """What one rank's training showed."""

    races: list[str]
    waits: dict[tuple[str, str], int]  # by (waiting stream, stream waited for)
    num_accesses: int


def train(
    name: str, forgets: Sequence[tuple[str, str]] = (), plant: str | None = None, bf16: bool = True, **options: Any
) -> Found:
    """Some steps of a specimen on this rank under the detector; `options` are `fully_shard`'s."""
    streams = VectorClocks(forgets)
    detector = RaceDetector(streams)
    specimen = EARLY_EXIT if name == "early exit" else SPECIMENS[name]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "streams_of", lambda device: streams)
        watch_transport(patch, detector)
        model: Any = specimen.wrap(specimen.fresh(), fully_shard, mesh=world_mesh(), mp_policy=policy, **options)
        model.unshard()  # makes the arena
        model.reshard()
        watch_arenas(model, detector)
        if plant is not None:
            PLANTS[plant](patch)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with detector:
            for step in range(4):
                specimen.loss_of(model, step, 0).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                with torch.no_grad():
                    torch._foreach_mul_(list(model.parameters()), 1.0)  # also those without a gradient
                optimizer.zero_grad(set_to_none=step % 2 == 0)  # so that gradients are both set and added to
    return Found(detector.races, streams.waits, len(detector.accesses))


def watch_arenas(model: Any, detector: RaceDetector) -> None:
    units = {unit for module in model.modules() if (unit := unit_of(module)) is not None}
    for unit in units:
        for p in unit.params:
            detector.watch(p.main)
            detector.watch(p.compute)
        for slot_tensors in (unit.gather_slot.outputs, [p.grad for p in unit.params if p.trainable]):
            for tensor in slot_tensors:
                detector.watch(tensor)


def forget_readers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "_wait_for_readers", lambda self, stream, slot: None)


def forget_the_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "begin", Engine.build_if_changed)


def forget_unread_prefetches(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "settle_prefetches", lambda self: None)


def forget_reductions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "wait_for_reductions", lambda self: None)


def release_before_the_last_read(patch: pytest.MonkeyPatch) -> None:
    unshard = Engine.unshard

    def early(self: Engine, slot: Any, refresh: bool) -> None:
        unshard(self, slot, refresh)
        slot.released = self.streams.record(COMPUTE)

    def late(self: Engine, slot: Any) -> None:
        slot.state = engine_module.EMPTY
        slot.unit.register(None)

    patch.setattr(Engine, "unshard", early)
    patch.setattr(Engine, "release", late)


PLANTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        forget_readers,
        forget_the_optimizer,
        forget_unread_prefetches,
        forget_reductions,
        release_before_the_last_read,
    )
}


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize(
    "name", ["decoder", "nested", "reused", "skipped", "tied", "frozen", "group", "recomputed", "early exit"]
)
def test_every_access_to_planned_memory_is_ordered_by_an_event(name: str, bf16: bool) -> None:
    for found in run_ranks(train, name, bf16=bf16):
        assert found.races == []
        assert found.num_accesses > 20, "the detector saw nothing"
        assert set(found.waits) == {(GATHER, COMPUTE), (COMPUTE, GATHER), (REDUCE, COMPUTE), (COMPUTE, REDUCE)}


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_stream_order_holds_whatever_stays_gathered(reshard_after_forward: bool) -> None:
    for found in run_ranks(train, "nested", reshard_after_forward=reshard_after_forward):
        assert found.races == []


@pytest.mark.parametrize("pair", [(GATHER, COMPUTE), (COMPUTE, GATHER), (REDUCE, COMPUTE), (COMPUTE, REDUCE)])
def test_leaving_out_one_kind_of_wait_is_found(pair: tuple[str, str]) -> None:
    waiting, waited_for = pair
    for found in run_ranks(train, "decoder", forgets=[pair]):
        assert any(f" on {waiting} " in race and race.endswith(f" on {waited_for}") for race in found.races)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        ("forget_readers", "decoder"),
        ("forget_the_optimizer", "decoder"),
        ("forget_unread_prefetches", "early exit"),
        ("forget_reductions", "decoder"),
        ("release_before_the_last_read", "decoder"),
    ],
)
def test_a_race_planted_in_the_engine_is_found(plant: str, name: str) -> None:
    # Gathers of backward would order what forward left unread: with nothing to gather there, nothing hides it.
    for found in run_ranks(train, name, plant=plant, reshard_after_forward=name != "early exit"):
        assert found.races


def test_the_detector_knows_order_from_race() -> None:
    """The double itself: a write after a wait is no race, the same write without it is one."""
    for waits in (True, False):
        streams = VectorClocks()
        detector = RaceDetector(streams)
        memory = torch.zeros(4)
        detector.watch(memory)
        with detector:
            memory.add_(1)
            event = streams.record(COMPUTE)
            with streams.on(GATHER):
                if waits:
                    streams.wait(GATHER, event)
                memory[:2].mul_(2)
        assert bool(detector.races) is not waits
