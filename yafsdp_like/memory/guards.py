"""Guard bytes around what may be written, and poison in what may not be read: debug mode's marks in memory.

Owns the two patterns, and how a damaged guard is found and described. Knows bytes, and what lies beside them by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.memory.arena import Place
    from yafsdp_like.memory.layout import FlatLayout

CANARY = 0xC5  # what guard bytes hold
POISON_INTEGER = 0x6B  # every byte of integers that may not be read, as kernels' allocators mark freed memory
_POISON_FLOAT = 0xFF  # every byte: NaN in each floating-point dtype


def fill_guard(guard: torch.Tensor) -> None:
    """Write the canary to ``guard``, ``(nbytes,)`` uint8."""
    with torch.no_grad():
        guard.fill_(CANARY)


def poison_byte(dtype: torch.dtype) -> int:
    """Return what every byte of released values of ``dtype`` is set to."""
    if dtype.is_floating_point or dtype.is_complex:
        return _POISON_FLOAT
    return 1 if dtype is torch.bool else POISON_INTEGER


def poison(flat: torch.Tensor) -> None:
    """Fill ``flat``, contiguous, with NaN, or with a byte pattern if it holds integers."""
    with torch.no_grad():
        flat.view(-1).view(torch.uint8).fill_(poison_byte(flat.dtype))


def written(flat: torch.Tensor) -> bool:
    """Return whether anything was written to ``flat`` since it was poisoned. Waits for the device."""
    return bool((flat.view(-1).view(torch.uint8) != poison_byte(flat.dtype)).any())


class Borders:
    """The guard bytes of one flat layout in memory.

    Args:
        what: what has the layout, in words.
        whole: where it lies.
        layout: segments, of which the bytes between are guards.
        names: of the segments.
    """

    def __init__(self, what: str, whole: Place, layout: FlatLayout, names: Sequence[str]) -> None:
        self.what = what
        self._sides = [tuple(None if k is None else names[k] for k in gap[:2]) for gap in layout.gaps]
        self._guards = [whole.part(gap).tensor(torch.uint8, (gap.nbytes,)) for _, _, gap in layout.gaps]

    def write(self) -> None:
        """Write the canary."""
        for guard in self._guards:
            fill_guard(guard)

    def damage(self) -> str | None:
        """Say which bytes were overwritten, and what lies before and behind them. Waits for the device.

        The canary is there again afterwards, so that each write is told of once.
        """
        with torch.no_grad():
            if not self._guards or bool((torch.cat(self._guards) == CANARY).all()):
                return None
        found = [
            damage_of(guard, f"{before!r}" if before else "its start", f"{behind!r}" if behind else "its end")
            for guard, (before, behind) in zip(self._guards, self._sides, strict=True)
        ]
        return f"in {self.what}: " + "; ".join(damage for damage in found if damage)


def damage_of(guard: torch.Tensor, before: str, behind: str) -> str | None:
    """Say which of the bytes of ``guard`` between two things were overwritten, and whence; they are mended."""
    wrong = (guard != CANARY).nonzero().flatten().tolist()
    if not wrong:
        return None
    fill_guard(guard)
    first, last = wrong[0], wrong[-1]
    told = f"bytes {first} to {last} of the {guard.numel()} between {before} and {behind} were overwritten"
    if first == 0:
        return f"{told}: a write past the end of {before}"
    if last == guard.numel() - 1:
        return f"{told}: a write before the start of {behind}"
    return f"{told}, from somewhere else"
