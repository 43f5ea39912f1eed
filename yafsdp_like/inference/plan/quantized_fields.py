"""What a quantized matrix is in a packed unit: fields of codes, scales, zeros and order, instead of one. Integers only.

A per-tensor scale is stored as a scale a row, since projections that are one matrix each have their own. Where blocks
of rows share a scale they are cut so that none lies in two projections (``rows_per_scale``). Of experts the fields are
stacks of what each expert's matrix has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from yafsdp_like.inference.plan.adapter_layout import PRODUCTS
from yafsdp_like.inference.plan.packed_weights import Field, PackedUnit, Parameter, pack_units
from yafsdp_like.kernels.quantized_matrix import run_of
from yafsdp_like.models.hf import modules_of, stored_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from yafsdp_like.models.decoder import DecoderConfig
    from yafsdp_like.models.quantization import Quantization
    from yafsdp_like.models.tensor_parallel import Cut

CODES, SCALES, ZEROS, ORDER = "weight", "scales", "zeros", "order"  # ends of parameters' names
BESIDE_CODES = (SCALES, ZEROS, ORDER)  # ends of names of the fields beside a product's codes


def stored_units(
    config: DecoderConfig, dtype: torch.dtype, cuts: Mapping[str, Cut] | None = None
) -> tuple[PackedUnit, ...]:
    """Pack units as ``pack_units`` does, with matrices as they are stored.

    Raises ValueError as ``pack_units`` does, where only some of the projections that are one matrix are quantized, and
    where ranks would cut groups that share a scale.
    """
    units = pack_units(config, dtype, cuts)
    if config.quantization is None:
        return units
    return tuple(
        PackedUnit(unit.name, tuple(stored for field in unit.fields for stored in _stored(field, config)))
        for unit in units
    )


def rows_per_scale(config: DecoderConfig) -> int:
    """Return how many rows of a matrix share a scale, in every matrix of the layers."""
    assert config.quantization is not None, "only rows of quantized matrices have scales"
    heads = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim)
    return config.quantization.rows_that_share((*heads, config.dim, config.ffn_dim, config.dense_ffn_dim or 0))


def _stored(field: Field, config: DecoderConfig) -> Iterator[Field]:
    """Yield what is stored of a field, or of a rank's part of it, in its place."""
    quantization = config.quantization
    if quantization is None or field.name not in PRODUCTS:
        yield field
        return
    modules = [parameter.name.removesuffix(f".{CODES}") for parameter in field.parameters]
    if not quantization.covers_all(modules_of([n for p in field.parameters for n in stored_names(p.name, config)])):
        yield field
        return
    rows = rows_per_scale(config)
    for parameter in field.parameters:
        _check_cut(parameter, quantization, rows)

    def each(end: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[Parameter, ...]:
        whole = end != CODES and quantization.group_columns is None  # ranks that cut columns have all scales of rows
        found = []
        for parameter, module, shape in zip(field.parameters, modules, shapes, strict=True):
            cut = None if whole and _cuts_columns(parameter) else parameter.cut
            found.append(Parameter(f"{module}.{end}", shape, dtype, cut))
        return tuple(found)

    parts = [parameter.shape for parameter in field.parameters]
    columns = quantization.group_columns
    groups = [(*stack, -(-n // rows), 1 if columns is None else -(-k // columns)) for *stack, n, k in parts]
    dtype = torch.float8_e4m3fn if quantization.bits == 8 else torch.uint8
    yield Field(field.name, each(CODES, [(*stack, n, k * quantization.bits // 8) for *stack, n, k in parts], dtype))
    yield Field(f"{field.name}_{SCALES}", each(SCALES, groups, quantization.scale_dtype))
    if quantization.has_zeros:
        yield Field(f"{field.name}_{ZEROS}", each(ZEROS, groups, torch.uint8))
    if quantization.ordered:  # see hf_quantized.py, [Note: act-order]
        orders = [Parameter(f"{m}.{ORDER}", (*p[:-2], p[-1]), torch.int32) for m, p in zip(modules, parts, strict=True)]
        yield Field(f"{field.name}_{ORDER}", tuple(orders if len(parts[0]) > 2 else orders[:1]))


def _cuts_columns(parameter: Parameter) -> bool:
    return parameter.cut is not None and parameter.cut.dim == len(parameter.shape) - 1


def _check_cut(parameter: Parameter, quantization: Quantization, rows: int) -> None:
    cut = parameter.cut
    if cut is None:
        return
    whole, columns = cut.whole(parameter.shape)[-1], quantization.group_columns
    *_, num_rows, num_columns = parameter.shape
    fits = num_rows % rows == 0
    if _cuts_columns(parameter):
        fits = columns is None or num_columns % columns == 0
        fits = fits and not quantization.ordered
        if quantization.bits == 4 and columns is None:
            fits = num_columns % 32 == 0 and run_of(num_columns) == run_of(whole)
    if not fits:
        raise ValueError(
            f"tensor_parallel over {cut.num_ranks} ranks would cut groups of {rows} rows or {columns} columns of "
            f"{parameter.name} that share a scale, or their order: use fewer ranks, or another mode"
        )
