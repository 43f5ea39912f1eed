"""How long steps take at least, by the bytes of weights that they read and that come over a link.

Owns the arithmetic over a placement of weights and a device's rates. What issuing and sums over ranks take is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yafsdp_like.hardware import Rates
    from yafsdp_like.inference.plan.placement import Placement


def read_nbytes(placement: Placement) -> int:
    """Return the bytes of weights that a step that decodes reads: all but an embedding's, of which it looks up rows.

    Tensor parallel ranks have the whole head, but each computes the logits of its part of the vocabulary.
    """
    *layers, head = [placement.packed_units[unit].nbytes for unit in placement.uses[1:]]
    return sum(layers) + (head // placement.num_ranks if placement.mode == "tensor_parallel" else head)


def moving_seconds(placement: Placement, rates: Rates) -> tuple[float, float]:
    """Return the seconds in which a forward's weights come over a link, and those of a byte of them; 0 if none do."""
    others = (placement.num_ranks - 1) / placement.num_ranks
    per_byte = {"gathered": others / rates.peer_nbytes, "streamed": 1 / rates.host_nbytes}.get(placement.mode, 0.0)
    return sum(placement.packed_units[unit].nbytes for unit in placement.non_resident) * per_byte, per_byte


def decode_seconds(
    placement: Placement, rates: Rates, itemsize: int, num_sequences: int = 0, pages_nbytes: int = 0
) -> float:
    """Return the seconds of a step that decodes a token of each of ``num_sequences``, whose pages have so many bytes.

    It reads weights, of ``itemsize`` bytes each, and pages, and meanwhile moves the weights that are not on the device.
    """
    weights = read_nbytes(placement)
    computing = 2 * num_sequences * weights / itemsize / rates.flops
    return max((weights + pages_nbytes) / rates.memory_nbytes, computing, moving_seconds(placement, rates)[0])
