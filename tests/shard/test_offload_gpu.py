"""What only a GPU can show of offloading: pinned memory, copies beside compute, and how much the device holds."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.ranks import run_ranks
from tests.shard.test_gpu import BF16, CONFIG, batch
from tests.training import full, world_mesh
from yafsdp_like import CPUOffloadPolicy, fully_shard, offload_activations
from yafsdp_like.models import Decoder
from yafsdp_like.optim import AdamW

pytestmark = pytest.mark.gpu

WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2])


def decoder(**options: Any) -> Any:
    with torch.device("meta"):
        model = Decoder(CONFIG)
    for layer in model.layers:
        fully_shard(layer, mesh=world_mesh("cuda"), mp_policy=BF16, transport="process_group", **options)
    fully_shard(model, mesh=world_mesh("cuda"), mp_policy=BF16, transport="process_group", **options)
    model.to_empty(device="cpu" if options else "cuda")
    return model


def fill(model: Any) -> None:
    """From the CPU's random numbers, wherever the shards are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local()
            local.copy_(torch.randn(local.shape, generator=generator) / 50)


@WORLD_SIZES
def test_gradients_of_shards_in_host_memory_are_those_of_shards_on_the_gpu(world_size: int) -> None:
    run_ranks(compare_gradients, world_size=world_size, device="cuda", timeout=120)


def compare_gradients() -> None:
    models = [decoder(offload_policy=CPUOffloadPolicy()), decoder()]
    for step in range(4):
        for model in models:
            if step % 2 == 0:
                fill(model)
                model.zero_grad()
            with sdpa_kernel(SDPBackend.MATH):  # others add up in any order in backward
                model(*batch()).backward()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            found, expected = p.grad.to_local(), q.grad.to_local()
            assert found.is_pinned() and p.to_local().is_pinned() and expected.is_cuda
            assert torch.equal(found, expected.cpu()), "the CPU has not waited, or a copy was lost"
            del found, expected  # or the next gradient takes other memory
    plan, report = models[0].memory_plan(), models[0].memory_report()
    assert (plan.nbytes, plan.host_nbytes) == (report.arena_nbytes, report.host_nbytes)
    assert models[1].memory_plan().nbytes > 2 * plan.nbytes


@WORLD_SIZES
def test_many_small_units_on_the_host_are_pinned_and_clipped(world_size: int) -> None:
    """Prevents: an error where two shards lie on one page."""
    run_ranks(train_small_units, world_size=world_size, device="cuda")


def train_small_units() -> None:
    model: Any = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40)))
    for module in (*model, model):
        fully_shard(module, mesh=world_mesh("cuda"), offload_policy=CPUOffloadPolicy())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        model(torch.ones(4, 8, device="cuda")).sum().backward()
        assert full(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).isfinite()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.to_local().is_pinned() for parameter in model.parameters())


def test_offloaded_activations_leave_two_blocks_on_the_gpu_and_change_no_bit() -> None:
    run_ranks(compare_activations, world_size=1, device="cuda", timeout=120)


def compare_activations() -> None:
    peaks, losses = [], []

    def measure(*_: Any) -> None:  # behind the start of the forward, which gives back the last step's gradients
        torch.cuda.reset_peak_memory_stats()
        peaks.append(-torch.cuda.memory_allocated())

    for offloads in (True, False):
        model = decoder()
        model.init_weights()
        offloaded = offload_activations(model.layers, min_nbytes=1 << 16) if offloads else None
        optimizer = AdamW(model.parameters(), lr=1e-4)
        for step in range(5):
            if step == 2:
                hook = model.layers[0].register_forward_pre_hook(measure)
                pinned = 0 if offloaded is None else offloaded.host_nbytes
            with sdpa_kernel(SDPBackend.MATH):  # others add up in any order in backward
                loss = model(*batch(512))
            if step == 2:
                peaks[-1] += torch.cuda.max_memory_allocated()
                hook.remove()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert offloaded is None or offloaded.host_nbytes == pinned > 0, "host memory is that of the first step"
        del model, optimizer, loss
    assert losses[:5] == losses[5:]
    assert peaks[0] < 0.6 * peaks[1], f"{peaks}: of eight blocks' activations two are there, and the loss's"
