"""A traced step is the real one: every birth and death of a storage, in order, of models that run on a CPU here.

What a GPU does otherwise is compared with what was measured there (``test_against_measurements.py``).
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from yafsdp_like import offload_activations
from yafsdp_like.models import PRESETS, Decoder, DecoderConfig
from yafsdp_like.models.moe import ExpertsConfig
from yafsdp_like.shard.forecast.activations import ExampleBatch, StepOptions, Trace, trace_step
from yafsdp_like.shard.forecast.storages import StepPlace, StorageMode, StorageTimeline

TINY = PRESETS["tiny"]
AS_CPU = StepOptions(on_gpu=False)
TOKENS = torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(0))


def really(model: nn.Module, *args: Tensor, **kwargs: Any) -> StorageTimeline:
    """What a step on real tensors takes, with attention as its operations."""
    model.zero_grad()
    mode = StorageMode()
    for tensor in (*model.parameters(), *model.buffers()):
        mode.ignore(tensor)
    with mode, sdpa_kernel(SDPBackend.MATH):
        inputs = [arg.clone() for arg in args], {name: value.clone() for name, value in kwargs.items()}
        step(model, mode, *inputs)
        mode.close()
    return mode.timeline.in_place()


def step(model: nn.Module, mode: StorageMode, args: list[Tensor], kwargs: dict[str, Tensor]) -> None:
    output = model(*args, **kwargs)
    loss = output if isinstance(output, Tensor) else output.loss
    if loss.numel() > 1:
        loss = torch.stack([loss.sum()]).sum()
    del output
    mode.place = StepPlace(phase="backward")
    loss.backward()


def traced(model: nn.Module, *args: Tensor, **kwargs: Any) -> Trace:
    return trace_step(model, (), ExampleBatch(args, kwargs), AS_CPU)


def sizes(timeline: StorageTimeline) -> list[int]:
    """Bytes that are born and that die, in order, the latter negative; empty storages left out."""
    born = timeline.born
    found = [born[event].nbytes if event >= 0 else -born[~event].nbytes for event in timeline.events]
    return [nbytes for nbytes in found if nbytes]


def peak(timeline: StorageTimeline, phase: str) -> int:
    return max(sum(live.values()) for place, live in timeline.levels() if place.phase == phase)


class Checkpointed(nn.Module):
    """Two blocks whose activations are computed again in backward, and a third."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(24, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks[:2]:
            x = x + checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.blocks[2](x).square().mean()


class Odd(nn.Module):
    """In-place work, views, a frozen weight, dropout, a parameter used twice and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.unused = nn.Linear(32, 32), nn.Linear(8, 8)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.register_buffer("scale", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(x).relu_() * self.scale
        x = F.dropout(self.frozen(x), 0.5) + torch.arange(32)
        x = self.twice(x).view(-1, 4, 8)
        return self.conv(x).transpose(1, 2).reshape(-1).square().sum()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ROWS = torch.zeros(6, 32)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "decoder": (lambda: Decoder(TINY), (TOKENS, TOKENS)),
    "head in chunks": (lambda: Decoder(DecoderConfig(64, 1, 4, 4, 96, 512, loss_chunk_size=20)), (TOKENS, TOKENS)),
    "window": (
        lambda: Decoder(DecoderConfig(64, 2, 4, 2, 96, 512, sliding_window=8, windowed_layers=(1,))),
        (TOKENS, TOKENS),
    ),
    "checkpoint": (lambda: Checkpointed(use_reentrant=False), (torch.zeros(5, 24),)),
    "reentrant checkpoint": (lambda: Checkpointed(use_reentrant=True), (torch.zeros(5, 24),)),
    "odd": (Odd, (ROWS,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_traced_step_takes_and_gives_back_what_a_real_one_does(name: str) -> None:
    make, args = MODELS[name]
    model = make()
    assert sizes(traced(model, *args).timeline) == sizes(really(model, *args))
    really(model, *args)  # the model still is what it was


class Chain(nn.Module):
    """Residual blocks one after the other."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(num_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def offloaded_chain() -> tuple[nn.Module, Any]:
    model = Chain()
    return model, offload_activations(model.blocks, min_nbytes=2048)


def offloaded_decoder() -> tuple[nn.Module, Any]:
    model = Decoder(DecoderConfig(64, 3, 4, 2, 96, 512))
    return model, offload_activations(model.layers, min_nbytes=2048)


def hidden(make: Callable[[int], Any]) -> Callable[[int], Any]:
    """Host memory that a timeline of the device leaves out."""

    def new_buffer(nbytes: int) -> Any:
        mode = _get_current_dispatch_mode()
        assert isinstance(mode, StorageMode)
        with mode.unseen():
            buffer = make(nbytes)
        mode.ignore(buffer.bytes)
        return buffer

    return new_buffer


@pytest.mark.parametrize(
    ("make", "args"), [(offloaded_chain, (torch.zeros(40, 32),)), (offloaded_decoder, (TOKENS, TOKENS))]
)
def test_offloaded_activations_leave_and_come_back_as_in_a_real_step(
    make: Any, args: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same births and deaths on the device, bytes copied, and host memory."""
    model, offloaded = make()
    found = traced(model, *args)
    assert offloaded.copied_nbytes == offloaded.host_nbytes == 0
    monkeypatch.setattr(offloaded, "_new_buffer", hidden(offloaded._new_buffer))
    assert sizes(found.timeline) == sizes(really(model, *args))
    copied = {way: sum(n for (_, w), n in found.copied.items() if w == way) for way in ("out", "in")}
    assert 0 < copied["in"] < copied["out"] == offloaded.copied_nbytes  # the last block's are still there
    assert found.host_nbytes == offloaded.host_nbytes


def test_bytes_that_two_calls_offload_of_one_unit_are_added_up() -> None:
    model, x = Chain(), torch.zeros(40, 32)
    calls = [offload_activations(blocks, min_nbytes=2048) for blocks in (model.blocks[:2], model.blocks[2:])]
    found = traced(model, x)
    really(model, x)
    assert all(call.copied_nbytes > 0 for call in calls)
    out = sum(nbytes for (_, way), nbytes in found.copied.items() if way == "out")
    assert out == sum(call.copied_nbytes for call in calls)


def test_a_forward_that_fails_is_one_error_and_no_log_of_torchs() -> None:
    logger, logged = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with pytest.raises(RuntimeError, match="reduction dim"):
            traced(nn.Linear(8, 8), torch.zeros(3, 4))
        assert logged == [] and not logger.disabled
    finally:
        logger.removeHandler(handler)


def test_a_plain_encoder_peaks_where_the_real_one_does() -> None:
    """Of the CPU's own kernels some round otherwise what they keep for themselves."""
    model, x = encoder(), torch.zeros(2, 16, 32)
    found, real = traced(model, x).timeline, really(model, x)
    assert peak(found, "forward") == pytest.approx(peak(real, "forward"), rel=0.01)
    assert peak(found, "backward") == pytest.approx(peak(real, "backward"), rel=0.01)


def test_experts_are_balanced() -> None:
    config = DecoderConfig(64, 1, 4, 4, 96, 512, experts=ExpertsConfig(4, 2))
    model = Decoder(config)
    found, real = traced(model, TOKENS, TOKENS).timeline, really(model, TOKENS, TOKENS)
    assert peak(found, "forward") == pytest.approx(peak(real, "forward"), rel=0.01)


def test_products_of_groups_of_rows_are_counted_as_products() -> None:
    rows, gradients = (torch.empty(64, width, dtype=torch.bfloat16, device="meta") for width in (32, 48))
    weights = torch.empty(4, 48, 32, dtype=torch.bfloat16, device="meta").mT
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    with StorageMode() as mode:
        torch.ops.aten._grouped_mm(rows, weights, ends)
        torch.ops.aten._grouped_mm(rows.T, gradients, ends)  # of the weights
    (work,) = mode.work.values()
    assert next(iter(mode.work))[2] == "matrix products" and work.num_kernels == 2
    assert work.flops == 2 * (2 * 64 * 32 * 48)


def test_transformers_llama_is_traced_to_the_byte() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    found = traced(model, input_ids=TOKENS, labels=TOKENS)
    assert sizes(found.timeline) == sizes(really(model, input_ids=TOKENS, labels=TOKENS))
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    again = traced(model, input_ids=TOKENS, labels=TOKENS)
    assert sizes(again.timeline) == sizes(really(model, input_ids=TOKENS, labels=TOKENS))
    assert sum(again.end("forward").values()) < sum(found.end("forward").values()) / 2
