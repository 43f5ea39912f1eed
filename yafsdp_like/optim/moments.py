"""What AdamW keeps of a parameter between steps: in which format, how many bytes, and how checkpoints convert it.

Owns the choice of a format per parameter and the way between a format and the floats of a state dict. The formats'
bits are in ``kernels/formats.py``.

[Note: moments in checkpoints]
A state dict has floats whatever the format: of 8 bit by blocks it has bfloat16, which holds every such value exactly.
What is loaded is converted, rounded to nearest, and a value that the format can hold keeps its bits. So a checkpoint of
any format, this package's or torch's, goes on in any other, and one that goes on in its own is exact.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from yafsdp_like.kernels.formats import TO_NEAREST, blocks_nbytes, fits_blocks, from_blocks, to_blocks

MomentsFormat = Literal["fp32", "bf16", "int8"]
FORMATS: tuple[MomentsFormat, ...] = ("fp32", "bf16", "int8")
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # by their names in a state: whether they are signed


def check_format(name: str) -> MomentsFormat:
    """Return ``name``; raise ``ValueError`` if it is no format of moments."""
    for known in FORMATS:
        if name == known:
            return known
    raise ValueError(f"AdamW: expected moments to be one of {', '.join(map(repr, FORMATS))}, found {name!r}")


def moments_nbytes(shape: torch.Size, dtype: torch.dtype, name: MomentsFormat, saved: bool = False) -> int:
    """Return the bytes of both moments of a rank's rows, ``shape``, of a parameter; ``saved``: in a state dict."""
    kept, numel = moments_dtype(shape, dtype, name), math.prod(shape)
    if kept == torch.uint8:
        return 2 * (torch.bfloat16.itemsize * numel if saved else blocks_nbytes(numel))
    return 2 * kept.itemsize * numel


def moments_dtype(shape: torch.Size, dtype: torch.dtype, name: MomentsFormat) -> torch.dtype:
    """Return what the moments of a parameter are kept in; uint8 is 8 bit by blocks, where rows are whole blocks."""
    if name == "bf16":
        return torch.bfloat16
    return torch.uint8 if name == "int8" and fits_blocks(shape) else dtype


def new_moment(param: torch.Tensor, name: MomentsFormat) -> torch.Tensor:
    """Return a moment of zeros: distributed as ``param``, or this rank's blocks alone."""
    dtype = moments_dtype(param.shape, param.dtype, name)
    if dtype == torch.uint8:
        return torch.zeros(blocks_nbytes(local(param).numel()), dtype=dtype, device=param.device)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)


def to_saved(moment: torch.Tensor, param: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return a moment as state dicts have it, see [Note: moments in checkpoints]."""
    if moment.dtype != torch.uint8:
        return moment
    rows = local(param)
    values = from_blocks(moment, signed).bfloat16().view(rows.shape)
    return DTensor(values, param._spec, requires_grad=False) if isinstance(param, DTensor) else values


def from_saved(
    moment: torch.Tensor, param: torch.Tensor, signed: bool, name: MomentsFormat, device: torch.device
) -> torch.Tensor:
    """Return a moment of a state dict as it is kept on ``device``.

    Raises ``ValueError`` for one that is placed otherwise than its parameter.
    """
    dtype = moments_dtype(param.shape, param.dtype, name)
    if dtype != torch.uint8:
        return moment.to(dtype=dtype, device=device)
    if moment.shape != param.shape or local(moment).shape != local(param).shape:
        raise ValueError(
            f"a loaded moment of a parameter of shape {tuple(param.shape)}, {tuple(local(param).shape)} here: expected "
            f"the same, found {tuple(moment.shape)}, {tuple(local(moment).shape)} here"
        )
    rows = local(moment).to(device=device, dtype=torch.float32).contiguous()
    return to_blocks(rows.view(-1), TO_NEAREST, signed)


def first_element(param: torch.Tensor) -> int:
    """Return where this rank's elements of a parameter begin in the whole, flat parameter.

    Raises ``ValueError`` where they are not consecutive there: random bits could not follow them to other ranks.
    """
    if not isinstance(param, DTensor):
        return 0
    rows = param._local_tensor
    shape, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if tuple(shape[1:]) != tuple(param.shape[1:]) or tuple(shape) != tuple(rows.shape):
        raise ValueError(
            f"AdamW: moments in bf16 and int8 need parameters that are sharded by consecutive rows, found one of shape "
            f"{tuple(param.shape)} with {param.placements}, {tuple(rows.shape)} here: keep its moments in fp32"
        )
    return offsets[0] * math.prod(param.shape[1:]) if offsets else 0


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, without a copy; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
