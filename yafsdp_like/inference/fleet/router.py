"""What a router remembers of a fleet: reports of its replicas, what it sent them since, and beginnings of prompts.

Owns how views of replicas are made from that; `routing.py` has the rule. Knows nothing of how reports and requests
travel.

[Note: beginnings]
A router has text, not tokens. It cuts a prompt into blocks of ``BLOCK`` bytes and names each by a hash of all text up
to its end, so that two prompts share as many names as they share whole blocks. Where a prompt was sent its pages are
likely to be cached; each replica's names are forgotten oldest first. A wrong guess costs a prompt's computation.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from yafsdp_like.inference.fleet.routing import ReplicaView, ranked

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Sequence

    from yafsdp_like.inference.fleet.standing import Standing

BLOCK = 256  # bytes of text
MAX_BLOCKS = 64  # of a prompt that are looked at: beginnings that differ later differ little
BYTES_PER_TOKEN = 4  # of English text, about


def blocks_of(model: str, text: bytes) -> tuple[bytes, ...]:
    """Return a name for each beginning of a model's prompt that is a number of whole blocks; see [Note: beginnings]."""
    hashed = hashlib.blake2b(model.encode(), digest_size=8)
    found = []
    for end in range(BLOCK, min(len(text), BLOCK * MAX_BLOCKS) + 1, BLOCK):
        hashed.update(text[end - BLOCK : end])
        found.append(hashed.digest())
    return tuple(found)


class _Known:
    """One replica."""

    def __init__(self) -> None:
        self.standing: Standing | None = None
        self.sent: Counter[str] = Counter()  # requests of each model, since the standing
        self.blocks: OrderedDict[bytes, None] = OrderedDict()  # the one sent longest ago first


class FleetRouter:
    """Chooses replicas for requests. Work of a choice is O(replicas x blocks of the prompt)."""

    def __init__(self, max_load: float = 1.0, most_blocks: int = 16384) -> None:
        """``max_load``: of a replica, from which on others come first; ``most_blocks``: remembered of each."""
        self.max_load, self._most_blocks = max_load, most_blocks
        self._known: dict[Hashable, _Known] = {}

    def keep(self, replicas: Collection[Hashable]) -> None:
        """Forget all replicas but these."""
        self._known = {replica: known for replica, known in self._known.items() if replica in replicas}

    def heard(self, replica: Hashable, standing: Standing) -> None:
        """Take a replica's report; one that was heard before changes nothing."""
        known = self._known.setdefault(replica, _Known())
        if known.standing is None or standing.number > known.standing.number:
            known.standing = standing
            known.sent.clear()

    def sent(self, replica: Hashable, model: str, blocks: Iterable[bytes]) -> None:
        """Note that a request of a model went to a replica."""
        known = self._known.setdefault(replica, _Known())
        known.sent[self._name(known, model)] += 1
        for block in blocks:
            known.blocks[block] = None
            known.blocks.move_to_end(block)
        while len(known.blocks) > self._most_blocks:
            known.blocks.popitem(last=False)

    def order(self, replicas: Sequence[Hashable], model: str, blocks: Sequence[bytes]) -> list[int]:
        """Return the indices of the replicas to try, the best first; all, where none is known to have the model."""
        views = [self.view(replica, model, blocks) for replica in replicas]
        return ranked(views, self.max_load) or ranked([ReplicaView(view.load) for view in views], self.max_load)

    def view(self, replica: Hashable, model: str, blocks: Sequence[bytes]) -> ReplicaView:
        """Return how a replica looks to a request; one that has not reported yet has nothing to do."""
        known = self._known.get(replica, _Known())
        sent = known.sent.total()
        if known.standing is None:
            return ReplicaView(0.0, num_requests=sent)
        models = known.standing.models
        load = known.standing.load + sum(models[n].request_load * k for n, k in known.sent.items() if n in models)
        num_requests = sent + sum(each.num_requests for each in models.values())
        name = self._name(known, model)
        if name not in models:
            return ReplicaView(load, wake_s=float("inf"), num_requests=num_requests)
        found, num_known = models[name], 0
        while num_known < len(blocks) and blocks[num_known] in known.blocks:
            num_known += 1
        saved_s = num_known * BLOCK / BYTES_PER_TOKEN * found.prompt_token_s
        has_model = found.num_requests + known.sent[name] > 0
        return ReplicaView(load, has_model, found.wake_s, saved_s, num_requests)

    def _name(self, known: _Known, model: str) -> str:
        return model if known.standing is None else known.standing.aliases.get(model, model)
