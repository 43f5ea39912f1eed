"""The places that a forward writes to, by name: activations, logits, and the tables that say what a step is about.

Integers and names, known before anything is allocated. Activations of one layer share bytes where they are not live
together; what each is for is said beside it, who fills it is the runner's and the forward's business.

Shapes: T tokens of a step, B sequences, D model, N heads, K kv heads, H head dim, F feed-forward, V vocabulary,
S positions of the longest sequence, G groups of layers that share page tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from yafsdp_like.kernels.decode_attention import choose_num_splits, workspace_numel
from yafsdp_like.kernels.sampling import NUM_FLOATS, NUM_INTS
from yafsdp_like.kernels.sampling_params import MAX_LOGPROBS
from yafsdp_like.memory.plan import LiveRange, Region, SlotPlace, SlotRequest, place

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from yafsdp_like.memory.layout import Segment
    from yafsdp_like.models.decoder import DecoderConfig

WORKSPACE, LOGITS, TABLES = "workspace", "logits", "tables"  # kinds, and their regions' names

# What a forward does, in order, the first four once a layer; a live range is from the first to the last that needs it.
PROJECT, ATTEND, OUTPUT, FEED, DRAW = range(5)
ALWAYS = LiveRange(((PROJECT, DRAW),))

_ROWS_BEFORE_PREFILL = 4  # rows of prefill begin at a multiple of it, so that kernels see aligned addresses


@dataclass(frozen=True)
class StepShape:
    """The most that one step may hold."""

    num_sequences: int
    num_tokens: int
    max_seq_len: int
    page_size: int
    num_groups: int
    num_multiprocessors: int = 1  # of the device; decides into how many pieces attention cuts keys

    @property
    def max_pages(self) -> int:
        """Of one sequence."""
        return -(-self.max_seq_len // self.page_size)


@dataclass(frozen=True)
class Buffer:
    """A tensor that a forward needs a place for."""

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    live: LiveRange

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlacedBuffers:
    """Where buffers lie: each one's segment in the region of its kind."""

    buffers: Mapping[str, Buffer]
    segments: Mapping[str, Segment]
    regions: tuple[Region, ...]

    @property
    def nbytes(self) -> int:
        return sum(region.nbytes for region in self.regions)

    def slots(self) -> tuple[SlotPlace, ...]:
        """As a plan prints them: activations, which share bytes."""
        return tuple(
            SlotPlace(name, buffer.kind, self.segments[name], buffer.live)
            for name, buffer in self.buffers.items()
            if buffer.kind == WORKSPACE and buffer.nbytes
        )


def place_buffers(buffers: Iterable[Buffer]) -> PlacedBuffers:
    """One region per kind; buffers of a kind share bytes where their live ranges do not meet."""
    by_kind: dict[str, list[Buffer]] = {}
    for buffer in buffers:
        by_kind.setdefault(buffer.kind, []).append(buffer)
    segments: dict[str, Segment] = {}
    regions = []
    for kind, found in by_kind.items():
        spots, nbytes = place([SlotRequest(b.name, b.nbytes, b.live) for b in found])
        segments |= {b.name: spot for b, spot in zip(found, spots, strict=True)}
        regions.append(Region(kind, kind, nbytes))
    return PlacedBuffers({b.name: b for found in by_kind.values() for b in found}, segments, tuple(regions))


def forward_buffers(config: DecoderConfig, step: StepShape, dtype: torch.dtype) -> tuple[Buffer, ...]:
    """All places that a forward of ``config`` in ``dtype`` needs, and its drawing of the next tokens."""
    return *_activations(config, step, dtype), *_results(config, step, dtype), *_tables(config, step, dtype)


def _activations(config: DecoderConfig, step: StepShape, dtype: torch.dtype) -> Iterable[Buffer]:
    tokens, head_dim = step.num_tokens, config.head_dim
    qkv_dim = (config.num_heads + 2 * config.num_kv_heads) * head_dim

    def live(first: int, last: int) -> LiveRange:
        return LiveRange(((first, last),))

    yield Buffer("hidden", WORKSPACE, dtype, (tokens, config.dim), ALWAYS)  # the residual stream
    yield Buffer("normed", WORKSPACE, dtype, (tokens, config.dim), ALWAYS)  # and what a layer adds to it
    yield Buffer("step_cos", WORKSPACE, dtype, (tokens, head_dim), live(PROJECT, FEED))  # of the step's positions
    yield Buffer("step_sin", WORKSPACE, dtype, (tokens, head_dim), live(PROJECT, FEED))
    yield Buffer("qkv", WORKSPACE, dtype, (tokens, qkv_dim), live(PROJECT, ATTEND))
    yield Buffer("attended", WORKSPACE, dtype, (tokens, config.num_heads * head_dim), live(ATTEND, OUTPUT))
    yield Buffer("attention", WORKSPACE, torch.float32, (_pieces_numel(config, step),), live(ATTEND, ATTEND))
    yield Buffer("gate_up", WORKSPACE, dtype, (tokens, 2 * config.ffn_dim), live(FEED, FEED))
    yield Buffer("last", WORKSPACE, dtype, (step.num_sequences, config.dim), live(DRAW, DRAW))  # of tokens that draw


def _pieces_numel(config: DecoderConfig, step: StepShape) -> int:
    """Elements for the pieces of decode attention, whichever power of two sequences decode: at least one piece each."""
    most, heads, head_dim = step.num_sequences, config.num_heads, config.head_dim

    def numel(size: int) -> int:
        splits = choose_num_splits(size, config.num_kv_heads, step.max_seq_len, step.num_multiprocessors)
        return workspace_numel(size, heads, head_dim, splits)

    sizes = {min(1 << power, most) for power in range(most.bit_length() + 1)}
    return max(most * heads * (head_dim + 1), *(numel(size) for size in sizes))


def _always(name: str, kind: str, dtype: torch.dtype, *shape: int) -> Buffer:
    return Buffer(name, kind, dtype, shape, ALWAYS)


def _results(config: DecoderConfig, step: StepShape, dtype: torch.dtype) -> Iterable[Buffer]:
    rows, vocab = step.num_sequences, config.vocab_size
    yield _always("logits", LOGITS, dtype, rows, vocab)
    yield _always("logprobs", LOGITS, torch.float32, rows, vocab)
    yield _always("log_sums", LOGITS, torch.float32, rows)
    yield _always("drawn_logprobs", LOGITS, torch.float32, rows)
    yield _always("top_logits", LOGITS, torch.float32, rows, min(MAX_LOGPROBS, vocab))
    yield _always("top_ids", LOGITS, torch.int64, rows, min(MAX_LOGPROBS, vocab))


def _tables(config: DecoderConfig, step: StepShape, dtype: torch.dtype) -> Iterable[Buffer]:
    rows, tokens, groups = step.num_sequences, step.num_tokens, step.num_groups
    table_rows = rows + _ROWS_BEFORE_PREFILL
    yield _always("token_pool", TABLES, torch.int64, rows + tokens)  # drawn by the last step, then from the host
    yield _always("token_index", TABLES, torch.int64, tokens)  # where in ``token_pool`` each token is
    yield _always("token_ids", TABLES, torch.int64, tokens)
    yield _always("positions", TABLES, torch.int64, tokens)
    yield _always("slot_mapping", TABLES, torch.int32, groups, tokens)  # as kernels/rotary.py reads them
    yield _always("page_tables", TABLES, torch.int32, groups, table_rows, step.max_pages)
    yield _always("seq_lens", TABLES, torch.int32, table_rows)
    yield _always("cu_seqlens_q", TABLES, torch.int32, rows + 1)
    yield _always("last_rows", TABLES, torch.int64, rows)
    yield _always("sampling_floats", TABLES, torch.float32, rows, NUM_FLOATS)
    yield _always("sampling_ints", TABLES, torch.int64, rows, NUM_INTS)
    yield _always("history", TABLES, torch.int32, rows, config.vocab_size)
    yield _always("cos", TABLES, dtype, step.max_seq_len, config.head_dim)  # of all positions
    yield _always("sin", TABLES, dtype, step.max_seq_len, config.head_dim)
