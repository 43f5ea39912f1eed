"""After an optimizer's step the next forward computes on the new weights, whatever wrote them and however.

And this package's AdamW, which all-gathers the first units while it updates the rest, trains as torch's does.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.ranks import on_ranks, run_ranks
from tests.training import Recipe, Run, assert_close, assert_same_bits, full, full_parameters, train, world_mesh
from tests.twins import Twins
from tests.zoo import SPECIMENS, Specimen
from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.optim import AdamW

TRANSPORTS = ("process_group", "peer")
SPECIMEN = SPECIMENS["decoder"]
WELL_CONDITIONED = {"lr": 1e-2, "eps": 1e-2}  # where a gradient's last bit does not decide a step's sign


# --- every write is seen ---


class SilentSGD(torch.optim.Optimizer):
    """Writes past autograd, as an optimizer's own kernels may: no version counter tells of it."""

    def __init__(self, params: Iterator[nn.Parameter], write: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__(params, {})
        self.write = write

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            if param.grad is not None:
                self.write(param._local_tensor, 0.1 * param.grad._local_tensor)


def write_through_data(local: torch.Tensor, change: torch.Tensor) -> None:
    local.data.sub_(change)


def write_through_numpy(local: torch.Tensor, change: torch.Tensor) -> None:
    array = local.numpy()
    array -= change.numpy()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "foreach AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "AdamW in a loop": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "silent by data": lambda params: SilentSGD(params, write_through_data),
    "silent by numpy": lambda params: SilentSGD(params, write_through_numpy),
    "our AdamW": lambda params: AdamW(params, lr=0.1),
}


def weights_seen(model: nn.Module, specimen: Specimen, number: int) -> dict[str, torch.Tensor]:
    """What each module computes on in a forward under the grad mode of now; backward follows if there is one."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            own = module.named_parameters(prefix=name, recurse=False)
            seen.update((full_name, weight.detach().clone()) for full_name, weight in own)

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    loss = specimen.loss_of(model, number, dist.get_rank())
    for handle in handles:
        handle.remove()
    if torch.is_grad_enabled():
        loss.backward()
    return seen


def compare_weights(model: nn.Module, weights: dict[str, torch.Tensor], dtype: torch.dtype, number: int) -> None:
    seen = weights_seen(model, SPECIMEN, number)
    assert seen.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(seen[name], weight.to(dtype)), f"forward computes on an old {name}"


def decoder(transport: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    return SPECIMEN.wrap(
        SPECIMEN.fresh(), fully_shard, mesh=world_mesh(), mp_policy=policy, transport=transport, **options
    )


@pytest.mark.slow(
    unless=lambda name, transport: (
        (transport == "peer" and name != "SGD" and "in a loop" not in name) or name == "silent by data"
    )
)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_forward_after_a_step_sees_what_any_optimizer_wrote(name: str, transport: str) -> None:
    """Prevents: computing on a compute shard, or on a slot left from an evaluation, of the step before."""
    run_ranks(step_and_compare, name, transport)


def step_and_compare(name: str, transport: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = decoder(transport, dtype)
        optimizer = OPTIMIZERS[name](model.parameters())
        before = full_parameters(model)
        for number in range(3):
            compare_weights(model, before, dtype, 3 * number)
            optimizer.step()
            optimizer.zero_grad()
            after = full_parameters(model)
            assert any(not torch.equal(before[n], after[n]) for n in after)
            before = after
            if number == 1:
                with torch.no_grad():
                    compare_weights(model, after, dtype, 3 * number + 1)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: p.detach() * 2 for name, p in model.state_dict().items()})


def load_assigned(model: nn.Module) -> None:
    model.load_state_dict({name: p.detach() * 2 for name, p in model.state_dict().items()}, assign=True)


def each_parameter(write: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    def edit(model: nn.Module) -> None:
        for p in model.parameters():
            write(p)

    return edit


def foreach(model: nn.Module) -> None:
    torch._foreach_mul_(list(model.parameters()), 2.0)


def all_reduce(model: nn.Module) -> None:
    for p in model.parameters():
        if p.shape[0] % dist.get_world_size() == 0:
            dist.all_reduce(p.to_local())


COUNTED_EDITS: dict[str, Callable[[nn.Module], None]] = {
    "load_state_dict": load,
    "load_state_dict(assign=True)": load_assigned,
    "p.mul_": each_parameter(lambda p: p.mul_(2)),
    "p.copy_": each_parameter(lambda p: p.copy_(p * 2)),
    "p.detach().mul_": each_parameter(lambda p: p.detach().mul_(2)),
    "p.to_local().mul_": each_parameter(lambda p: p.to_local().mul_(2)),
}
SILENT_EDITS: dict[str, Callable[[nn.Module], None]] = {  # bump no version counter
    "p.data.mul_": each_parameter(lambda p: p.data.mul_(2)),
    "p.detach().to_local().mul_": each_parameter(lambda p: p.detach().to_local().mul_(2)),
    "torch._foreach_mul_": foreach,
    "dist.all_reduce": all_reduce,
}


@pytest.mark.slow(
    unless=lambda edit, transport: transport == "peer" and edit in ("load_state_dict", "p.copy_", "p.mul_")
)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("edit", COUNTED_EDITS)
def test_an_edit_between_our_step_and_the_next_forward_is_seen(edit: str, transport: str) -> None:
    """The first units are gathered by then, from before the edit."""
    run_ranks(step_edit_and_compare, edit, transport)


def step_edit_and_compare(edit: str, transport: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = decoder(transport, dtype)
        optimizer = AdamW(model.parameters(), lr=0.1)
        for number in range(2):
            SPECIMEN.loss_of(model, number, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                COUNTED_EDITS[edit](model)
            compare_weights(model, full_parameters(model), dtype, 10 + number)
            optimizer = AdamW(model.parameters(), lr=0.1) if "assign" in edit else optimizer


@pytest.mark.slow(unless=lambda edit, transport: transport == "peer" or edit == "p.data.mul_")
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("edit", SILENT_EDITS)
def test_a_silent_edit_after_our_step_is_seen_once_it_is_announced(edit: str, transport: str) -> None:
    """Prevents: a mark that comes too late for the units that the step has all-gathered already.

    Without it the forward computes on what the step wrote beside the main shards.
    """
    run_ranks(step_edit_announce_and_compare, edit, transport)


def step_edit_announce_and_compare(edit: str, transport: str) -> None:
    model = decoder(transport, torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=0.1)
    SPECIMEN.loss_of(model, 0, dist.get_rank()).backward()
    for number, announces in enumerate((False, True, False)):
        optimizer.step()
        optimizer.zero_grad()
        written = full_parameters(model)
        with torch.no_grad():
            SILENT_EDITS[edit](model)
        edited = full_parameters(model)
        assert any(not torch.equal(written[n], edited[n]) for n in edited)
        if announces:
            model.mark_weights_changed()
        compare_weights(model, edited if announces else written, torch.bfloat16, 10 + number)


@pytest.mark.slow(
    unless=lambda edit, transport: edit in SILENT_EDITS and (transport == "peer" or edit == "p.data.mul_")
)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("edit", COUNTED_EDITS | SILENT_EDITS)
def test_an_edit_after_an_evaluation_is_seen(edit: str, transport: str) -> None:
    """Prevents: a released slot that still has its values, or a compute shard, hiding writes that no counter shows."""
    run_ranks(evaluate_edit_and_compare, edit, transport)


def evaluate_edit_and_compare(edit: str, transport: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = decoder(transport, dtype)
        SPECIMEN.loss_of(model, 0, 0).backward()
        for number in range(2):
            with torch.no_grad():
                SPECIMEN.loss_of(model, number, 0)
                (COUNTED_EDITS | SILENT_EDITS)[edit](model)
                compare_weights(model, full_parameters(model), dtype, 10 + number)


# --- this package's AdamW ---


def train_all_ways(precision: dict[str, torch.dtype]) -> list[Run]:
    """By torch's optimizer, then by ours over each transport."""
    recipes = [Recipe(precision=precision, max_norm=1e9)]
    recipes += [Recipe(precision=precision, max_norm=1e9, optimizer="our AdamW", transport=t) for t in TRANSPORTS]
    return [train("decoder", "ours", recipe) for recipe in recipes]


@pytest.mark.slow
def test_twenty_steps_follow_torch_and_are_the_same_over_both_transports() -> None:
    for by_torch, over_the_group, over_peers in run_ranks(train_all_ways, {}):
        assert_same_bits(over_peers, over_the_group)
        assert_close(over_peers, by_torch, tolerance=1e-3)


@pytest.mark.slow
def test_in_mixed_precision_twenty_steps_follow_torch_too() -> None:
    precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    for by_torch, over_the_group, over_peers in run_ranks(train_all_ways, precision):
        assert_same_bits(over_peers, over_the_group)
        torch.testing.assert_close(over_peers.losses, by_torch.losses, rtol=2e-2, atol=2e-2)


def own_twins(transport: str, name: str = "decoder") -> Twins:
    """A model trained by our AdamW, and its unsharded twin by torch's."""
    twins = Twins(SPECIMENS[name], transport=transport)
    twins.optimizers = [
        optimizer(parameters.values(), **WELL_CONDITIONED)
        for optimizer, parameters in zip((AdamW, torch.optim.AdamW), twins.parameters, strict=True)
    ]
    return twins


def compare(twins: Twins) -> None:
    sharded, plain = twins.parameters
    for name, parameter in plain.items():
        torch.testing.assert_close(full(sharded[name]), parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow(
    unless=lambda name, transport: (
        (transport == "peer" and name in ("odd", "nested", "frozen", "tied", "group")) or name == "frozen"
    )
)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", ["odd", "nested", "frozen", "waster", "skipped", "tied", "group", "lstm"])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_our_steps_follow_torch_on_every_shape_of_model(name: str, transport: str) -> None:
    """With frozen parameters, parameters that get no gradient, and units that a step skips."""
    run_ranks(train_own_twins, name, transport)


def train_own_twins(name: str, transport: str) -> None:
    twins = own_twins(transport, name)
    twins.train(0, 1, 2, 3)
    compare(twins)


@pytest.mark.parametrize("transport", TRANSPORTS)
@on_ranks()
def test_an_optimizer_over_some_parameters_leaves_the_others(transport: str) -> None:
    twins = own_twins(transport)
    for optimizer in twins.optimizers:
        del optimizer.param_groups[0]["params"][1::2]
    twins.train(0, 1, 2)
    compare(twins)


@pytest.mark.parametrize("transport", TRANSPORTS)
@on_ranks()
def test_two_optimizers_may_share_the_units_of_a_model(transport: str) -> None:
    """Ours gathers units that the other one, ours or not, writes afterwards."""
    twins = own_twins(transport)
    rest = [list(parameters.values())[1::2] for parameters in twins.parameters]
    for optimizer in twins.optimizers:
        del optimizer.param_groups[0]["params"][1::2]
    half = len(rest[0]) // 2
    for ours, plain in (([p[:half] for p in rest], AdamW), ([p[half:] for p in rest], torch.optim.AdamW)):
        twins.optimizers += [plain(ours[0], **WELL_CONDITIONED), torch.optim.AdamW(ours[1], **WELL_CONDITIONED)]
    twins.train(0, 1, 2)
    compare(twins)


@pytest.mark.slow(unless=lambda transport: transport == "peer")
@pytest.mark.parametrize("sync_each", [True, False])
@pytest.mark.parametrize("transport", TRANSPORTS)
@on_ranks()
def test_several_backwards_before_one_of_our_updates(transport: str, sync_each: bool) -> None:
    twins = own_twins(transport)
    for number in range(3):
        for micro in range(3):
            twins.sharded.set_requires_gradient_sync(sync_each or micro == 2)
            twins.backward(3 * number + micro)
        twins.step()
    compare(twins)


@pytest.mark.slow(unless=lambda transport: transport == "peer")
@pytest.mark.parametrize("transport", TRANSPORTS)
@on_ranks()
def test_a_schedule_changes_the_learning_rate_of_our_steps(transport: str) -> None:
    twins = own_twins(transport)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda number: 1 / (1 + number)) for o in twins.optimizers]
    for number in range(4):
        twins.train(number)
        for schedule in schedules:
            schedule.step()
    compare(twins)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(transport: str, tmp_path: Path) -> None:
    run_ranks(stop_and_resume, transport, str(tmp_path))


def stop_and_resume(transport: str, directory: str) -> None:
    def losses(model: nn.Module, optimizer: torch.optim.Optimizer, *numbers: int) -> list[float]:
        found = []
        for number in numbers:
            loss = SPECIMEN.loss_of(model, number, dist.get_rank())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    def fresh() -> tuple[Any, AdamW]:
        model = decoder(transport, torch.bfloat16)
        return model, AdamW(model.parameters(), lr=1e-2)

    model, optimizer = fresh()
    losses(model, optimizer, 0, 1)
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=directory)
    expected = losses(model, optimizer, 2, 3)

    resumed, its_optimizer = fresh()
    losses(resumed, its_optimizer, 7)  # so that there is something to overwrite, gathered ahead in part
    weights, states = get_state_dict(resumed, its_optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=directory)
    set_state_dict(resumed, its_optimizer, model_state_dict=weights, optim_state_dict=states)
    assert losses(resumed, its_optimizer, 2, 3) == expected
