"""The layout of a served model's weights: each unit's parameters, packed into one run of bytes. No tensor is made here.

A unit is what is moved to a device as a whole: the embedding, each layer, the head. A tied head is the embedding, which
then holds the final norm too. A vision tower and its projector are two more, behind all others, which always stay.

[Note: one layout]
A packed unit is its parameters back to back, in the order in which matrix products read them: the projections to
queries, keys and values are the rows of one matrix, as are gate and up. A resident unit has this layout on the device,
a streamed unit in host memory; of a gathered unit, rank r holds the r-th of W equal ranges of bytes, wherever
they cut a matrix. So a unit arrives by one copy per range and is ready to be read.
Tensor parallel ranks pack units of their own, which hold their parts of the parameters that are cut.

Experts' matrices are stacked as the decoder has them: those of all gates, then of all ups, then of all downs.

Shapes: D model, N heads, K kv heads, H head dim, F feed-forward, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import FlatLayout, Segment, aligned
from yafsdp_like.models.vision import PROJECTOR, TOWER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from yafsdp_like.models.decoder import DecoderConfig
    from yafsdp_like.models.tensor_parallel import Cut

EMBEDDING, HEAD = "embed_tokens", "lm_head"


@dataclass(frozen=True)
class Parameter:
    """A parameter of the decoder, by the name that it has there, or one rank's part of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: Cut | None = None  # None: it is whole

    @property
    def numel(self) -> int:
        """Elements of all rows."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Field:
    """One matrix or vector that a product reads: the rows of its parameters, one after the other."""

    name: str  # as in LayerWeights; "weight" and "norm" of embedding and head
    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        assert len({(p.shape[1:], p.dtype) for p in self.parameters}) == 1, f"rows of several lengths or dtypes: {self}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of all parameters, and the sizes of one row."""
        first = self.parameters[0].shape
        return (sum(p.shape[0] for p in self.parameters), *first[1:])

    @property
    def dtype(self) -> torch.dtype:
        """That of all parameters."""
        return self.parameters[0].dtype

    @property
    def numel(self) -> int:
        """Elements of all rows."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PackedUnit:
    """The bytes of one unit."""

    name: str
    fields: tuple[Field, ...]

    @cached_property
    def layout(self) -> FlatLayout:
        """A segment per field."""
        return FlatLayout.pack([sum(p.nbytes for p in field.parameters) for field in self.fields])

    @property
    def nbytes(self) -> int:
        """Bytes of all fields, with padding."""
        return self.layout.nbytes

    def part_nbytes(self, world_size: int) -> int:
        """Return the bytes that one of ``world_size`` ranks holds: the same on all, the last parts padded."""
        return aligned(-(-self.nbytes // world_size))

    def segments(self) -> dict[str, Segment]:
        """Return where each field lies."""
        return {field.name: segment for field, segment in zip(self.fields, self.layout.segments, strict=True)}

    def parameters(self) -> Iterator[tuple[Parameter, Segment]]:
        """Yield each parameter, and where it lies."""
        for field, segment in zip(self.fields, self.layout.segments, strict=True):
            offset = segment.offset_nbytes
            for parameter in field.parameters:
                yield parameter, Segment(offset, parameter.nbytes)
                offset += parameter.nbytes


def pack_units(
    config: DecoderConfig, dtype: torch.dtype, cuts: Mapping[str, Cut] | None = None
) -> tuple[PackedUnit, ...]:
    """Pack embedding, layers, and the head unless it is tied, in the order in which a forward reads them.

    Of parameters of layers that are in ``cuts``, by their names there, units hold one rank's part.

    Matrices are in full precision, whatever ``config.quantization`` says: see ``stored_units``.
    """
    norm = Field("norm", (Parameter("norm.weight", (config.dim,), dtype),))
    embedding, head = (_vocabulary(name, config, dtype) for name in (EMBEDDING, HEAD))
    configs = {f"layers.{i}": config.of_layer(i) for i in range(config.num_layers)}
    layers = [PackedUnit(name, _layer_fields(name, own, dtype, cuts or {})) for name, own in configs.items()]
    if config.tie_embeddings:
        return PackedUnit(EMBEDDING, (embedding, norm)), *layers, *_vision_units(config, dtype)
    untied = PackedUnit(EMBEDDING, (embedding,)), *layers, PackedUnit(HEAD, (head, norm))
    return *untied, *_vision_units(config, dtype)


def _vision_units(config: DecoderConfig, dtype: torch.dtype) -> Iterator[PackedUnit]:
    if config.vision is None:
        return
    parts = {TOWER: config.vision.tower_shapes(), PROJECTOR: config.vision.projector_shapes(config.dim)}
    for unit, shapes in parts.items():
        fields = (Field(name, (Parameter(f"{unit}.{name}", shape, dtype),)) for name, shape in shapes.items())
        yield PackedUnit(unit, tuple(fields))


def uses_of(packed_units: Sequence[PackedUnit], config: DecoderConfig) -> tuple[int, ...]:
    """Return the unit, by index, that each step of a forward reads: embedding, layers in order, head."""
    return (*range(config.num_layers + 1), 0 if config.tie_embeddings else config.num_layers + 1)


def _vocabulary(unit: str, config: DecoderConfig, dtype: torch.dtype) -> Field:
    return Field("weight", (Parameter(f"{unit}.weight", (config.vocab_size, config.dim), dtype),))


def _layer_fields(layer: str, config: DecoderConfig, dtype: torch.dtype, cuts: Mapping[str, Cut]) -> tuple[Field, ...]:
    dim, head_dim = config.dim, config.head_dim
    rows = {"q": config.num_heads * head_dim, "k": config.num_kv_heads * head_dim, "v": config.num_kv_heads * head_dim}

    def parameter(name: str, shape: tuple[int, ...]) -> Parameter:
        cut = cuts.get(name)
        return Parameter(f"{layer}.{name}", cut.part(shape) if cut else shape, dtype, cut)

    def field(name: str, shapes: dict[str, tuple[int, ...]]) -> Field:
        return Field(name, tuple(parameter(inner, shape) for inner, shape in shapes.items()))

    fields = [field("input_norm", {"input_layernorm.weight": (dim,)})]
    fields += [field("qkv", {f"self_attn.{x}_proj.weight": (n, dim) for x, n in rows.items()})]
    if config.qkv_bias:
        fields += [field("qkv_bias", {f"self_attn.{x}_proj.bias": (n,) for x, n in rows.items()})]
    if config.qk_norm:
        fields += [field(f"{x}_norm", {f"self_attn.{x}_norm.weight": (head_dim,)}) for x in ("q", "k")]
    return (
        *fields,
        field("o", {"self_attn.o_proj.weight": (dim, rows["q"])}),
        *([field("o_bias", {"self_attn.o_proj.bias": (dim,)})] if config.o_bias else []),
        field("post_norm", {"post_attention_layernorm.weight": (dim,)}),
        *_feed_forward(config, field),
    )


def _feed_forward(config: DecoderConfig, field: Callable[[str, dict[str, tuple[int, ...]]], Field]) -> Iterator[Field]:
    """Yield the matrices of one feed-forward, or the router and those of all experts."""
    dim, ffn_dim = config.dim, config.ffn_dim
    if config.experts is None:
        yield field("gate_up", {f"mlp.{x}_proj.weight": (ffn_dim, dim) for x in ("gate", "up")})
        yield field("down", {"mlp.down_proj.weight": (dim, ffn_dim)})
        if config.ffn_bias:
            yield field("gate_up_bias", {f"mlp.{x}_proj.bias": (ffn_dim,) for x in ("gate", "up")})
            yield field("down_bias", {"mlp.down_proj.bias": (dim,)})
        return
    num_experts = config.experts.num_experts
    yield field("router", {"mlp.gate.weight": (num_experts, dim)})
    yield field("gate_up", {f"mlp.experts.{x}_proj": (num_experts, ffn_dim, dim) for x in ("gate", "up")})
    yield field("down", {"mlp.experts.down_proj": (num_experts, dim, ffn_dim)})
