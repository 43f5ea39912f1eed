"""A backward that updates parameters leaves the bits of a step after it, and gradients of a unit or two at a time."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks import on_ranks, run_ranks
from tests.training import full_parameters, world_mesh
from tests.zoo import FEATURES, SPECIMENS, Chain, Specimen, blocks, layers_of, vectors
from yafsdp_like import GraphedStep, MixedPrecisionPolicy, fully_shard, update_in_backward
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.runtime import gradients
from yafsdp_like.shard.runtime.gradient_shard import GradientShard
from yafsdp_like.shard.runtime.unit_state import unit_of

pytestmark = pytest.mark.slow

TRANSPORTS = ("process_group", "peer")
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
MODELS = ("decoder", "nested", "reused", "skipped", "tied", "frozen", "group", "recomputed")
NUM_STEPS = 4


def sharded(specimen: Specimen, transport: str = "process_group", **options: Any) -> Any:
    options = {"mp_policy": BF16, "mesh": world_mesh()} | options
    return specimen.wrap(specimen.fresh(), fully_shard, transport=transport, **options)


def adamw(model: nn.Module, **options: Any) -> AdamW:
    """Two groups, of different rates and decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 0.05}]
    return AdamW([group for group in groups if group["params"]], lr=0.02, **options)


Backward = Callable[[Any, Specimen, int], None]


def once(model: Any, specimen: Specimen, step: int) -> None:
    specimen.loss_of(model, step, dist.get_rank()).backward()


def reduced_each(model: Any, specimen: Specimen, step: int) -> None:
    for micro in range(3):
        model.set_is_last_backward(micro == 2)
        specimen.loss_of(model, 3 * step + micro, dist.get_rank()).backward()


def unsynced(model: Any, specimen: Specimen, step: int) -> None:
    for micro in range(3):
        model.set_requires_gradient_sync(micro == 2)
        model.set_is_last_backward(micro == 2)
        specimen.loss_of(model, 3 * step + micro, dist.get_rank()).backward()


def two_forwards_first(model: Any, specimen: Specimen, step: int) -> None:
    """The first backward is known not to be the last of its units."""
    losses = [specimen.loss_of(model, 2 * step + micro, dist.get_rank()) for micro in range(2)]
    for loss in losses:
        loss.backward()


WAYS: dict[str, Backward] = {
    way.__name__: way
    for way in (once, reduced_each, unsynced, two_forwards_first)  # type: ignore[attr-defined]
}


def train(specimen: Specimen, in_backward: bool, backward: Backward, transport: str, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("moments",) if name in options}
    reduces_unused = options.pop("reduces_unused", False)
    if options.pop("replicated", False):
        options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicas", "shards"))
    model = sharded(specimen, transport, **options)
    model.set_reduce_scatter_unused_params(reduces_unused)
    optimizer = adamw(model, **own)
    if in_backward:
        update_in_backward(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    seen = []
    for step in range(NUM_STEPS):
        backward(model, specimen, step)
        seen.append([name for name, p in model.named_parameters() if p.grad is not None])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            specimen.loss_of(model, 100 + step, dist.get_rank())
    steps = {int(state["step"]) for state in optimizer.state.values()}
    return full_parameters(model), seen, steps


def compare(name: str, way: str, transport: str, **options: Any) -> list[str]:
    """Return which parameters had gradients left for `step`."""
    expected, _, steps = train(SPECIMENS[name], False, WAYS[way], transport, **options)
    found, left, found_steps = train(SPECIMENS[name], True, WAYS[way], transport, **options)
    assert found_steps == steps
    for parameter in expected:
        assert torch.equal(found[parameter], expected[parameter]), parameter
    return [parameter for step in left for parameter in step]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_a_step_after_the_backward(name: str, transport: str) -> None:
    """Also with groups, a schedule, tied and frozen parameters, and modules that run twice or not at all."""
    for left in run_ranks(compare, name, "once", transport):
        assert left == []


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("way", ["reduced_each", "unsynced", "two_forwards_first"])
def test_only_the_last_backward_of_a_step_updates(way: str, transport: str) -> None:
    for left in run_ranks(compare, "decoder", way, transport):
        assert left == []


@pytest.mark.parametrize(
    "options",
    [
        {"mp_policy": MixedPrecisionPolicy()},
        {"moments": "bf16"},
        {"split_master": True},
        {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16), "grad_dtype": torch.bfloat16},
        {"reshard_after_forward": False},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_bits_are_the_same_whatever_is_kept_in_which_dtype(world_size: int, options: dict[str, Any]) -> None:
    run_ranks(compare, "decoder", "once", "peer" if world_size == 2 else "auto", world_size=world_size, **options)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_unit_whose_parameters_were_all_reduced_early_is_updated_at_its_end(transport: str) -> None:
    """Prevents: a root's gradients, those of a head and an embedding, that wait for the step."""
    for left in run_ranks(compare_reduced_early, transport):
        assert left == []


def compare_reduced_early(transport: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "EARLY_NUMEL", 1)
        return compare("decoder", "once", transport)


@pytest.mark.parametrize(
    "options", [{"reduces_unused": True}, {"replicated": True}], ids=lambda options: next(iter(options))
)
def test_the_bits_are_the_same_where_unused_parameters_are_reduced_and_over_replicas(options: dict[str, bool]) -> None:
    for left in run_ranks(compare, "skipped", "once", "process_group", **options):
        assert left == []


# --- memory ---

LONG = Specimen(lambda: Chain(blocks(6)), vectors(FEATURES), layers_of)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gradients_of_one_unit_have_memory_at_a_time(transport: str) -> None:
    run_ranks(count_gradients, transport)


def count_gradients(transport: str) -> None:
    model = sharded(LONG, transport)
    optimizer = adamw(model)
    update_in_backward(optimizer)
    most = 0
    with pytest.MonkeyPatch.context() as patch:
        take = GradientShard.take

        def counted(self: GradientShard) -> None:
            nonlocal most
            take(self)
            shards = [p.grad_shard for layer in model.layers for p in unit_of(layer).params]
            most = max(most, sum(shard.nbytes for shard in shards if shard.has_memory))

        patch.setattr(GradientShard, "take", counted)
        for step in range(2):
            once(model, LONG, step)
            assert not any(shard.has_memory for shard in shards_of(model)), "the backward is over"
            optimizer.step()
    assert most == sum(shard.nbytes for shard in shards_of(model)) / len(model.layers)


def shards_of(model: Any) -> list[Any]:
    units = {unit: None for module in model.modules() if (unit := unit_of(module)) is not None}
    return [p.grad_shard for unit in units for p in unit.params]


@on_ranks()
def test_a_gradient_that_a_hook_holds_keeps_its_values() -> None:
    models = [sharded(LONG) for _ in range(2)]
    update_in_backward(optimizer := adamw(models[1]))
    held: list[torch.Tensor] = []
    for p in models[1].parameters():
        p.register_post_accumulate_grad_hook(lambda p: held.append(p.grad))
    for step in range(2):
        held.clear()
        for model in models:
            once(model, LONG, 0)
        if step == 0:
            kept, expected = list(held), [p.grad.to_local().clone() for p in models[0].parameters()]
            order = sorted(range(len(kept)), key=lambda k: kept[k].shape)
        optimizer.step()
    assert len(order) == len(expected)
    found = sorted(float(g.to_local().double().sum()) for g in kept)
    assert found == sorted(float(g.double().sum()) for g in expected)


# --- what step still does, and what is refused ---


@on_ranks()
def test_step_updates_what_no_backward_has() -> None:
    """A parameter that is not sharded, and units that another optimizer's backward does not own."""
    expected, found = ({}, {})
    for weights, in_backward in ((expected, False), (found, True)):
        model = sharded(LONG)
        torch.manual_seed(0)
        scale = nn.Parameter(torch.ones(FEATURES))
        optimizer = AdamW([*model.layers[:3].parameters(), scale], lr=0.02)
        rest = torch.optim.SGD(model.layers[3:].parameters(), lr=0.02)
        if in_backward:
            update_in_backward(optimizer)
        for step in range(3):
            (LONG.loss_of(model, step, dist.get_rank()) + (scale**2).sum()).backward()
            assert scale.grad is not None
            assert all((p.grad is None) == in_backward for p in model.layers[:3].parameters())
            assert all(p.grad is not None for p in model.layers[3:].parameters())
            for each in (optimizer, rest):
                each.step()
                each.zero_grad()
        weights |= full_parameters(model) | {"scale": scale.detach().clone()}
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@on_ranks()
def test_edits_between_backward_and_step_are_computed_on() -> None:
    """Prevents: a step that takes compute shards for current, which the update wrote before the edit."""
    models = [sharded(LONG, "peer") for _ in range(2)]
    for model, in_backward in zip(models, (False, True), strict=True):
        optimizer = adamw(model)
        if in_backward:
            update_in_backward(optimizer)
        once(model, LONG, 0)
        if not in_backward:
            optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        if in_backward:
            optimizer.step()
        optimizer.zero_grad()
    losses = [LONG.loss_of(model, 7, dist.get_rank()).item() for model in models]
    assert losses[0] == losses[1]


@on_ranks()
def test_clipping_is_refused_between_backward_and_step_only() -> None:
    model, other = sharded(LONG), sharded(LONG)
    update_in_backward(optimizer := adamw(model))
    once(other, LONG, 0)
    for _ in range(2):
        once(model, LONG, 0)
        for parameters in (model.parameters(), [*model.parameters(), *other.parameters()]):
            with pytest.raises(RuntimeError, match="nothing is left to clip"):
                nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    once(model, LONG, 0)
    del optimizer
    gc.collect()
    nn.utils.clip_grad_norm_(other.parameters(), 1.0)


@on_ranks()
def test_a_second_backward_without_a_step_is_refused() -> None:
    """Prevents: an update with a part of a step's gradients, and another with the rest."""
    model = sharded(SPECIMENS["decoder"])
    update_in_backward(adamw_of := adamw(model))
    once(model, SPECIMENS["decoder"], 0)
    with pytest.raises(RuntimeError, match=r"came after a backward had updated it .*set_is_last_backward\(False\)"):
        once(model, SPECIMENS["decoder"], 1)
    adamw_of.step()
    once(model, SPECIMENS["decoder"], 1)


@on_ranks()
def test_another_gradient_after_the_update_is_refused() -> None:
    """Prevents: a second update in one step, by that gradient alone."""
    model = sharded(LONG)
    update_in_backward(optimizer := adamw(model))
    once(model, LONG, 0)
    p = next(iter(model.parameters()))
    p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="another gradient than the backward has updated it with"):
        optimizer.step()
    p.grad = None
    optimizer.step()


@on_ranks()
def test_an_optimizer_that_is_gone_or_disabled_updates_nothing_in_backward() -> None:
    model = sharded(LONG)
    update_in_backward(optimizer := adamw(model))
    update_in_backward(optimizer, False)
    once(model, LONG, 0)
    assert all(p.grad is not None for p in model.parameters())
    update_in_backward(optimizer)
    del optimizer
    gc.collect()
    once(model, LONG, 0)
    assert all(p.grad is not None for p in model.parameters())


@on_ranks()
def test_recordings_and_other_optimizers_are_refused() -> None:
    model = sharded(LONG)
    with pytest.raises(ValueError, match=r"found torch\.optim\.adamw\.AdamW"):
        update_in_backward(torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with offload_moments"):
        update_in_backward(AdamW(model.parameters(), offload_moments=True))
    with pytest.raises(ValueError, match="call it after fully_shard"):
        update_in_backward(AdamW(nn.Linear(2, 2).parameters()))
    update_in_backward(optimizer := adamw(model))
    with pytest.raises(RuntimeError, match=r"update_in_backward\(optimizer, False\)"):
        GraphedStep(lambda x: model(x), model)(torch.ones(1, FEATURES))
    update_in_backward(optimizer, False)
    GraphedStep(lambda x: model(x), model)(torch.ones(1, FEATURES))


@on_ranks()
def test_states_are_made_before_the_first_gradient_and_kept() -> None:
    """Prevents: states cut from memory of activations that have died, which the next forward then lacks."""
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    for layer in model:
        fully_shard(layer, mesh=world_mesh())
    fully_shard(model, mesh=world_mesh())
    optimizer = AdamW(model.parameters(), lr=0.1)
    update_in_backward(optimizer)
    seen: list[list[int]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        output.register_hook(lambda _: seen.append(moments(optimizer)))

    model[1].register_forward_hook(watch)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert len(seen[0]) == 2 * 4 and seen[0] == seen[1] == moments(optimizer), (seen, moments(optimizer))


def moments(optimizer: AdamW) -> list[int]:
    """Where the moments of all parameters are that have any."""
    return [
        state[name].to_local().data_ptr() for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
