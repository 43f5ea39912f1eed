"""Several models whose slots lie in one arena: the numbers of models that share nothing, in the largest's memory."""

import gc
import re
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import Shard

from tests.clocks import RaceDetector, VectorClocks
from tests.laws.test_stream_order import watch_arenas, watch_gradients, watch_kernels, watch_transports
from tests.ranks import on_ranks, run_ranks
from tests.training import IMPLEMENTATIONS, assert_tensors_equal, full, full_parameters, world_mesh
from tests.twins import rows, spilling
from tests.zoo import FEATURES, Chain
from yafsdp_like import CPUOffloadPolicy, GraphedStep, MixedPrecisionPolicy, SharedSlots, fully_shard, share_slots
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.runtime import engine as engine_module
from yafsdp_like.shard.runtime import shared_slots
from yafsdp_like.shard.runtime.slots import GatherSlot, SlotState
from yafsdp_like.shard.runtime.unit_state import Unit, unit_of

TRANSPORTS = ["process_group", "peer"]
transports = pytest.mark.parametrize("transport", TRANSPORTS)
mainly_peers = pytest.mark.parametrize("transport", ["peer", pytest.param("process_group", marks=pytest.mark.slow)])
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


class Headed(Chain):
    """Layers between parameters of the root's own, which stay from its forward to its backward."""

    def __init__(self, num_layers: int, outputs: int = FEATURES, width: int = 20) -> None:
        super().__init__([nn.Linear(width, width) for _ in range(num_layers)])
        self.entry = nn.Linear(FEATURES, width)
        self.head = nn.Linear(width, outputs, bias=False)
        self.inner: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(self.entry(x))
        return self.head(x if self.inner is None else x + self.inner(x[:, :FEATURES]).mean())


def sharded(num_layers: int, outputs: int = FEATURES, impl: str = "ours", **options: Any) -> Any:
    torch.manual_seed(num_layers)
    model, names = Headed(num_layers, outputs), IMPLEMENTATIONS[impl]
    for unit in (*model.layers, model):
        names.fully_shard(unit, mesh=world_mesh(), **options)
    return model


def on_the_last_dimension(param: nn.Parameter) -> Shard:
    return Shard(param.ndim - 1 if param.shape[-1] % 2 == 0 else 0)


def three(shares: bool = True, **options: Any) -> tuple[dict[str, Any], SharedSlots | None]:
    """A policy, a reference that is frozen and longer, and a critic."""
    models = {"policy": sharded(2, **options), "reference": sharded(3, **options), "critic": sharded(2, 1, **options)}
    models["reference"].requires_grad_(False)
    return models, share_slots(**models) if shares else None


def units_of(model: Any) -> list[Unit]:
    return list({unit: None for module in model.modules() if (unit := unit_of(module)) is not None})


def adam(model: nn.Module, own: bool) -> torch.optim.Optimizer:
    return (AdamW if own else torch.optim.AdamW)(model.parameters(), lr=0.02)


def tune(models: dict[str, Any], steps: int = 2, own_optimizer: bool = False) -> list[float]:
    """A loop as of reinforcement learning: the reference runs between the policy's forward and its backward."""
    policy, reference, critic = models.values()
    optimizers = [adam(policy, own_optimizer), adam(critic, own_optimizer)]
    losses = []
    for step in range(steps):
        x = rows(step)
        with torch.no_grad():
            values, before = critic(x), reference(x)
        drawn = policy(x)
        with torch.no_grad():
            torch.testing.assert_close(reference(x), before, rtol=0, atol=0)
        of_policy = (drawn - before).square().mean() + (drawn.mean(1, keepdim=True) * values).mean()
        of_policy.backward()
        optimizers[0].step()
        of_critic = (critic(x) - x.square().mean(1, keepdim=True)).square().mean()
        of_critic.backward()
        optimizers[1].step()
        losses += [of_policy.item(), of_critic.item()]
        for optimizer in optimizers:
            optimizer.zero_grad()
    return losses


def all_parameters(models: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": p for name, model in models.items() for key, p in full_parameters(model).items()}


# --- numbers ---


@transports
@on_ranks()
def test_losses_and_parameters_are_those_of_models_that_share_nothing_and_of_fsdp2(transport: Any) -> None:
    options = {"transport": transport}
    (alone, _), (together, slots) = three(shares=False, **options), three(**options)
    assert slots is not None
    planned = slots.memory_plan()
    losses = tune(together)
    assert losses == tune(alone)
    assert_tensors_equal(all_parameters(together), all_parameters(alone))
    stock, _ = three(shares=False, impl="stock")
    torch.testing.assert_close(losses, tune(stock), rtol=0, atol=0)
    assert_tensors_equal(all_parameters(together), all_parameters(stock))
    assert slots.arena_nbytes == slots.memory_plan().nbytes == planned.nbytes
    assert all(model.memory_report().spills == () for model in together.values())


@pytest.mark.slow
@transports
@on_ranks()
def test_our_optimizer_and_bf16_give_the_same_bits_with_slots_shared(transport: Any) -> None:
    """Over peers, the optimizer all-gathers units ahead that another model then takes the bytes of."""
    options = {"transport": transport, "mp_policy": BF16, "split_master": transport == "peer"}
    (alone, _), (together, _) = three(shares=False, **options), three(**options)
    assert tune(together, own_optimizer=True) == tune(alone, own_optimizer=True)
    assert_tensors_equal(all_parameters(together), all_parameters(alone))


def same_with_options(**options: Any) -> None:
    (alone, _), (together, slots) = three(shares=False, **options), three(**options)
    assert tune(together, steps=1) == tune(alone, steps=1)
    assert_tensors_equal(all_parameters(together), all_parameters(alone))
    assert slots is not None and slots.arena_nbytes == slots.memory_plan().nbytes


@pytest.mark.slow  # another pool of workers
def test_on_one_rank_only_gradient_slots_are_shared_and_numbers_are_the_same() -> None:
    run_ranks(same_with_options, world_size=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"offload_policy": CPUOffloadPolicy()},
        {"reshard_after_forward": False},
        {"shard_placement_fn": on_the_last_dimension, "reshard_after_forward": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_slots_are_shared_wherever_parameters_lie_and_however_long_they_stay(options: Any) -> None:
    """With scratch of the host's, with layout staging, and with slots that wait for their backward."""
    run_ranks(same_with_options, **options)


# --- bytes ---


@mainly_peers
@on_ranks()
def test_slots_take_the_largest_models_bytes_and_everything_else_the_sum(transport: Any) -> None:
    alone, _ = three(shares=False, transport=transport)
    plans = [model.memory_plan() for model in alone.values()]
    _, slots = three(transport=transport)
    assert slots is not None
    plan = slots.memory_plan()
    for kind in ("gather slots", "gradient slots", "staging"):
        assert plan.nbytes_of(kind) == max(p.nbytes_of(kind) for p in plans), kind
        assert plan.nbytes_of(kind) < sum(p.nbytes_of(kind) for p in plans) or not plan.nbytes_of(kind)
    for kind in ("main_shard", "compute_shard", "grad_shard"):
        assert plan.nbytes_of(kind) == sum(p.nbytes_of(kind) for p in plans), kind
    assert "slots and staging shared by policy, reference, critic" in str(plan)
    assert [phase.name for phase in plan.phases_of("gather slots")][::3] == [
        "policy forward",
        "reference forward",
        "critic forward",
    ]


@mainly_peers
@on_ranks()
def test_each_models_arenas_hold_its_plan_shared_regions_included(transport: Any) -> None:
    models, slots = three(transport=transport)
    assert slots is not None
    planned = {name: model.memory_plan().nbytes for name, model in models.items()}
    tune(models, steps=1)
    for name, model in models.items():
        assert model.memory_report().arena_nbytes == model.memory_plan().nbytes == planned[name]
    regions = [unit_of(model).engine.memory.arena.storage("gather slots") for model in models.values()]  # type: ignore[union-attr]
    assert len({(storage.data_ptr(), start) for storage, start in regions}) == 1


@on_ranks()
def test_a_plan_of_models_on_the_meta_device_is_that_of_the_built_ones() -> None:
    with torch.device("meta"):
        unbuilt, slots = three()
    _, built = three()
    assert slots is not None and built is not None
    assert slots.memory_plan() == built.memory_plan()
    assert slots.arena_nbytes == 0
    with pytest.raises(RuntimeError, match="materialized from meta device"):
        unbuilt["policy"](rows())


@on_ranks()
def test_slots_that_alias_shards_are_shared_in_granules_that_suit_all_models() -> None:
    def chain(width: int, num: int) -> Any:
        torch.manual_seed(num)
        model: Any = Chain([nn.Linear(width, width) for _ in range(num)])
        for unit in (*model.layers, model):
            fully_shard(unit, mesh=world_mesh(), transport="peer")
        return model

    def run(wide: Any, narrow: Any) -> list[float]:
        losses = []
        for step in range(2):
            for model, width in ((wide, 128), (narrow, 64)):
                losses.append(model(torch.full((2, width), 0.1 * step)).square().mean())
                losses[-1].backward()
        return [loss.item() for loss in losses] + [p.grad.to_local().sum().item() for p in wide.parameters()]

    together, alone = (chain(128, 3), chain(64, 4)), (chain(128, 3), chain(64, 4))
    slots = share_slots(wide=together[0], narrow=together[1])
    assert run(*together) == run(*alone)
    aliased = [bool(unit.gather_slot.aliased) for model in together for unit in units_of(model) if unit.params]
    assert all(aliased)
    assert slots.arena_nbytes == slots.memory_plan().nbytes


# --- order ---


class Calls:
    """Calls a model without being its parent."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def compare_with_alone(shares: bool, run: Callable[[Any, Any], list[torch.Tensor]]) -> Any:
    """Losses and gradients of a policy and a critic after ``run``, which is given both."""
    policy, critic = sharded(3), sharded(2)
    if shares:
        share_slots(policy=policy, critic=critic)
    losses = run(policy, critic)
    gradients = {name: full(p.grad) for m in (policy, critic) for name, p in m.named_parameters() if p.grad is not None}
    return [loss.detach() for loss in losses], gradients, (policy, critic)


def same_as_alone(run: Callable[[Any, Any], list[torch.Tensor]]) -> tuple[Any, Any]:
    losses, gradients, models = compare_with_alone(True, run)
    expected, expected_gradients, _ = compare_with_alone(False, run)
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    assert gradients
    assert_tensors_equal(gradients, expected_gradients)
    return models


@spilling
@on_ranks()
def test_a_model_that_is_trained_inside_anothers_forward_spills_and_is_right() -> None:
    def run(policy: Any, critic: Any) -> list[torch.Tensor]:
        policy.inner = Calls(critic)
        loss = policy(rows()).square().mean()
        loss.backward()
        return [loss, policy(rows(1)).square().mean()]

    with pytest.warns(UserWarning, match=r"critic\..* its forward began inside that of \['policy\."):
        policy, critic = same_as_alone(run)
    for model in (policy, critic):
        assert model.memory_report().arena_nbytes == model.memory_plan().nbytes
    assert policy.memory_report().spills == ()


def both_at_once(policy: Any, critic: Any) -> list[torch.Tensor]:
    losses = [policy(rows()).square().mean(), critic(rows(1)).square().mean()]
    (losses[0] + losses[1]).backward()
    return losses


def one_by_one(policy: Any, critic: Any) -> list[torch.Tensor]:
    losses = [policy(rows()).square().mean(), critic(rows(1)).square().mean()]
    for loss in losses:
        loss.backward()
    return losses


def critic_of_policy(policy: Any, critic: Any) -> list[torch.Tensor]:
    loss = critic(policy(rows())).square().mean()
    loss.backward()
    return [loss]


@pytest.mark.parametrize(
    "run",
    [both_at_once, *(pytest.param(run, marks=pytest.mark.slow) for run in (one_by_one, critic_of_policy))],
)
@spilling
@on_ranks()
def test_backwards_of_two_models_may_be_one_or_follow_each_other(
    run: Callable[[Any, Any], list[torch.Tensor]],
) -> None:
    """Prevents: the slot of a root, whose backward ends last, being taken by the other model's layers."""
    same_as_alone(run)


@pytest.mark.slow
@spilling
@on_ranks()
def test_a_model_that_is_unsharded_by_hand_keeps_its_values_while_others_run() -> None:
    def run(policy: Any, critic: Any) -> list[torch.Tensor]:
        policy(rows()).sum().backward()
        policy.unshard()
        kept = policy.head.weight.detach().clone()
        loss = critic(rows()).square().mean()
        loss.backward()
        assert torch.equal(policy.head.weight, kept)
        policy.reshard()
        last = critic(rows(1)).square().mean()
        policy.unshard()  # the critic needs these bytes for its backward
        last.backward()
        policy.reshard()
        return [loss, last]

    policy, _ = same_as_alone(run)
    reasons = [spill.reason for spill in policy.memory_report().spills]
    assert reasons and re.search(r"unshard\(\) was called while \[.*critic.*\] awaits its backward", reasons[-1])


@on_ranks()
def test_a_slot_that_a_prefetch_would_take_is_left_to_who_holds_it() -> None:
    policy, critic = sharded(3), sharded(2)
    share_slots(policy=policy, critic=critic)
    policy(rows()).sum().backward()
    critic(rows()).sum().backward()
    policy.unshard()
    held = unit_of(policy)
    assert held is not None and held.gather_slot.state is SlotState.HELD
    engine = engine_module.engine_of(held)
    other = engine_module.engine_of(units_of(critic)[0])
    assert engine is not None and other is not None
    for unit in units_of(critic):
        other.params.prefetch(unit, refresh=True)
        overlaps = held.gather_slot in unit.gather_slot.neighbours
        assert (unit.gather_slot.state is SlotState.FILLED) is not overlaps
    other.params.settle_prefetches()
    policy.reshard()


# --- changes and failures ---


@pytest.mark.parametrize("changed", ["critic", pytest.param("policy", marks=pytest.mark.slow)])
@spilling
@on_ranks()
def test_a_plan_that_is_made_anew_leaves_what_others_have_saved_in_the_old_arena(changed: str) -> None:
    """Prevents: new places over the bytes that a backward which is still to come will read."""

    def run(policy: Any, critic: Any) -> list[torch.Tensor]:
        models = {"policy": policy, "critic": critic}
        models[changed].layers[0].requires_grad_(False)
        losses = [policy(rows()).square().mean(), critic(rows(1)).square().mean()]
        models[changed].layers[0].requires_grad_(True)
        losses.append(models[changed](rows(2)).square().mean())  # builds again
        losses.append(policy(rows(3)).square().mean())
        for loss in losses:
            loss.backward()
        return losses

    models = same_as_alone(run)
    models[1](rows())
    arenas = {unit_of(model).engine.memory.shared_arena for model in models}  # type: ignore[union-attr]
    assert len(arenas) == 1
    slots = SharedSlots(unit_of(models[0]).engine.memory.shared)  # type: ignore[union-attr, arg-type]
    assert slots.arena_nbytes == slots.memory_plan().nbytes
    held = {region.name: region.nbytes for region in next(iter(arenas)).regions.values()}
    assert held["gather slots"] == max(model.memory_plan().nbytes_of("gather slots") for model in models)


@pytest.mark.slow
@on_ranks()
def test_gradients_that_are_not_synchronized_get_room_of_their_own_and_others_move() -> None:
    def run(policy: Any, critic: Any) -> list[torch.Tensor]:
        losses = []
        for step in range(4):
            policy.set_requires_gradient_sync(step % 2 == 1)
            losses.append(policy(rows(step)).square().mean())
            losses[-1].backward()
            losses.append(critic(rows(step)).square().mean())
            losses[-1].backward()
        return losses

    policy, critic = same_as_alone(run)
    assert policy.memory_report().spills == critic.memory_report().spills == ()
    slots = SharedSlots(unit_of(policy).engine.memory.shared)  # type: ignore[union-attr, arg-type]
    assert slots.arena_nbytes == slots.memory_plan().nbytes


class Fails(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raise FloatingPointError("planted")


@on_ranks()
def test_a_backward_that_failed_holds_no_slot_of_the_model_that_runs_next() -> None:
    policy, critic = sharded(3), sharded(2)
    share_slots(policy=policy, critic=critic)
    policy.layers[1].register_forward_hook(lambda module, args, output: Fails.apply(output))
    with pytest.raises(FloatingPointError, match="planted"):
        policy(rows()).sum().backward()
    critic(rows()).sum().backward()
    assert critic.memory_report().spills == ()


@mainly_peers
@on_ranks()
def test_a_model_that_is_deleted_frees_its_shards_while_the_others_go_on(transport: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        models, slots = three(transport=transport)
        assert slots is not None
        tune(models, steps=1)
        arenas = [weakref.ref(unit.arena) for unit in units_of(models["reference"]) if unit.params]
        before = slots.arena_nbytes
        freed = sum(arena().nbytes for arena in arenas)  # type: ignore[union-attr]
        del models["reference"]
        assert not any(arena() for arena in arenas)
        assert slots.arena_nbytes <= before - freed
        models["policy"](rows()).sum().backward()
        assert slots.arena_nbytes == slots.memory_plan().nbytes
        models.clear()
        assert slots._sharing.arena is None and slots.arena_nbytes == 0
        with pytest.raises(RuntimeError, match="all were deleted"):
            slots.memory_plan()
    finally:
        gc.enable()


# --- who watches ---


@mainly_peers
@pytest.mark.parametrize("own_slots", [False, pytest.param(True, marks=pytest.mark.slow)])
@on_ranks()
def test_debug_mode_of_one_model_checks_all_and_finds_nothing_wrong(own_slots: bool, transport: Any) -> None:
    models, slots = three(transport=transport)
    assert slots is not None
    models["critic"].set_debug_mode(True, own_slots=own_slots)
    expected, _ = three(shares=False, transport=transport)
    assert tune(models, steps=1) == tune(expected, steps=1)
    assert slots.arena_nbytes == slots.memory_plan().nbytes
    checked = [unit_of(model).engine.params.debug for model in models.values()]  # type: ignore[union-attr]
    assert all(checked)
    models["policy"].set_debug_mode(False)
    assert tune(models, steps=1) == tune(expected, steps=1)


def strangers(slots: Any, others: Any) -> None:
    """What was planted: models do not know of each other's slots."""


def wait_for_own_readers_only(patch: pytest.MonkeyPatch) -> None:
    last_accesses = GatherSlot.last_accesses

    def own(self: GatherSlot) -> list[Any]:
        neighbours, engine = self.neighbours, self.unit.engine  # type: ignore[attr-defined]
        self.neighbours = [other for other in neighbours if other.unit.engine is engine]  # type: ignore[attr-defined]
        events = last_accesses(self)
        self.neighbours = neighbours
        return events

    patch.setattr(GatherSlot, "last_accesses", own)


@on_ranks()
def test_debug_mode_finds_two_models_that_hold_the_same_bytes() -> None:
    with mock.patch.object(shared_slots, "introduce", strangers):
        policy, critic = sharded(3, debug=True), sharded(2)
        share_slots(policy=policy, critic=critic)
        policy.set_debug_mode(True, own_slots=False)
        policy.inner = Calls(critic)
        with pytest.raises(RuntimeError, match=r"two units hold the same bytes: .*'critic\.root'.*'policy\."):
            policy(rows())


def races(transport: str, planted: bool) -> list[str]:
    """What the race detector says of a loop over three models that share slots."""
    streams = VectorClocks()
    detector = RaceDetector(streams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "streams_of", lambda device: streams)
        watch_transports(patch, detector)
        watch_gradients(patch, detector)
        watch_kernels(patch, detector)
        if planted:
            wait_for_own_readers_only(patch)
        models, _ = three(transport=transport, mp_policy=BF16)
        for model in models.values():
            model.unshard()  # makes the arena
            model.reshard()
            watch_arenas(model, detector)
        with detector:
            tune(models, steps=1, own_optimizer=transport == "peer")
    assert len(detector.accesses) > 50, "the detector saw nothing"
    return detector.races


@pytest.mark.parametrize("transport", ["process_group", pytest.param("peer", marks=pytest.mark.slow)])
def test_each_access_to_another_models_bytes_is_ordered_by_an_event(transport: str) -> None:
    assert run_ranks(races, transport, planted=False) == [[], []]


@pytest.mark.slow
def test_a_model_that_waits_for_no_reader_of_another_is_found_as_a_race() -> None:
    for found in run_ranks(races, "process_group", planted=True):
        assert any("gather does not wait for" in race for race in found)


# --- what is refused ---


def refused(*words: str) -> Any:
    return pytest.raises((ValueError, RuntimeError), match=".*".join(map(re.escape, words)))


@on_ranks()
def test_what_cannot_share_slots_is_one_clear_error() -> None:
    policy, critic = sharded(3), sharded(2)
    with refused("at least two models by name, found ['policy']"):
        share_slots(policy=policy)
    with refused("modules that fully_shard returned, found Linear as 'head'"):
        share_slots(policy=policy, head=policy.head)
    with refused("without a module in common, found unit", "in 'block' and in 'policy'"):
        share_slots(policy=policy, block=policy.layers[0])
    share_slots(policy=policy, critic=critic)
    with refused("'critic', or a module in it, shares slots already", f"rank {dist.get_rank()}", "once"):
        share_slots(other=sharded(2), critic=critic)
    late, other = sharded(2), sharded(2)
    late(rows())
    with refused("called when 'late' had run", "before the first forward of any"):
        share_slots(other=other, late=late)
    other.set_debug_mode(False)  # makes it the root
    with refused("outermost sharded modules, found 'block' inside of another"):
        share_slots(critic=sharded(2), block=other.layers[0])


@on_ranks()
def test_a_module_around_a_model_that_shares_slots_cannot_take_it_over() -> None:
    policy, critic = sharded(3), sharded(2)
    outer: Any = Chain([policy])
    outer.scale = nn.Parameter(torch.ones(FEATURES))
    fully_shard(outer, mesh=world_mesh())
    share_slots(policy=policy, critic=critic)
    with refused("share_slots the outermost sharded modules"):
        outer(rows())
    policy(rows()).sum().backward()


@on_ranks()
def test_a_step_of_a_model_that_shares_slots_is_not_recorded() -> None:
    policy, critic = sharded(3), sharded(2)
    share_slots(policy=policy, critic=critic)
    step = GraphedStep(lambda x: policy(x).sum(), policy)
    with refused("slots that other models use between its replays"):
        step(rows())


def differ_in_the_critic() -> None:
    policy, critic = sharded(3), Headed(2, width=20 + 20 * dist.get_rank())
    fully_shard(critic, mesh=world_mesh())
    share_slots(policy=policy, critic=critic)
    with pytest.raises(RuntimeError, match=r"slots of policy, critic in one arena: gather slots of .* bytes"):
        policy(rows())


def test_ranks_whose_other_models_differ_raise_the_same_error() -> None:
    """Prevents: peers that read gradients at another rank's offsets."""
    run_ranks(differ_in_the_critic)
