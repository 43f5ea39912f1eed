"""What a page holds, by name: the tokens in it and all tokens before them.

[Note: exact prefixes]
A prefix is a node that its parent and its page of tokens determine, and one dictionary holds them all under the key
(number of the parent, tokens). Numbers are never used twice. The dictionary's hash is therefore a chained content
hash, and since a dictionary compares keys that have equal hashes, two different texts never share a node: a collision
costs time, not correctness. A node lives as long as a page, a sequence or a longer prefix refers to it, and no longer:
when a page was evicted and its successor was not, the chain between them is still known, and the successor is found
again once the page was computed anew.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Prefix:
    """Whole pages of tokens from the start of a text; equal only to itself."""

    number: int
    parent: Prefix | None = field(repr=False)  # a long text's chain is deeper than Python recurses
    num_pages: int


class Content(NamedTuple):
    """What is in one page: keys and values of a prefix's last page of tokens, for one group of a model's layers."""

    group: int
    prefix: Prefix


@dataclass(frozen=True, slots=True)
class ImageContent:
    """What is in a page of an image: what the vision tower of this digest makes of the pixels of that one.

    Shared only among requests of the same ``salt``: how soon an answer begins would tell whether somebody sent it.
    """

    tower: bytes
    image: bytes
    salt: str | None = None


class PrefixTree:
    """All prefixes of one model that are still of interest. Each operation is O(page size)."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._nodes: WeakValueDictionary[tuple[int, Hashable], Prefix] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._nodes)

    def nodes(self) -> set[Prefix]:
        """Return all prefixes that are still of interest."""
        return set(self._nodes.values())

    def root(self, salt: Hashable = None) -> Prefix:
        """Return the empty prefix of ``salt``; texts of different salts (an adapter, a tenant) share nothing."""
        return self._make((-1, (salt,)), None)

    def extend(self, parent: Prefix, pages: Iterable[tuple[int, ...]]) -> list[Prefix]:
        """Return ``parent`` and one page more, that and another one, and so on.

        A token that stands for an image must be equal only to those of the same image, as ``ImageToken``.
        """
        found = list[Prefix]()
        for tokens in pages:
            parent = self._make((parent.number, tokens), parent)
            found.append(parent)
        return found

    def known(self, root: Prefix, tokens: Sequence[int], page_size: int) -> Iterator[Prefix]:
        """Yield the known prefixes of ``tokens``, shortest first."""
        node: Prefix | None = root
        for end in range(page_size, len(tokens) + 1, page_size):
            node = self._nodes.get((node.number, tuple(tokens[end - page_size : end]))) if node else None
            if node is None:
                return
            yield node

    def _make(self, key: tuple[int, Hashable], parent: Prefix | None) -> Prefix:
        node = self._nodes.get(key)
        if node is None:
            node = Prefix(next(self._numbers), parent, parent.num_pages + 1 if parent else 0)
            self._nodes[key] = node
        return node
