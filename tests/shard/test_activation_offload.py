"""``offload_activations``: the same bits, each storage copied once, little left on the device, flat host memory.

On CPUs both memories are the host's, and every copy and wait is done as on a GPU.
"""

import copy
import gc
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from tests.clocks import RaceDetector, VectorClocks
from tests.ranks import on_ranks, run_ranks
from tests.training import assert_tensors_equal, full_parameters, world_mesh
from tests.zoo import SPECIMENS
from yafsdp_like import MixedPrecisionPolicy, fully_shard, offload_activations
from yafsdp_like.memory.streams import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE
from yafsdp_like.shard.runtime import activation_offload

pytestmark = pytest.mark.slow

B, D = 8, 16
NBYTES = 4 * B * D  # of one activation


class Block(nn.Module):
    """Saves three activations: a sigmoid and a tanh, both by themselves and for their product, and the product."""

    def __init__(self, parameters: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D) if parameters else nn.Identity()

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        gated = torch.sigmoid(x) * torch.tanh(x)
        return x + self.linear(gated) * scale


class Stack(nn.Module):
    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.register_buffer("scale", torch.full((B, D), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, self.scale)
        return x


def stack(num_blocks: int = 4) -> Any:
    torch.manual_seed(0)
    return Stack(num_blocks)


def rows(seed: int = 0, num: int = B) -> torch.Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed), requires_grad=True)


# --- numbers ---


@pytest.mark.parametrize("name", ["decoder", "recomputed", "reused", "dicts", "convnet", "encoder"])
def test_training_a_sharded_model_has_the_same_bits(name: str) -> None:
    run_ranks(train_both, name)


def train_both(name: str) -> None:
    (losses, found), (expected_losses, expected) = (train(name, offloads) for offloads in (True, False))
    assert losses == expected_losses
    assert_tensors_equal(found, expected)


def train(name: str, offloads: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    specimen, losses = SPECIMENS[name], []
    precision = MixedPrecisionPolicy() if name == "convnet" else MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    model: Any = specimen.wrap(specimen.fresh(), fully_shard, mesh=world_mesh(), mp_policy=precision)
    offloaded = offload_activations(specimen.units(model), min_nbytes=1) if offloads else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(4):
        with torch.no_grad():
            losses.append(specimen.loss_of(model, 100 + step, dist.get_rank()).item())
        for index in range(2):
            model.set_requires_gradient_sync(step % 2 == 0 or index == 1)
            loss = specimen.loss_of(model, 2 * step + index, dist.get_rank())
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    if offloaded is not None and name != "recomputed":  # which checkpoints its blocks itself
        assert offloaded.copied_nbytes > 0
    return losses, full_parameters(model)


@on_ranks(1)
def test_a_compiled_block_offloads_what_its_graph_saves() -> None:
    found, expected = stack(), stack()
    for block in found.blocks:
        block.compile(backend="aot_eager")
    offloaded = offload_activations(found.blocks, min_nbytes=NBYTES)
    for model in (found, expected):
        model(rows()).sum().backward()
    assert offloaded.copied_nbytes >= 4 * NBYTES
    assert_gradients_equal(found, expected)


def assert_gradients_equal(found: nn.Module, expected: nn.Module) -> None:
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # that the compiler reads
@on_ranks(1)
def test_a_model_that_is_compiled_as_a_whole_offloads_between_its_graphs() -> None:
    """Prevents: hooks of saved tensors are compiled themselves, which fails."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    expected = copy.deepcopy(model)
    offload_activations(list(model), min_nbytes=1)
    compiled = torch.compile(model, backend="aot_eager")
    for m in (compiled, expected):
        m(rows()).square().sum().backward()
    assert_gradients_equal(model, expected)


# --- bytes ---


@on_ranks(1)
def test_each_storage_is_copied_once_and_parameters_and_masks_never() -> None:
    """Three activations and the input that is saved for no more than itself, whatever shares their bytes."""
    model = stack()
    offloaded = offload_activations(model.blocks, min_nbytes=1)
    model(rows())
    products = 1  # of the last linear layer and the scale: the scale's gradient is not asked for, so nothing is saved
    assert offloaded.copied_nbytes == 4 * (2 + products) * NBYTES
    sharded: Any = fully_shard(stack(), mesh=world_mesh())
    offloaded = offload_activations(sharded.blocks, min_nbytes=1)
    sharded(rows())
    assert offloaded.copied_nbytes == 4 * (2 + products) * NBYTES


@on_ranks(1)
def test_views_of_one_storage_saved_in_two_blocks_are_copied_once() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = x.chunk(2, -1)
            return torch.cat([left * right, right.sigmoid()], -1)

    model = nn.Sequential(Halves(), Halves())
    offloaded = offload_activations(list(model), min_nbytes=1)
    x = rows()
    model(x.exp()).sum().backward()
    sigmoids = NBYTES // 2
    assert offloaded.copied_nbytes == 2 * (NBYTES + sigmoids)
    found, x.grad = x.grad, None
    nn.Sequential(Halves(), Halves())(x.exp()).sum().backward()
    assert found is not None and x.grad is not None
    assert torch.equal(found, x.grad)


@on_ranks(1)
def test_the_device_keeps_the_last_block_only_and_backward_brings_back_two_at_most() -> None:
    model, most = stack(6), 0
    offloaded = offload_activations(model.blocks, min_nbytes=1)

    def count(*_: Any) -> None:
        nonlocal most
        gc.collect()
        here = [s for s in gc.get_objects() if isinstance(s, activation_offload.SavedStorage) and s.storage is not None]
        most = max(most, sum(s.nbytes for s in here))

    output = model(rows())
    count()
    assert most == 3 * NBYTES
    for block in model.blocks:
        block.register_full_backward_hook(count)
    output.sum().backward()
    assert most <= 2 * 3 * NBYTES
    assert not [s for s in gc.get_objects() if isinstance(s, activation_offload.SavedStorage)]
    assert offloaded.host_nbytes == 6 * 3 * NBYTES


@on_ranks(1)
def test_host_memory_is_flat_once_the_longest_input_was_there() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(x) * torch.tanh(x)

    model = nn.Sequential(*(Gate() for _ in range(3)))
    offloaded = offload_activations(list(model), min_nbytes=1)
    held = []
    for num in (4, 8, 6, 8, 2, 7):
        model(rows(num=num)).sum().backward()
        held.append(offloaded.host_nbytes // (4 * D))
    assert held == [3 * 2 * num for num in (4, 8, 8, 8, 8, 8)]
    outputs = [model(rows(num=8)) for _ in range(2)]  # two forwards before their backwards
    assert offloaded.host_nbytes == 2 * 3 * 2 * 8 * 4 * D
    for output in outputs:
        output.sum().backward()


@on_ranks(1)
def test_what_compute_waits_for_is_measured_once_asked() -> None:
    model = stack()
    offloaded = offload_activations(model.blocks, min_nbytes=1)
    assert offloaded.exposed_seconds() == 0
    model(rows()).sum().backward()
    offloaded.measure()
    model(rows()).sum().backward()
    assert len(offloaded._waits) == 4 + 3, "for each block's copies in forward, and those of all but the last back"
    assert 0 < offloaded.exposed_seconds() < 1
    assert not offloaded._waits


# --- what else users do ---


@on_ranks(1)
def test_checkpointed_blocks_decide_for_themselves_and_their_inputs_may_be_offloaded() -> None:
    expected = stack()
    expected(rows()).sum().backward()

    def offloaded_nbytes(wrap: Callable[[Any], Any], inner: bool) -> int:
        model = stack()
        blocks = list(model.blocks)
        model.blocks = nn.ModuleList(wrap(block) for block in blocks)
        offloaded = offload_activations(blocks if inner else model.blocks, min_nbytes=1)
        for _ in range(2):
            model.zero_grad()
            model(rows()).sum().backward()
            assert_gradients_equal(model, expected)
        return offloaded.copied_nbytes // 2

    assert offloaded_nbytes(composable_checkpoint, inner=True) == 0
    assert offloaded_nbytes(checkpoint_wrapper, inner=True) == 0
    assert offloaded_nbytes(checkpoint_wrapper, inner=False) == 4 * NBYTES
    reentrant = [checkpoint_implementation(use_reentrant) for use_reentrant in (True, False)]
    assert [offloaded_nbytes(wrap, inner=True) for wrap in reentrant] == [0, 0]


def checkpoint_implementation(use_reentrant: bool) -> Callable[[Any], Any]:
    class Recomputed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any) -> Any:
            return checkpoint(self.block, *args, use_reentrant=use_reentrant)

    return Recomputed


@on_ranks(1)
def test_transforms_of_functions_leave_activations_where_they_are() -> None:
    model = stack()
    offloaded = offload_activations(model.blocks, min_nbytes=1)
    found = torch.func.grad(lambda x: model(x).sum())(rows().detach())
    assert offloaded.copied_nbytes == 0
    x = rows()
    model(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(found, x.grad)


@on_ranks(1)
def test_graphs_may_be_kept_dropped_or_fail() -> None:
    model, expected = stack(), stack()
    offloaded = offload_activations(model.blocks, min_nbytes=1)
    for m in (model, expected):
        loss = m(rows()).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_gradients_equal(model, expected)
    del loss
    model(rows())  # dropped
    with torch.no_grad():
        model(rows())
    handle = model.blocks[2].linear.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(rows())
    handle.remove()
    for m in (model, expected):
        m.zero_grad()
        m(rows(1)).sum().backward()
    assert_gradients_equal(model, expected)
    gc.collect()
    assert offloaded.host_nbytes == 4 * 3 * NBYTES


@on_ranks(1)
def test_a_graph_that_is_kept_may_be_used_again_after_other_forwards() -> None:
    """Prevents: what its first backward brought back leaves with the next forward, and is never brought back again."""
    model, expected = stack(), stack()
    offload_activations(model.blocks, min_nbytes=1)
    for m in (model, expected):
        kept = m(rows())
        kept.sum().backward(retain_graph=True)
        other = m(rows(1))
        kept.square().sum().backward()
        other.sum().backward()
    assert_gradients_equal(model, expected)


@on_ranks(1)
def test_forwards_after_one_that_was_interrupted_offload_again() -> None:
    """As in a notebook: PyTorch calls no hook of a module after a ``KeyboardInterrupt``."""
    model, expected = stack(), stack()
    offloaded = offload_activations(model.blocks, min_nbytes=1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[2].linear.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(rows())
    handle.remove()
    for _ in range(2):
        for m in (model, expected):
            m.zero_grad()
            m(rows()).sum().backward()
        assert_gradients_equal(model, expected)
    before = offloaded.copied_nbytes
    model(rows()).sum().backward()
    assert offloaded.copied_nbytes == before + 4 * 3 * NBYTES
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@on_ranks(1)
def test_a_second_thread_is_refused_while_a_forward_runs_and_served_after_it() -> None:
    """Prevents: a bare AssertionError, in either thread, of hooks that are not on top."""
    model = stack()
    offload_activations(model.blocks, min_nbytes=NBYTES)
    x, errors = torch.ones(B, D, requires_grad=True), list[RuntimeError]()

    def run() -> None:
        try:
            model(x).sum().backward()
        except RuntimeError as error:
            errors.append(error)

    def in_another_thread(*_: Any) -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    handle = model.blocks[1].linear.register_forward_hook(in_another_thread)
    loss = model(x).sum()
    handle.remove()
    loss.backward()
    assert ["second thread" in str(error) for error in errors] == [True]
    first = x.grad
    x.grad = None
    in_another_thread()
    assert len(errors) == 1 and first is not None and x.grad is not None
    assert torch.equal(first, x.grad)


@on_ranks(1)
def test_a_block_inside_of_a_block_is_part_of_it() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.inner(torch.sigmoid(x), x))

    torch.manual_seed(0)
    model = Outer()
    expected = copy.deepcopy(model)
    offloaded = offload_activations([model, model.inner], min_nbytes=NBYTES)
    for m in (model, expected):
        m(rows()).sum().backward()
    assert_gradients_equal(model, expected)
    assert offloaded.copied_nbytes >= 5 * NBYTES


@on_ranks(1)
def test_a_part_of_a_storage_that_was_changed_since_another_was_saved_is_copied_again() -> None:
    """Parts that autograd does not know as views of one another have versions of their own."""

    class First(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            left, right = torch.unsafe_chunk(x * 2, 2, -1)
            return left.sin(), right

    class Second(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return left * right.mul_(3).cos()

    found: list[torch.Tensor] = []
    for offloads in (False, True):
        blocks = First(), Second(), Block(parameters=False)
        if offloads:
            offload_activations(blocks, min_nbytes=1)
        x = rows()
        blocks[2](blocks[1](*blocks[0](x)), torch.ones(())).sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert torch.equal(*found)


@on_ranks(1)
@pytest.mark.parametrize("changes_inside", [True, False])
def test_a_saved_tensor_that_is_changed_in_place_raises(changes_inside: bool) -> None:
    """As autograd does in backward, of what it keeps itself."""

    class Changing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sigmoid(x)
            if changes_inside:
                y.add_(1)
            return y

    model = nn.Sequential(Changing(), Changing())
    offload_activations(list(model), min_nbytes=1)
    with pytest.raises(RuntimeError, match=r"Changing has saved .* was changed in place"):
        if changes_inside:
            model(rows())
        else:
            y = model[0](rows())
            y.mul_(2)
            model[1](y)


@on_ranks(1)
def test_no_blocks_and_blocks_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        offload_activations([])
    model = stack()
    offload_activations(model.blocks)
    new = Block()
    with pytest.raises(ValueError, match="before for a Block"):
        offload_activations([new, model.blocks[1]])
    assert not new._forward_hooks
    with pytest.raises(TypeError, match="expects modules, found a str"):
        offload_activations(["blocks"])  # type: ignore[list-item]


@on_ranks(1)
def test_a_copied_model_has_host_memory_of_its_own() -> None:
    model = stack()
    offloaded = offload_activations(model.blocks, min_nbytes=1)
    model(rows()).sum().backward()
    torch.save(model, io.BytesIO())
    copied = copy.deepcopy(model)
    found = activation_offload.activations_of(copied)
    assert found is not None and found is not offloaded and found.host_nbytes == 0
    copied(rows()).sum().backward()
    assert found.copied_nbytes == offloaded.copied_nbytes


# --- stream order ---

WAITS = {
    (DEVICE_TO_HOST, COMPUTE),
    (COMPUTE, DEVICE_TO_HOST),
    (HOST_TO_DEVICE, COMPUTE),
    (COMPUTE, HOST_TO_DEVICE),
}


class InPlace(Block):
    """Writes in place what it then saves: the detector sees no other writes."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x.sin().mul_(2)).mul_(scale)


def races(forgets: list[tuple[str, str]]) -> tuple[list[str], set[tuple[str, str]]]:
    """Races in four steps, which have another forward without a backward each, wherever they are in memory."""
    streams = VectorClocks(forgets)
    detector = RaceDetector(streams)
    detector.watched.append((0, 1 << 63))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_offload, "streams_of", lambda device: streams)
        model = stack()
        model.blocks = nn.ModuleList(InPlace() for _ in range(4))
        offload_activations(model.blocks, min_nbytes=1)
        with detector:
            for step in range(4):
                model(rows(step)).sum().backward()
                model(rows(step))
    return detector.races, set(streams.waits)


@on_ranks(1)
def test_copies_of_activations_are_ordered_by_events() -> None:
    found, waits = races([])
    assert found == []
    assert waits == WAITS


@pytest.mark.parametrize("forgotten", sorted(WAITS))
def test_each_wait_for_a_copy_of_activations_is_needed(forgotten: tuple[str, str]) -> None:
    assert run_ranks(races, [forgotten], world_size=1)[0][0]
