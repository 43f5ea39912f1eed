"""Law 3, stream order, without a GPU: every access to planned memory is ordered by an event.

Each test trains a small model under vector clocks. The planted races leave out one kind of wait, or one line of the
engine, and must be found.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.clocks import Omission, RaceDetector, VectorClocks
from tests.ranks import run_ranks
from tests.training import world_mesh
from tests.zoo import FEATURES, SPECIMENS, WIDE, Chain, Specimen, blocks, layers_of, vectors
from yafsdp_like import MixedPrecisionPolicy, fully_shard, update_in_backward
from yafsdp_like.comm.mapped_memory import MappedMemory
from yafsdp_like.comm.peer import PeerTransport
from yafsdp_like.comm.process_group import ProcessGroupTransport
from yafsdp_like.kernels.adamw import AdamWTable, AdamWTensors
from yafsdp_like.kernels.reduce import ReduceTable
from yafsdp_like.memory.streams import COMPUTE, GATHER, REDUCE
from yafsdp_like.ops import split_master
from yafsdp_like.ops.split_master import SplitValues
from yafsdp_like.optim import AdamW, offload
from yafsdp_like.optim.offload import OffloadedMoments
from yafsdp_like.shard.runtime import engine as engine_module
from yafsdp_like.shard.runtime import gradients as gradients_module
from yafsdp_like.shard.runtime.gradient_shard import GradientShard
from yafsdp_like.shard.runtime.gradients import GradientLifecycle
from yafsdp_like.shard.runtime.params import ParamLifecycle
from yafsdp_like.shard.runtime.slots import GatherSlot, GradientSlot
from yafsdp_like.shard.runtime.unit_state import unit_of

Plant = Callable[[pytest.MonkeyPatch], None]


def watch_transports(patch: pytest.MonkeyPatch, detector: RaceDetector) -> None:
    """Note by hand what collectives access, and peers read of this rank's memory: no dispatcher sees either."""
    for transport in (ProcessGroupTransport, PeerTransport):
        patch.setattr(transport, "all_gather", _noted_gather(transport.all_gather, detector))
        patch.setattr(transport, "reduce_scatter", _noted_reduce(transport.reduce_scatter, detector))
    stream_barrier = MappedMemory.stream_barrier

    def barrier_noted(self: MappedMemory, stream: str) -> None:
        stream_barrier(self, stream)
        detector.streams.stream_barrier(stream)
        detector.note_read_by_peer()

    patch.setattr(MappedMemory, "stream_barrier", barrier_noted)


def _noted_gather(gather: Any, detector: RaceDetector) -> Any:
    def prepare(self: Any, outputs: Any, inputs: Any, in_place: Any = (), scratch: Any = None) -> Any:
        run = gather(self, outputs, inputs, in_place, scratch)
        written = []
        for index, output in enumerate(outputs):
            chunks = output.view(self.world_size, output.numel() // self.world_size)
            written += [c for rank, c in enumerate(chunks) if rank != self.rank or index not in in_place]

        def noted() -> None:
            detector.note(inputs, False, "gather")
            detector.note(written, True, "gather")
            if self.mapped is not None:
                detector.note(inputs, False, "gather", by_peer=True)
            run()

        return noted

    return prepare


def _noted_reduce(reduce: Any, detector: RaceDetector) -> Any:
    def prepare(self: Any, outputs: Any, inputs: Any, *others: Any) -> Any:
        run = reduce(self, outputs, inputs, *others)

        def noted(reduction: Any, accumulate: bool) -> None:
            if self.mapped is not None:
                detector.read_by_peer = list(inputs)  # after the first barrier, which says that it may
            detector.note(inputs, False, "reduce")
            detector.note(outputs, True, "reduce")
            with detector.streams.work("reduce"):
                run(reduction, accumulate)

        return noted

    return prepare


class EarlyExit(Chain):
    """Never runs its last layer, which is gathered ahead all the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        return x


class ReadAfterItsGradient(Chain):
    """Its backward reads the scale once more when the scale's gradient is complete."""

    def __init__(self) -> None:
        super().__init__(blocks(2))
        self.scale = torch.nn.Parameter(torch.ones(FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x) * self.scale.detach()
        return self.layers[1](x) * self.scale


LONG = Specimen(lambda: Chain(blocks(6)), vectors(FEATURES), layers_of)  # more units than slots
EARLY_EXIT = Specimen(lambda: EarlyExit(blocks(2)), vectors(FEATURES), layers_of)
READ_AFTER = Specimen(ReadAfterItsGradient, vectors(FEATURES), layers_of)
OWN = {"early exit": EARLY_EXIT, "long": LONG, "wide": WIDE, "read after its gradient": READ_AFTER}


@dataclass(frozen=True)
class Found:
    """What one rank's training showed."""

    races: list[str]
    waits: dict[tuple[str, str], int]  # by (waiting stream, stream waited for)
    num_accesses: int


def train(
    name: str,
    forgets: Sequence[tuple[str, str]] = (),
    plant: str | None = None,
    bf16: bool = True,
    own_optimizer: bool = False,
    in_backward: bool = False,
    omits: Omission | None = None,
    updates: int = 1,
    offload_moments: bool = False,
    writes: str = "",
    **options: Any,
) -> Found:
    """Run some steps of a specimen, and an evaluation after each, on this rank under the detector.

    `updates` is how many steps of the optimizer follow a backward, which updates too if `in_backward`;
    `offload_moments` is of our own one, `options` are `fully_shard`'s. Parameters are written to after each evaluation,
    and where `writes` says: "before backward", or "behind unshard", whose all-gather nobody has waited for.
    """
    streams = VectorClocks(forgets, omits)
    detector = RaceDetector(streams)
    specimen = OWN.get(name) or SPECIMENS[name]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "streams_of", lambda device: streams)
        watch_transports(patch, detector)
        watch_gradients(patch, detector)
        watch_split_masters(patch, detector)
        watch_offloaded_moments(patch, detector)
        watch_kernels(patch, detector)
        name_works(patch, streams)
        if plant is not None:
            PLANTS[plant](patch)
        model: Any = specimen.wrap(specimen.fresh(), fully_shard, mesh=world_mesh(), mp_policy=policy, **options)
        model.unshard()  # makes the arena
        model.reshard()
        watch_arenas(model, detector)
        if own_optimizer or in_backward or offload_moments:
            optimizer: torch.optim.Optimizer = AdamW(model.parameters(), lr=1e-2, offload_moments=offload_moments)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if in_backward:
            update_in_backward(cast("AdamW", optimizer))
        with detector:
            for step in range(4):
                loss = specimen.loss_of(model, step, 0)
                if writes == "before backward":
                    write(model)
                loss.backward()
                if not in_backward:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for _ in range(updates):
                    optimizer.step()
                if type(optimizer) is not AdamW:  # whose writes end what may be written before the next forward
                    with torch.no_grad():
                        torch._foreach_mul_(list(model.parameters()), 1.0)  # also those without a gradient
                optimizer.zero_grad(set_to_none=step % 2 == 0)  # so that gradients are both set and added to
                with torch.no_grad():
                    specimen.loss_of(model, step, 0)
                if writes == "behind unshard":
                    model.unshard(async_op=True)
                write(model)
    return Found(detector.races, streams.waits, len(detector.accesses))


@torch.no_grad()
def write(model: Any) -> None:
    for p in model.parameters():
        p.mul_(1.0)


def name_works(patch: pytest.MonkeyPatch, streams: VectorClocks) -> None:
    for name in ("publish", "_settle", "before_update", "after_update"):
        patch.setattr(ParamLifecycle, name, _within(streams, name, getattr(ParamLifecycle, name)))
    for name in ("_free_updated", "_update"):
        patch.setattr(GradientLifecycle, name, _within(streams, name, getattr(GradientLifecycle, name)))


def _within(streams: VectorClocks, name: str, work: Any) -> Any:
    def perform(*args: Any) -> None:
        with streams.work(name):
            work(*args)

    return perform


def watch_arenas(model: Any, detector: RaceDetector) -> None:
    units = {unit for module in model.modules() if (unit := unit_of(module)) is not None}
    for unit in units:
        for p in unit.params:
            detector.watch(p.main, on_host=unit.is_on_host or p.offloads_remainder)
            if p.compute is not p.main:
                detector.watch(p.compute)
        if unit.host_staging is not None:
            detector.watch(unit.host_staging.upload)
            detector.watch(unit.host_staging.download)
        for tensor in (*unit.gather_slot.outputs, *unit.gradient_slot.inputs.values(), unit.staging):
            detector.watch(tensor)


def watch_gradients(patch: pytest.MonkeyPatch, detector: RaceDetector) -> None:
    """Their memory comes and goes, and is anybody's before and after, in the order of the stream that has it then."""
    take = GradientShard.take

    def watched(self: GradientShard) -> None:
        is_new = not self.has_memory
        take(self)
        if is_new:
            detector.watch_new(self.flat)
            detector.note([self.flat], True, "the last owner")
        else:
            detector.watch(self.flat, on_host=self.is_pinned)

    release = GradientShard.release

    def noted(self: GradientShard) -> None:
        if self.has_memory and not self.is_pinned and self.memory.is_free:
            detector.watch_no_more(self.flat)
        release(self)

    patch.setattr(GradientShard, "take", watched)
    patch.setattr(GradientShard, "release", noted)


def watch_split_masters(patch: pytest.MonkeyPatch, detector: RaceDetector) -> None:
    """What is written to them lies beside their halves, in memory of compute's, until it is settled."""
    to_write, settle = SplitValues.to_write, SplitValues.settle

    def watched(self: SplitValues) -> torch.Tensor:
        is_new = self.written is None
        written = to_write(self)
        if is_new:
            detector.watch_new(written)
        detector.note([written], True, "a write to a master")
        return written

    def noted(self: SplitValues) -> bool:
        written = self.written
        settled = settle(self)
        if written is not None:
            detector.note_free(written)
        return settled

    patch.setattr(SplitValues, "to_write", watched)
    patch.setattr(SplitValues, "settle", noted)


def watch_kernels(patch: pytest.MonkeyPatch, detector: RaceDetector) -> None:
    """Note what kernels access; temporary memory of their references is none of theirs, and may have been watched."""
    update, reduce = AdamWTable.update, ReduceTable.reduce

    def noted_update(self: AdamWTable, params: Sequence[AdamWTensors], *others: Any) -> None:
        detector.note([p.grad for p in params], False, "adamw")
        detector.note([t for p in params for t in p.tensors if t is not p.grad], True, "adamw")
        with _disable_current_modes():
            update(self, params, *others)

    def noted_reduce(self: ReduceTable, *args: Any) -> None:
        detector.note([chunk for chunks in self._inputs for chunk in chunks], False, "sum")
        detector.note(self._parts(), True, "sum")
        with _disable_current_modes():
            reduce(self, *args)

    patch.setattr(AdamWTable, "update", noted_update)
    patch.setattr(ReduceTable, "reduce", noted_reduce)


def watch_offloaded_moments(patch: pytest.MonkeyPatch, detector: RaceDetector) -> None:
    """Their buffers and their blocks on the host, which the first step makes."""
    lay_out = OffloadedMoments._lay_out

    def watched(self: OffloadedMoments, batches: Any) -> None:
        lay_out(self, batches)
        for memory in (*self.buffers, *(block.bytes for block in self._blocks)):
            detector.watch(memory)

    for module in (offload, split_master):
        patch.setattr(module, "streams_of", lambda device: detector.streams)
    patch.setattr(offload, "CHUNK_NBYTES", 1024)
    patch.setattr(OffloadedMoments, "_lay_out", watched)


def forget_readers(patch: pytest.MonkeyPatch) -> None:
    for kind in (GatherSlot, GradientSlot):
        patch.setattr(kind, "last_accesses", lambda self: [])


def forget_the_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ParamLifecycle, "begin", lambda self: None)


def forget_unread_prefetches(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ParamLifecycle, "settle_prefetches", lambda self: None)


def forget_reductions(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GradientLifecycle, "wait_for_reductions", lambda self: None)


def release_before_the_last_read(patch: pytest.MonkeyPatch) -> None:
    unshard = ParamLifecycle.unshard

    def early(self: ParamLifecycle, slot: Any, refresh: bool) -> None:
        unshard(self, slot, refresh)
        slot._released = self._streams.record(COMPUTE)

    def late(self: ParamLifecycle, slot: Any) -> None:
        slot.drop()
        slot.unit.register(None)

    patch.setattr(ParamLifecycle, "unshard", early)
    patch.setattr(ParamLifecycle, "release", late)


def reduce_everything_early(patch: pytest.MonkeyPatch) -> None:
    """No race: large parameters of outer units are reduced before their unit's end, and here all are large."""
    patch.setattr(gradients_module, "EARLY_NUMEL", 1)


def forget_barriers_of_reductions(patch: pytest.MonkeyPatch) -> None:
    barrier = VectorClocks.stream_barrier

    def other(self: VectorClocks, stream: str) -> None:
        if stream != REDUCE:
            barrier(self, stream)

    patch.setattr(VectorClocks, "stream_barrier", other)


def let_the_cpu_run_ahead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VectorClocks, "synchronize", lambda self, event: None)


def update_beside_the_reduction(patch: pytest.MonkeyPatch) -> None:
    update = GradientLifecycle._update

    def elsewhere(self: GradientLifecycle, *args: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(gradients_module, "REDUCE", COMPUTE)
            update(self, *args)

    patch.setattr(GradientLifecycle, "_update", elsewhere)


PLANTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        forget_readers,
        forget_the_optimizer,
        forget_unread_prefetches,
        forget_reductions,
        release_before_the_last_read,
        reduce_everything_early,
        forget_barriers_of_reductions,
        let_the_cpu_run_ahead,
        update_beside_the_reduction,
    )
}


ALL_WAITS = {(GATHER, COMPUTE), (COMPUTE, GATHER), (REDUCE, COMPUTE), (COMPUTE, REDUCE)}
MODELS = ["decoder", "nested", "reused", "skipped", "tied", "frozen", "group", "recomputed", "early exit"]
QUICK = ["decoder", "nested", "reused", "skipped", "tied", "recomputed"]


@pytest.mark.slow(unless=lambda name, bf16: bf16 and name in QUICK)
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_access_to_planned_memory_is_ordered_by_an_event(name: str, bf16: bool) -> None:
    for found in run_ranks(train, name, bf16=bf16):
        assert found.races == []
        assert found.num_accesses > 20, "the detector saw nothing"
        assert set(found.waits) == ALL_WAITS


@pytest.mark.slow(unless=lambda name, own_optimizer: own_optimizer and name in QUICK)
@pytest.mark.parametrize("own_optimizer", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_access_of_a_peer_is_ordered_by_a_stream_barrier(name: str, own_optimizer: bool) -> None:
    for found in run_ranks(train, name, own_optimizer=own_optimizer, transport="peer"):
        assert found.races == []
        assert found.num_accesses > 20, "the detector saw nothing"
        assert set(found.waits) == ALL_WAITS


@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_stream_order_holds_whatever_stays_gathered(reshard_after_forward: bool, transport: str) -> None:
    for found in run_ranks(train, "nested", reshard_after_forward=reshard_after_forward, transport=transport):
        assert found.races == []


@pytest.mark.parametrize("transport", ["process_group", "peer"])
def test_reducing_large_parameters_early_is_ordered(transport: str) -> None:
    for found in run_ranks(train, "decoder", plant="reduce_everything_early", transport=transport):
        assert found.races == []


@pytest.mark.parametrize("transport", ["process_group", "peer"])
def test_every_access_is_ordered_in_a_chain_longer_than_its_slots(transport: str) -> None:
    for found in run_ranks(train, "long", transport=transport, own_optimizer=transport == "peer"):
        assert found.races == []
        assert found.num_accesses > 20, "the detector saw nothing"
        assert set(found.waits) == ALL_WAITS


@pytest.mark.parametrize("pair", sorted(ALL_WAITS))
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


@pytest.mark.parametrize(
    ("omission", "race"),
    [
        (("publish", "wait", 1), "_foreach_copy_.* on gather does not wait for .* on compute"),
        (("publish", "stream_barrier", 1), "_foreach_copy_.* on gather does not wait for gather on peer's gather"),
        (("publish", "stream_barrier", 2), "gather on peer's gather does not wait for .*_foreach_copy_.* on gather"),
        (("reduce", "stream_barrier", 1), "reduce on peer's reduce does not wait for .* on compute"),
        (("reduce", "stream_barrier", 2), "on compute does not wait for reduce on peer's reduce"),
    ],
)
def test_leaving_out_a_wait_or_a_stream_barrier_of_peers_is_found(omission: Omission, race: str) -> None:
    for found in run_ranks(train, "decoder", omits=omission, transport="peer"):
        assert any(re.search(race, line) for line in found.races), sorted(set(found.races))


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
