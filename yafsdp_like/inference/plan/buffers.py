"""The buffers that a step writes to: activations, logits, and the tables that describe the step.

Fields declare the shape, dtype and live range of each tensor, from which buffers are planned before anything is
allocated; instances hold the tensors. Activations of one layer share bytes where they are not live together.

Shapes: T tokens of a step, B sequences, R rows that draw, A alignment of rows, D model, N heads, K kv heads,
H head dim, F feed-forward, E experts, visits of experts by the tokens of a step, V vocabulary, S positions of the
longest sequence, G groups of layers that share page tables, L log-probabilities of a token at most.
"""

# ruff: noqa: RUF009 (`_tensor` returns a `dataclasses.field`)

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from yafsdp_like.kernels.decode_attention import choose_num_splits, workspace_numel
from yafsdp_like.kernels.lora import MAX_PROJECTIONS
from yafsdp_like.kernels.lora import TILE_COLUMNS as ADAPTER_TILE_COLUMNS
from yafsdp_like.kernels.lora import max_num_tiles as max_num_adapter_tiles
from yafsdp_like.kernels.lora import workspace_numel as low_rank_numel
from yafsdp_like.kernels.quantized import workspace_nbytes as products_nbytes
from yafsdp_like.kernels.query_tiles import TILE_COLS, max_num_tiles, queries_per_tile
from yafsdp_like.kernels.sampling import NUM_FLOATS, NUM_INTS
from yafsdp_like.kernels.sampling_params import MAX_BIASES, MAX_LOGPROBS
from yafsdp_like.kernels.token_bits import num_words
from yafsdp_like.memory.layout import Segment
from yafsdp_like.memory.plan import Clock, LiveRange, Phase, Region, SlotPlace, SlotRequest, place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from yafsdp_like.memory.arena import Place
    from yafsdp_like.models.decoder import DecoderConfig

ROW_ALIGNMENT = 4  # of the first row of chunks in tables, see [Note: aligned rows]
WORKSPACE, LOGITS, TABLES = "workspace", "logits", "tables"  # kinds, and their regions' names

# What a forward does, in order, the first four once a layer; a live range is from the first to the last that needs it.
PROJECT, ATTEND, OUTPUT, FEED, DRAW = range(5)
STEPS = ("project", "attend", "output", "feed forward", "draw")
ALWAYS = LiveRange(((PROJECT, DRAW),))

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class StepShape:
    """The most that one step may hold."""

    num_sequences: int
    num_tokens: int
    max_seq_len: int
    page_size: int
    num_groups: int
    num_multiprocessors: int = 1  # of the device; decides into how many pieces attention cuts keys
    adapter_rank: int = 0  # of slots of adapters; 0: there are none, and nothing for them
    num_adapter_slots: int = 0
    num_decode_rows: int = 0  # of a step that only decodes, where some sequences have more than one

    @property
    def num_rows(self) -> int:
        """Rows that draw, at most."""
        return max(self.num_sequences, self.num_decode_rows)

    @property
    def max_pages(self) -> int:
        """Pages of one sequence, at most."""
        return -(-self.max_seq_len // self.page_size)


# --- what there is ---


def _tensor(*shape: str, dtype: torch.dtype | None = None, live: tuple[int, int] = (PROJECT, DRAW)) -> Any:
    """Declare a buffer by sizes that `_sizes` names; ``dtype`` None is the weights'."""
    return field(metadata={"shape": shape, "dtype": dtype, "live": LiveRange((live,))})


def _sizes(config: DecoderConfig, step: StepShape, dtype: torch.dtype) -> dict[str, int]:
    """Elements of each dimension, by what it is called in the declarations below."""
    batch, num_rows, head_dim = step.num_sequences, step.num_rows, config.head_dim
    per_tile = queries_per_tile(config.num_heads, config.num_kv_heads, head_dim, dtype.itemsize)
    return {
        "T": step.num_tokens,
        "B": batch,
        "R": num_rows,
        "R + T": num_rows + step.num_tokens,
        "table rows": max(2 * batch + ROW_ALIGNMENT, num_rows),  # R, or B, and B chunks from a multiple of A on
        "D": config.dim,
        "H": head_dim,
        "N H": config.num_heads * head_dim,
        "(N + 2 K) H": (config.num_heads + 2 * config.num_kv_heads) * head_dim,
        "2 F": 2 * (config.ffn_dim if config.experts is None else config.dense_ffn_dim or 0),
        "V": config.vocab_size,
        "S": step.max_seq_len,
        "G": step.num_groups,
        "L": min(MAX_LOGPROBS, config.vocab_size),
        "pages": step.max_pages,
        "tiles": 1 + max_num_tiles(step.num_tokens, batch, per_tile),
        "tile": TILE_COLS,
        "pieces": _num_pieces(config, step),
        **_expert_sizes(config, step),
        "products": _products_nbytes(config, step, dtype),
        "adapted": low_rank_numel(step.num_tokens, MAX_PROJECTIONS * step.adapter_rank),
        "adapted T": step.num_tokens if step.adapter_rank else 0,
        "adapted tiles": max_num_adapter_tiles(step.num_tokens, step.num_adapter_slots) if step.adapter_rank else 0,
        "adapted tile": ADAPTER_TILE_COLUMNS,
        "floats": NUM_FLOATS,
        "ints": NUM_INTS,
        "words": num_words(config.vocab_size),
        "biases": num_rows * MAX_BIASES,
    }


def _expert_sizes(config: DecoderConfig, step: StepShape) -> dict[str, int]:
    """Elements of what layers with experts need; 0 where there are none."""
    if config.experts is None:
        return dict.fromkeys(("E", "E + 1", "visits", "F of experts"), 0)
    num_experts, num_visits = config.experts.num_experts, step.num_tokens * config.experts.experts_per_token
    return {"E": num_experts, "E + 1": num_experts + 1, "visits": num_visits, "F of experts": config.ffn_dim}


def _products_nbytes(config: DecoderConfig, step: StepShape, dtype: torch.dtype) -> int:
    """Bytes for any product of a layer with a quantized matrix, of up to as many rows as a step has."""
    if config.quantization is None:
        return 0
    dim, attended = config.dim, config.num_heads * config.head_dim
    ffn_dim = config.ffn_dim if config.experts is None else config.dense_ffn_dim or 0
    shapes = [((config.num_heads + 2 * config.num_kv_heads) * config.head_dim, dim), (dim, attended)]
    if ffn_dim:
        shapes += [(2 * ffn_dim, dim), (dim, ffn_dim)]
    return max(products_nbytes(step.num_tokens, shape, dtype.itemsize) for shape in shapes)


def _num_pieces(config: DecoderConfig, step: StepShape) -> int:
    """Elements for the pieces of decode attention, whichever power of two sequences decode: at least one piece each."""
    most, heads, head_dim = step.num_rows, config.num_heads, config.head_dim

    def numel(size: int) -> int:
        splits = choose_num_splits(size, config.num_kv_heads, step.max_seq_len, step.num_multiprocessors)
        return workspace_numel(size, heads, head_dim, splits)

    sizes = {min(1 << power, most) for power in range(most.bit_length() + 1)}
    return max(most * heads * (head_dim + 1), *(numel(size) for size in sizes))


@dataclass(frozen=True)
class Activations:
    """What the layers of one forward write; in the weights' dtype where none is named."""

    kind: ClassVar = WORKSPACE
    hidden: Tensor = _tensor("T", "D")  # the residual stream
    normed: Tensor = _tensor("T", "D")  # and what a layer adds to it
    step_cos: Tensor = _tensor("T", "H", live=(PROJECT, FEED))  # of the step's positions
    step_sin: Tensor = _tensor("T", "H", live=(PROJECT, FEED))
    qkv: Tensor = _tensor("T", "(N + 2 K) H", live=(PROJECT, ATTEND))
    attended: Tensor = _tensor("T", "N H", live=(ATTEND, OUTPUT))
    attention: Tensor = _tensor("pieces", dtype=torch.float32, live=(ATTEND, ATTEND))  # of decode attention
    gate_up: Tensor = _tensor("T", "2 F", live=(FEED, FEED))
    router: Tensor = _tensor("T", "E", live=(FEED, FEED))  # its scores; see `kernels/routing.py` for what follows
    visit_experts: Tensor = _tensor("visits", dtype=torch.int32, live=(FEED, FEED))
    visit_weights: Tensor = _tensor("visits", dtype=torch.float32, live=(FEED, FEED))
    visit_order: Tensor = _tensor("visits", dtype=torch.int32, live=(FEED, FEED))
    visit_starts: Tensor = _tensor("E + 1", dtype=torch.int32, live=(FEED, FEED))
    expert_hidden: Tensor = _tensor("visits", "F of experts", live=(FEED, FEED))
    expert_parts: Tensor = _tensor("visits", "D", live=(FEED, FEED))  # what experts give for each visit
    last: Tensor = _tensor("R", "D", live=(DRAW, DRAW))  # normed, of tokens that draw
    products: Tensor = _tensor("products", dtype=torch.uint8, live=(PROJECT, FEED))  # of quantized matrices
    adapted: Tensor = _tensor("adapted", dtype=torch.float32, live=(PROJECT, FEED))  # between adapters' two products


@dataclass(frozen=True)
class Logits:
    """Scores of the next tokens, and log-probabilities where they are asked for."""

    kind: ClassVar = LOGITS
    logits: Tensor = _tensor("R", "V")
    logprobs: Tensor = _tensor("R", "V", dtype=torch.float32)
    log_sums: Tensor = _tensor("R", dtype=torch.float32)
    drawn_logprobs: Tensor = _tensor("R", dtype=torch.float32)
    top_logits: Tensor = _tensor("R", "L", dtype=torch.float32)  # then their log-probabilities, in falling order
    top_ids: Tensor = _tensor("R", "L", dtype=torch.int64)


@dataclass(frozen=True)
class BatchInputs(Generic[T]):
    """What a step reads of its batch, uploaded from host memory (``engine/batch_inputs.py``)."""

    kind: ClassVar = TABLES
    token_pool: T = _tensor("R + T", dtype=torch.int64)  # drawn by the last step, then from the host
    token_index: T = _tensor("T", dtype=torch.int64)  # where in ``token_pool`` each token is
    positions: T = _tensor("T", dtype=torch.int64)
    slot_mapping: T = _tensor("G", "T", dtype=torch.int32)  # where keys and values go; -1: nowhere, -2: no padding
    page_tables: T = _tensor("G", "table rows", "pages", dtype=torch.int32)
    seq_lens: T = _tensor("table rows", dtype=torch.int32)
    tiles: T = _tensor("tiles", "tile", dtype=torch.int32)  # of chunks' queries, see ``kernels/query_tiles.py``
    last_rows: T = _tensor("R", dtype=torch.int64)  # rows whose next token is drawn, unless all are, in order
    sampling_floats: T = _tensor("R", "floats", dtype=torch.float32)
    sampling_ints: T = _tensor("R", "ints", dtype=torch.int64)
    adapter_rows: T = _tensor("adapted T", dtype=torch.int32)  # tokens by adapters, see ``kernels/lora.py``
    adapter_tiles: T = _tensor("adapted tiles", "adapted tile", dtype=torch.int32)

    def map(self, function: Callable[[T], U]) -> BatchInputs[U]:
        """Apply ``function`` to every table."""
        return BatchInputs(**{table.name: function(getattr(self, table.name)) for table in fields(self)})


@dataclass(frozen=True)
class DeviceTables:
    """What is made or kept up to date on the device."""

    kind: ClassVar = TABLES
    token_ids: Tensor = _tensor("T", dtype=torch.int64)  # picked from ``token_pool``
    targets: Tensor = _tensor("T", dtype=torch.int64)  # what follows tokens of prompts that are scored
    history: Tensor = _tensor("R", "V", dtype=torch.int32)  # see ``kernels/sampling.py``, ``engine/histories.py``
    cos: Tensor = _tensor("S", "H")  # of all positions
    sin: Tensor = _tensor("S", "H")


@dataclass(frozen=True)
class LimitTables(Generic[T]):
    """What drawing once more reads where tokens are limited or biased (``engine/limited_drawing.py``)."""

    kind: ClassVar = TABLES
    bits: T = _tensor("R", "words", dtype=torch.int32)  # of tokens that may be drawn, see ``kernels/token_bits.py``
    floats: T = _tensor("R", "floats", dtype=torch.float32)
    ints: T = _tensor("R", "ints", dtype=torch.int64)
    is_limited: T = _tensor("R", dtype=torch.bool)
    bias_index: T = _tensor("biases", dtype=torch.int64)  # in (R, V), flat
    biases: T = _tensor("biases", dtype=torch.float32)
    drawn: T = _tensor("R", dtype=torch.int64)

    def map(self, function: Callable[[T], U]) -> LimitTables[U]:
        """Apply ``function`` to every table."""
        return LimitTables(**{table.name: function(getattr(self, table.name)) for table in fields(self)})


@dataclass(frozen=True)
class StepBuffers:
    """All buffers of one engine, on the device."""

    activations: Activations
    logits: Logits
    inputs: BatchInputs[Tensor]
    tables: DeviceTables
    limits: LimitTables[Tensor]


GROUPS: tuple[Any, ...] = (Activations, Logits, BatchInputs, DeviceTables, LimitTables)  # as in ``StepBuffers``


# --- where they lie ---


@dataclass(frozen=True)
class Buffer:
    """The plan of one tensor."""

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    live: LiveRange

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PlacedBuffers:
    """Where buffers lie: each one's segment in the region of its kind."""

    buffers: Mapping[str, Buffer]
    segments: Mapping[str, Segment]
    regions: tuple[Region, ...]
    image_nbytes: int = 0  # what encoding one image takes of PyTorch's allocator, beside the regions

    @property
    def nbytes(self) -> int:
        """Bytes of all regions, and of an image's activations beside them."""
        return sum(region.nbytes for region in self.regions) + self.image_nbytes

    def slots(self) -> tuple[SlotPlace, ...]:
        """Return activations as a plan prints them, since they share bytes."""
        return tuple(
            SlotPlace(name, buffer.kind, self.segments[name], buffer.live)
            for name, buffer in self.buffers.items()
            if buffer.kind == WORKSPACE and buffer.nbytes
        )

    @property
    def clock(self) -> Clock:
        """What the ticks of activations count: what a forward does, all but the last once a layer."""
        return Clock((WORKSPACE,), tuple(Phase(name, tick, tick) for tick, name in enumerate(STEPS)))

    def tensors(self, place_of: Callable[[str], Place]) -> StepBuffers:
        """Return the buffers on the places of their kinds, such as ``Arena.place`` of an arena that has the regions."""

        def tensor(buffer: Buffer) -> Tensor:
            segment = self.segments[buffer.name]
            return place_of(buffer.kind).part(segment).tensor(buffer.dtype, buffer.shape)

        def group(cls: Any) -> Any:
            return cls(**{declared.name: tensor(self.buffers[declared.name]) for declared in fields(cls)})

        return StepBuffers(*map(group, GROUPS))


def plan_buffers(config: DecoderConfig, step: StepShape, dtype: torch.dtype) -> PlacedBuffers:
    """Place all buffers that a forward of ``config`` in ``dtype`` needs, and its drawing of the next tokens.

    One region per kind; buffers of a kind share bytes where their live ranges do not meet.
    """
    sizes, buffers = _sizes(config, step, dtype), dict[str, Buffer]()
    for group in GROUPS:
        for declared in fields(group):
            how = declared.metadata
            shape = tuple(sizes[name] for name in how["shape"])
            buffers[declared.name] = Buffer(declared.name, group.kind, how["dtype"] or dtype, shape, how["live"])
    segments = {buffer.name: Segment(0, 0) for buffer in buffers.values() if not buffer.nbytes}
    regions = []
    for kind in (WORKSPACE, LOGITS, TABLES):
        found = [buffer for buffer in buffers.values() if buffer.kind == kind and buffer.nbytes]
        spots, nbytes = place([SlotRequest(b.name, b.nbytes, b.live) for b in found])
        segments |= {b.name: spot for b, spot in zip(found, spots, strict=True)}
        regions.append(Region(kind, kind, nbytes))
    image_nbytes = 0 if config.vision is None else config.vision.activation_nbytes(config.dim, dtype.itemsize)
    return PlacedBuffers(buffers, segments, tuple(regions), image_nbytes)
