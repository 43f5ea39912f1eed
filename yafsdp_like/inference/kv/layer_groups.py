"""Groups of a model's layers that have the same attention window, and therefore share page tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.inference.kv.slabs import PageShape, ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class LayerGroup:
    """Layers of a model that have the same window, and the shape of their pages."""

    layers: tuple[int, ...]  # of the model; the shape's layer i is layers[i]
    shape: PageShape
    window: int | None = None  # keys that a query sees, its own included; None: all before it

    def __post_init__(self) -> None:
        if len(self.layers) != self.shape.num_layers:
            raise ValueError(f"layers {self.layers} need a page shape of {len(self.layers)} layers, found {self.shape}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window must be at least 1, found {self.window}")

    def first_page(self, num_tokens: int) -> int:
        """Return the first page that a token behind ``num_tokens`` others, or a later one, reads."""
        return 0 if self.window is None else max(0, num_tokens - self.window + 1) // self.shape.page_size

    def max_live_pages(self, num_tokens: int, chunk: int) -> int:
        """Return the most pages that a sequence of ``num_tokens`` holds, written at most ``chunk`` tokens at a time."""
        if self.window is not None:
            num_tokens = min(num_tokens, self.window + chunk + self.shape.page_size)
        return ceil_div(num_tokens, self.shape.page_size)

    @classmethod
    def of_windows(
        cls, windows: Sequence[int | None], num_kv_heads: int, head_dim: int, page_size: int, dtype: str = "bfloat16"
    ) -> tuple[LayerGroup, ...]:
        """Make one group per distinct window, in order of the first layer that has it.

        ``windows`` has one entry per layer.
        """
        layers: dict[int | None, list[int]] = {}
        for layer, window in enumerate(windows):
            layers.setdefault(window, []).append(layer)
        return tuple(
            cls(tuple(found), PageShape(len(found), num_kv_heads, head_dim, page_size, dtype), window)
            for window, found in layers.items()
        )
