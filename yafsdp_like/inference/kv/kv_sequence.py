"""One sequence's pages: tables of integers, which `kv_cache.py` alone changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from yafsdp_like.inference.kv.prefix import Content

if TYPE_CHECKING:
    from yafsdp_like.inference.kv.prefix import Prefix

NO_PAGE = -1


class KVSequenceState(Enum):
    """Where the pages of a sequence are."""

    RESIDENT = auto()  # pages on the device
    SWAPPED = auto()  # pages on the host
    CLOSED = auto()


@dataclass(eq=False)
class KVSequence:
    """Tokens whose keys and values are in pages, and the tables that say in which. Changed by ``KVCache`` only."""

    tenant: str
    root: Prefix
    tables: tuple[list[int], ...]  # per group: the page of tokens [i page_size, (i + 1) page_size), or NO_PAGE
    firsts: list[int]  # per group: the first page that is still there
    state: KVSequenceState = KVSequenceState.RESIDENT
    prefixes: list[Prefix] = field(default_factory=list)  # one per full page
    tail: list[int] = field(default_factory=list)  # tokens of the page that is not full
    num_tokens: int = 0
    num_reserved: int = 0  # tokens behind them that have places of this sequence's own

    @property
    def num_pages(self) -> int:
        """Pages that ``num_tokens`` take in a group that keeps all."""
        return len(self.prefixes) + bool(self.tail)

    def content(self, group: int, index: int) -> Content | None:
        """Return what the ``index``-th page of a group holds; None if it is not full."""
        return Content(group, self.prefixes[index]) if index < len(self.prefixes) else None
