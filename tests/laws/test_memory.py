"""The plan is the truth: bytes by name, nothing allocated in a step, nothing held beyond it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.ranks import on_ranks, run_ranks
from tests.training import world_mesh
from tests.twins import Twins
from tests.zoo import FEATURES, SPECIMENS, Block, Chain, Specimen, blocks, layers_of, vectors
from yafsdp_like import MixedPrecisionPolicy, SpillWarning, fully_shard
from yafsdp_like.memory.layout import aligned
from yafsdp_like.shard.runtime.engine import engine_for
from yafsdp_like.shard.runtime.gradients import GradientLifecycle
from yafsdp_like.shard.runtime.params import ParamLifecycle
from yafsdp_like.shard.runtime.rebuild import Rebuild
from yafsdp_like.shard.runtime.running import backward_task
from yafsdp_like.shard.runtime.slots import SlotState
from yafsdp_like.shard.runtime.unit_state import Unit, unit_of
from yafsdp_like.shard.spec.unit_spec import UnitLayout

CHAIN = Specimen(lambda: Chain([Block() for _ in range(4)]), vectors(FEATURES), layers_of)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def wrapped(specimen: Specimen, **options: Any) -> Any:
    return specimen.wrap(specimen.fresh(), fully_shard, mesh=world_mesh(), **options)


def units_of(model: nn.Module) -> list[Unit]:
    return list({unit: None for module in model.modules() if (unit := unit_of(module)) is not None})


def step(model: Any, specimen: Specimen, number: int = 0) -> None:
    specimen.loss_of(model, number, 0).backward()


# --- equations ---


@on_ranks(3)
def test_the_plan_of_equal_blocks_is_an_equation() -> None:
    """Shards of every block, and slots of two, however many blocks there are."""
    model = wrapped(CHAIN, mp_policy=BF16)
    plan = model.memory_plan()
    shapes = [tuple(p.shape) for p in model.layers[0].parameters()]
    chunks = [-(-shape[0] // 3) * (shape[1] if len(shape) == 2 else 1) for shape in shapes]
    main = sum(aligned(4 * numel) for numel in chunks)
    compute = sum(aligned(2 * numel) for numel in chunks)
    gather = sum(aligned(3 * 2 * numel) for numel in chunks)
    gradient = sum(aligned(3 * 4 * numel) for numel in chunks)
    assert plan.nbytes_of("main_shard") == 4 * main
    assert plan.nbytes_of("compute_shard") == 4 * compute
    assert plan.nbytes_of("grad_shard") == 4 * main
    assert plan.nbytes_of("gather slots") == 2 * gather
    assert plan.nbytes_of("gradient slots") == 2 * gradient
    assert plan.nbytes == 4 * (main + compute) + 2 * (gather + gradient)
    assert plan.transient_nbytes == 4 * main


@pytest.mark.slow(unless=lambda world_size: world_size == 2)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", list(SPECIMENS))
def test_arenas_hold_what_the_plan_says_before_and_after_training(name: str, world_size: int) -> None:
    run_ranks(compare_plan_with_arenas, name, world_size=world_size)


def compare_plan_with_arenas(name: str) -> None:
    specimen = SPECIMENS[name]
    policies = (
        [MixedPrecisionPolicy()] if name == "convnet" else [MixedPrecisionPolicy(), BF16]
    )  # its buffers stay fp32
    for policy in policies:
        model = wrapped(specimen, mp_policy=policy)
        planned = model.memory_plan().nbytes
        for number in range(2):
            step(model, specimen, number)
            assert model.memory_report().arena_nbytes == model.memory_plan().nbytes == planned
        assert model.memory_report().spills == ()
        assert storage_nbytes(model) == planned


def storage_nbytes(model: nn.Module) -> int:
    """What the arenas really take: granules, and what was allocated without them; what slots alias is counted once."""
    units = units_of(model)
    engine = units[0].engine
    assert engine is not None and engine.memory.arena is not None
    total = 0
    for arena in (engine.memory.arena, *(unit.arena for unit in units)):
        spots = [arena._spots[name] for name in arena.regions]
        total += sum({id(spot.block): spot.block.physical.nbytes for spot in spots if spot.block}.values())
        total += sum({s.storage.data_ptr(): s.storage.nbytes() for s in spots if not s.block and s.nbytes}.values())
    return total


@on_ranks(1)
def test_on_one_rank_the_slot_is_the_shard() -> None:
    """Prevents: a second copy of the whole model where there is nothing to gather."""
    model = wrapped(CHAIN)
    assert model.memory_plan().nbytes_of("gather slots") == 0
    step(model, CHAIN)
    for unit in units_of(model):
        for p, output in zip(unit.params, unit.gather_slot.outputs, strict=True):
            assert output.data_ptr() == p.main.data_ptr()


@on_ranks()
def test_a_plan_is_made_without_allocating_even_on_meta() -> None:
    with torch.device("meta"):
        model: Any = CHAIN.build()
    CHAIN.wrap(model, fully_shard, mesh=world_mesh(), mp_policy=BF16)
    with NewStorages() as new:
        plan = model.memory_plan()
    assert new.operations == []
    assert all(unit.arena.nbytes == 0 for unit in units_of(model))
    assert plan.nbytes == wrapped(CHAIN, mp_policy=BF16).memory_plan().nbytes


# --- allocation ---


class NewStorages(TorchDispatchMode):
    """Notes every operation that makes a tensor on memory of its own, and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and _storage(tensor) not in known:
                self.operations.append((str(func), tensor.untyped_storage().nbytes()))
        return result


def _storage(tensor: torch.Tensor) -> int:
    local = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage()._cdata


ENGINE_WORK: dict[type, Sequence[str]] = {
    Rebuild: ["if_changed"],
    ParamLifecycle: ["begin", "all_gather", "prefetch", "unshard", "release"],
    GradientLifecycle: ["view", "arrived", "reduce_scatter"],
}


@contextlib.contextmanager
def allocations_of_the_runtime() -> Iterator[NewStorages]:
    """What the engine allocates while it is at work, and not what the model does around it."""
    new = NewStorages()

    def watched(work: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with new:
                return work(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ENGINE_WORK.items():
            for name in names:
                patch.setattr(owner, name, watched(getattr(owner, name)))
        yield new


@pytest.mark.parametrize("name", ["decoder", "nested", "tied", "skipped", "frozen"])
def test_the_runtime_allocates_nothing_after_the_first_step(name: str) -> None:
    run_ranks(train_without_allocations, name)


def train_without_allocations(name: str) -> None:
    specimen = SPECIMENS[name]
    model = wrapped(specimen, mp_policy=BF16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(4):
        with allocations_of_the_runtime() as new:
            step(model, specimen, number)
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
        if number == 0:
            assert new.operations, "the arena itself is made in the first step, and the test must see it"
        else:
            assert new.operations == []


@on_ranks()
def test_initialization_from_meta_never_holds_a_full_unit() -> None:
    """Prevents: a model that fits sharded and cannot be made."""
    with torch.device("meta"):
        model: Any = CHAIN.build()
    CHAIN.wrap(model, fully_shard, mesh=world_mesh())
    with NewStorages() as new:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.5)
    largest_shard = max(unit.arena.nbytes for unit in units_of(model))
    assert new.operations and max(nbytes for _, nbytes in new.operations) <= largest_shard
    step(model, CHAIN)


# --- laws of slots ---


@on_ranks()
def test_a_unit_has_one_address_for_all_forwards_and_backwards() -> None:
    """Law 1. Prevents: backward reading another unit's parameters through views that forward saved."""
    model = wrapped(CHAIN)
    addresses: dict[str, set[int]] = {}

    def note(slot: Any) -> None:
        if slot.params:
            addresses.setdefault(slot.unit.name, set()).add(slot.params[0].data_ptr())

    gather = ParamLifecycle.all_gather
    with pytest.MonkeyPatch.context() as patch:
        noted: Any = lambda self, slot, refresh: (note(slot), gather(self, slot, refresh))  # noqa: E731
        patch.setattr(ParamLifecycle, "all_gather", noted)
        for number in range(3):
            step(model, CHAIN, number)
            with torch.no_grad():
                CHAIN.loss_of(model, number, 0)
    assert len(addresses) == 4 and all(len(found) == 1 for found in addresses.values())
    assert len(set.union(*addresses.values())) == 2  # two addresses alternate


@on_ranks()
def test_a_gather_does_not_touch_the_version_of_what_autograd_saved() -> None:
    """Law 2. Prevents: "modified by an inplace operation" in backward, of this unit or of one that shares its bytes."""
    model = wrapped(CHAIN)
    model.unshard()
    step(model, CHAIN)
    slots = [unit.gather_slot for unit in units_of(model) if unit.params]
    before = [p._version for slot in slots for p in slot.params]
    step(model, CHAIN)
    assert [p._version for slot in slots for p in slot.params] == before


@on_ranks()
def test_gathering_over_a_neighbour_in_use_is_refused() -> None:
    """Law 3. Prevents: a gather that overwrites what a running module reads."""
    model = wrapped(CHAIN)
    model.unshard()  # as the root
    first, third = model.layers[0], model.layers[2]
    first.unshard()
    engine, slot = engine_for(unit_of(first), model), unit_of(third).gather_slot
    assert [blocker.unit.name for blocker in engine.params.blockers(slot)] == ["layers.0"]
    with pytest.raises(AssertionError):
        engine.params.all_gather(slot, refresh=True)


@on_ranks()
def test_every_slot_is_free_after_a_step() -> None:
    model = wrapped(SPECIMENS["nested"])
    step(model, SPECIMENS["nested"])
    for unit in units_of(model):
        assert unit.gather_slot.state is unit.gradient_slot.state is SlotState.EMPTY
        assert unit.registered is None and not unit.running.pending and not unit.running.calls


# --- spills ---


class Delegating(Chain):
    """Its second layer runs its last one inside its own forward, though that is no submodule of it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.layers[1].helper = [self.layers[3]]  # in a list, which nn.Module does not look into

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[2](self.layers[1](self.layers[0](x)))


class Delegator(Block):
    helper: list[nn.Module]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.helper[0](x))


DELEGATING = Specimen(lambda: Delegating([Block(), Delegator(), Block(), Block()]), vectors(FEATURES), layers_of)


@on_ranks()
def test_a_gather_that_the_plan_did_not_foresee_is_right_counted_and_planned_from_then_on() -> None:
    twins = Twins(DELEGATING)
    with pytest.warns(SpillWarning, match=r"takes [\d,]+ bytes beyond the memory plan"):
        twins.backward(0)
    twins.step()
    report, plan = twins.sharded.memory_report(), twins.sharded.memory_plan()
    assert [spill.region for spill in report.spills] == ["layers.3.gather_slot", "layers.3.gradient_slot"]
    assert report.arena_nbytes == plan.nbytes
    assert plan.nbytes_of("spill") == sum(spill.nbytes for spill in report.spills) > 0
    for number in range(1, 4):  # warnings are errors: nothing spills again
        twins.backward(number)
        twins.step()
    later = twins.sharded.memory_report()
    assert (later.spills, later.arena_nbytes) == (report.spills, report.arena_nbytes)


@on_ranks()
def test_unsharding_more_than_the_plan_has_room_for_spills() -> None:
    model = wrapped(CHAIN)
    values = [p.full_tensor() for p in model.parameters()]
    model.unshard()  # as the root
    with pytest.warns(SpillWarning):
        for layer in model.layers:
            layer.unshard()
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    for layer in model.layers:
        layer.reshard()


@on_ranks()
def test_unsynced_gradients_are_planned_under_their_own_name() -> None:
    model = wrapped(CHAIN)
    shared = model.memory_plan().nbytes_of("gradient slots")
    model.set_requires_gradient_sync(False)
    plan = model.memory_plan()
    assert plan.nbytes_of("gradient slots") == 0
    assert plan.nbytes_of("unsynced gradients") == 2 * shared  # four blocks, each with a slot of its own
    step(model, CHAIN)
    assert model.memory_report().arena_nbytes == plan.nbytes


@on_ranks()
def test_a_backward_that_cannot_have_its_bytes_names_units_phase_and_remedy() -> None:
    model = wrapped(CHAIN)
    loss = CHAIN.loss_of(model, 0, 0)
    model.layers[1].unshard()  # over the bytes of layers.3, whose backward comes first
    with pytest.raises(
        RuntimeError, match=r"backward of 'layers\.3' .*\['layers\.1'\].*rank \d.*reshard_after_forward"
    ):
        loss.backward()
    step(model, CHAIN)  # and the next step is right again
    assert backward_task() is None and all(b.gather_slot.state is SlotState.EMPTY for b in units_of(model))


def test_a_large_embedding_does_not_inflate_the_slots_of_blocks() -> None:
    run_ranks(plan_with_a_large_embedding)


def plan_with_a_large_embedding() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(600, FEATURES), *blocks(4))

    torch.manual_seed(0)
    model: Any = build()
    for layer in model:
        fully_shard(layer, mesh=world_mesh())
    fully_shard(model, mesh=world_mesh())
    slots_nbytes = model.memory_plan().nbytes_of("gather slots")
    sizes = [UnitLayout.of(unit_of(layer).param_specs()).gather_slot.nbytes for layer in model]
    assert slots_nbytes == sizes[0] + sizes[1]  # and not twice the embedding
