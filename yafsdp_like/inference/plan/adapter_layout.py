"""Where the matrices of LoRA adapters lie: in slots on the device, and in images of slots on the host. Integers only.

[Note: slots of adapters]
A slot holds one adapter of the largest rank that is served, all layers back to back; a smaller adapter's is filled up
with zeros, which add nothing. An image on the host has the same bytes, so an adapter arrives in a slot by one copy. In
a layer, matrices of projections that read the same rows lie behind each other as the packed weights do.

Shapes: R rank of a slot, S slots; and this rank's K columns of a projection's weight, N rows of all that are one field.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from yafsdp_like.inference.plan.packed_weights import Field, PackedUnit, Parameter
from yafsdp_like.memory.layout import Segment
from yafsdp_like.memory.plan import Region

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from yafsdp_like.inference.options import EngineOptions
    from yafsdp_like.models.tensor_parallel import Cut

ADAPTER_SLOTS, ADAPTER_IMAGES = "adapter slots", "adapter images"  # kinds, and their regions' names
A, B = "lora_A", "lora_B"  # as peft calls them
DEFAULT_RANK = 16  # of slots, where nothing is said
PRODUCTS = ("qkv", "o", "gate_up", "down")  # fields of a layer that adapters add to


@dataclass(frozen=True)
class AdapterLayout:
    """Slots for adapters of one model, and images on the host."""

    rank: int  # of a slot
    num_slots: int
    num_images: int
    layers: tuple[PackedUnit, ...]  # of one adapter: fields "qkv_a" (P R, K), "qkv_b" (N, R) and so on
    sizes: dict[str, tuple[int, ...]]  # by product, rows of each of the P projections' weights

    @classmethod
    def of(cls, units: Sequence[PackedUnit], options: EngineOptions) -> AdapterLayout | None:
        """Lay out adapters of the model whose weights are ``units``; None where no adapter is served."""
        if options.adapter_slots is None:
            return None
        num_slots, rank = options.adapter_slots, options.adapter_rank or DEFAULT_RANK
        weights = [unit for unit in units if any(field.name == "qkv" for field in unit.fields)]
        layers = tuple(PackedUnit(unit.name, tuple(_fields(unit, rank))) for unit in weights)
        sizes = {
            field.name: tuple(parameter.shape[0] for parameter in field.parameters)
            for unit in weights
            for field in adapted_fields(unit)
        }
        return cls(rank, num_slots, options.host_adapters or num_slots, layers, sizes)

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's weights."""
        return self.layers[0].fields[0].dtype

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Return where each layer lies in a slot."""
        found, offset = [], 0
        for layer in self.layers:
            found.append(Segment(offset, layer.nbytes))
            offset += layer.nbytes
        return tuple(found)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot, or image."""
        return self.segments[-1].end_nbytes

    @property
    def num_columns(self) -> int:
        """Columns of x A^T of one product, at most."""
        return max(len(sizes) for sizes in self.sizes.values()) * self.rank

    def region(self) -> Region:
        """Return the region of all slots, on the device."""
        return Region(ADAPTER_SLOTS, ADAPTER_SLOTS, self.num_slots * self.slot_nbytes)

    def host_region(self) -> Region:
        """Return the region of all images, in host memory."""
        return Region(ADAPTER_IMAGES, ADAPTER_IMAGES, self.num_images * self.slot_nbytes)


def adapted_fields(unit: PackedUnit) -> Iterator[Field]:
    """Yield the weights of a layer that adapters add to: those of `PRODUCTS`, but no experts'."""
    for field in unit.fields:
        if field.name in PRODUCTS and len(field.shape) == 2:
            yield field


def _fields(unit: PackedUnit, rank: int) -> Iterator[Field]:
    """Yield both matrices of each product of a layer; of one that tensor parallel ranks cut, this rank's part."""
    for field in adapted_fields(unit):
        names = [parameter.name.removesuffix(".weight") for parameter in field.parameters]
        pairs = list(zip(names, field.parameters, strict=True))
        yield Field(
            f"{field.name}_a",
            tuple(
                Parameter(f"{name}.{A}", (rank, weight.shape[1]), weight.dtype, _cut(weight, 1))
                for name, weight in pairs
            ),
        )
        yield Field(
            f"{field.name}_b",
            tuple(
                Parameter(f"{name}.{B}", (weight.shape[0], rank), weight.dtype, _cut(weight, 0))
                for name, weight in pairs
            ),
        )


def _cut(weight: Parameter, dim: int) -> Cut | None:
    return weight.cut if weight.cut is not None and weight.cut.dim == dim else None
