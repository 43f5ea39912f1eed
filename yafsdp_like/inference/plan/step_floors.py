"""How long steps take at least, by the bytes of weights that they read and that come over a link.

Owns the arithmetic over a placement of weights and a device's rates. What issuing and sums over ranks take is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from yafsdp_like.inference.plan.quantized_fields import BESIDE_CODES

if TYPE_CHECKING:
    from collections.abc import Callable

    from yafsdp_like.hardware import Rates
    from yafsdp_like.inference.plan.packed_weights import Field, PackedUnit
    from yafsdp_like.inference.plan.placement import Placement


def read_nbytes(placement: Placement, visited: float = 1.0) -> int:
    """Return the bytes of weights that a step that decodes reads: all but an embedding's, of which it looks up rows.

    Of experts it reads the share ``visited``. Tensor parallel ranks have the whole head, but each computes the logits
    of its part of the vocabulary.
    """
    return _read(placement, visited, lambda unit: unit.nbytes, lambda field: field.numel * field.dtype.itemsize)


def read_numel(placement: Placement, visited: float = 1.0) -> int:
    """Return how many weights the bytes of ``read_nbytes`` are, each of which a row is multiplied with.

    Of a quantized matrix those are its codes, of 4 bits two in a byte; its scales, zeros and order are none.
    """
    return _read(placement, visited, lambda unit: sum(map(_numel, unit.fields)), _numel)


def _numel(field: Field) -> int:
    if field.name.endswith(tuple(f"_{end}" for end in BESIDE_CODES)):
        return 0
    return field.numel * (2 if field.dtype == torch.uint8 else 1)


def _read(
    placement: Placement, visited: float, of_unit: Callable[[PackedUnit], int], of_field: Callable[[Field], int]
) -> int:
    """Return what is read of layers, of experts' matrices a share, and of the head."""
    *layers, head = [placement.packed_units[unit] for unit in placement.uses[1:]]
    num_parts = placement.num_ranks if placement.mode == "tensor_parallel" else 1
    experts = sum(of_field(field) for unit in layers for field in unit.fields if len(field.shape) > 2)
    return sum(map(of_unit, layers)) - experts + int(visited * experts) + of_unit(head) // num_parts


def moving_seconds(placement: Placement, rates: Rates) -> tuple[float, float]:
    """Return the seconds in which a forward's weights come over a link, and those of a byte of them; 0 if none do."""
    others = (placement.num_ranks - 1) / placement.num_ranks
    per_byte = {"gathered": others / rates.peer_nbytes, "streamed": 1 / rates.host_nbytes}.get(placement.mode, 0.0)
    return sum(placement.packed_units[unit].nbytes for unit in placement.non_resident) * per_byte, per_byte


def decode_seconds(
    placement: Placement,
    rates: Rates,
    num_sequences: int = 0,
    pages_nbytes: int = 0,
    visited: float = 1.0,
) -> float:
    """Return the seconds of a step that decodes a token of each of ``num_sequences``, whose pages have so many bytes.

    It reads weights and pages, and meanwhile moves the weights that are not on the device.
    A token visits the share ``visited`` of experts, as if all were as likely.
    """
    weights = read_nbytes(placement, 1 - (1 - visited) ** max(num_sequences, 1))
    computing = 2 * num_sequences * read_numel(placement, visited) / rates.flops
    return max((weights + pages_nbytes) / rates.memory_nbytes, computing, moving_seconds(placement, rates)[0])
