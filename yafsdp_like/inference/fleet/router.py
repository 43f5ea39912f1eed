"""What a router remembers of a fleet: reports of its replicas, what it sent them since, and beginnings of prompts.

Owns how views of replicas are made from that; `routing.py` has the rule. Knows nothing of how reports and requests
travel.

[Note: beginnings]
A router has text, not tokens. It cuts a prompt into blocks of ``BLOCK`` bytes and names each by a hash of all text up
to its end, so that two prompts share as many names as they share whole blocks. Where a prompt was sent its pages are
likely to be cached; each replica's names are forgotten oldest first. A wrong guess costs a prompt's computation.

[Note: requests that no report counts yet]
A report may have been made before a request reached its replica and be heard after the request was sent, so that a
report alone does not say that it counts what was sent before. Each sender therefore numbers its requests, a report has
the highest number that it counts of each sender (``Standing.arrived``), and what was sent counts beside a report until
the report's number has passed it. This needs no clock, and not every report. A request that never arrives is passed by
the sender's next one to the same replica, and once the replica has made ``LOST_AFTER`` reports it is taken for lost.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.inference.fleet.routing import ReplicaView, ranked

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Sequence

    from yafsdp_like.inference.fleet.standing import Standing

BLOCK = 256  # bytes of text
MAX_BLOCKS = 64  # of a prompt that are looked at: beginnings that differ later differ little
BYTES_PER_TOKEN = 4  # of English text, about
LOST_AFTER = 20  # reports of its replica a request that none of them counts is not waited for


def model_and_prompt(body: bytes) -> tuple[str, bytes]:
    """Return the model that a body names and the beginning of its prompt, as bytes; "" and b"" where it has none."""
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError):
        return "", b""  # the replica says why
    if not isinstance(sent, dict) or not isinstance(sent.get("model"), str):
        return "", b""
    parts = [sent.get(name) for name in ("tools", "messages", "prompt", "input") if sent.get(name)]
    return sent["model"], "".join(map(json.dumps, parts)).encode()[: BLOCK * MAX_BLOCKS]


def blocks_of(model: str, text: bytes) -> tuple[bytes, ...]:
    """Return a name for each beginning of a model's prompt that is a number of whole blocks; see [Note: beginnings]."""
    hashed = hashlib.blake2b(model.encode(), digest_size=8)
    found = []
    for end in range(BLOCK, min(len(text), BLOCK * MAX_BLOCKS) + 1, BLOCK):
        hashed.update(text[end - BLOCK : end])
        found.append(hashed.digest())
    return tuple(found)


@dataclass(frozen=True)
class _Sent:
    """A request that no report counts yet."""

    model: str
    sender: str
    number: int
    report: int  # the number of the last one that was heard before


class _Known:
    """One replica."""

    def __init__(self) -> None:
        self.standing: Standing | None = None
        self.sent: list[_Sent] = []
        self.num_sent: Counter[str] = Counter()  # of each model, by its own name where that is known
        self.blocks: OrderedDict[bytes, None] = OrderedDict()  # the one sent longest ago first

    def take(self, standing: Standing) -> None:
        """Take a report, and forget what it counts and what is lost; see [Note: requests that no report counts yet]."""
        self.standing = standing
        self.sent = [
            each
            for each in self.sent
            if each.number > standing.arrived.get(each.sender, 0) and standing.number <= each.report + LOST_AFTER
        ]
        self.num_sent = Counter(self.name_of(each.model) for each in self.sent)

    def name_of(self, model: str) -> str:
        """Return a model's own name, for any of its names."""
        return model if self.standing is None else self.standing.aliases.get(model, model)


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
            known.take(standing)

    def sent(self, replica: Hashable, model: str, blocks: Iterable[bytes], sender: str, number: int) -> None:
        """Note that a request of a model went to a replica.

        ``number``: above those of all requests that ``sender`` made before, and at least 1.
        """
        known = self._known.setdefault(replica, _Known())
        standing = known.standing
        if standing is None or number > standing.arrived.get(sender, 0):
            known.sent.append(_Sent(model, sender, number, 0 if standing is None else standing.number))
            known.num_sent[known.name_of(model)] += 1
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
        if known.standing is None:
            return ReplicaView(0.0, num_requests=len(known.sent))
        models = known.standing.models
        load = known.standing.load + sum(models[n].request_load * k for n, k in known.num_sent.items() if n in models)
        num_requests = len(known.sent) + sum(each.num_requests for each in models.values())
        name = known.name_of(model)
        if name not in models:
            return ReplicaView(load, wake_s=float("inf"), num_requests=num_requests)
        found, num_known = models[name], 0
        while num_known < len(blocks) and blocks[num_known] in known.blocks:
            num_known += 1
        saved_s = num_known * BLOCK / BYTES_PER_TOKEN * found.prompt_token_s
        has_model = found.num_requests + known.num_sent[name] > 0
        return ReplicaView(load, has_model, found.wake_s, saved_s, num_requests)
