"""A record of what ranks do together, in order, and a check that all do the same.

Two ranks that enter one collective for different things add up what does not belong together, or wait for ever. So each
rank notes what it is about to do with the others, and they compare digests of the notes. On CPUs they do before every
collective, since a collective blocks there anyway. On GPUs a note is a line and a hash; the digest is posted once a
backward and read when an optimizer is about to step, or at the forward after the next: work goes on meanwhile, and
the GPU waits for nothing.

Owns the exchange and the error, which is the same on all ranks and names the first difference. Knows nothing of what is
done.
"""

from __future__ import annotations

import datetime
import hashlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllreduceOptions

from yafsdp_like.comm.consistency import all_gather_object, first_difference
from yafsdp_like.comm.hang_letter import HangLetter, limit_of, post_places
from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES
from yafsdp_like.memory.plan import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from yafsdp_like.memory.streams import Event

_NUM_KEPT = 4096  # entries that a hang letter can look back on, at least
_IN_FLIGHT = 8  # comparisons that were posted and not read
_PRIME, _MASK = 0x100000001B3, (1 << 62) - 1


@dataclass(frozen=True)
class Entry:
    """One thing that ranks do together: in words, and as a number that stands for them on every rank."""

    words: str  # after "rank 1: ", in the third person
    code: int

    @classmethod
    def of(cls, words: str, subject: int) -> Entry:
        """Make an entry of ``words``; ``subject``, counted from 1, says which model of this process they are about."""
        words = words if subject == 1 else f"{words} (model {subject} of this process)"
        return cls(words, int.from_bytes(hashlib.sha256(words.encode()).digest()[:7]))


class Journal:
    """Of the ranks of one group, which all make the first ``note`` together: it blocks until they have connected."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.num_subjects = 0  # that the caller has given numbers to
        self._is_alone = group.size() == 1 or dist.get_backend(group) in ("fake", "threaded")
        self._at_once = device.type == "cpu"
        self._group, self._device = group, device
        self._channel: _Channel | None = None
        self._log: list[Entry] = []  # the last entries, of which those from ``_first`` on were not posted yet
        self._before_log = self._first = self._count = 0  # entries: before the log, posted, and in all
        self._digest = 0
        self._letter: HangLetter | None = None
        self._posted: deque[_Posted] = deque()
        self._recorded: list[Entry] | None = None

    def note(self, entry: Entry) -> None:
        """Note that this rank is about to do ``entry``.

        On CPUs it first waits for all others. Raises ``RuntimeError`` on all ranks where one does something else, or
        does not call before the group's timeout.
        """
        if self._is_alone:
            return
        if self._recorded is not None:
            self._recorded.append(entry)
            return
        self._log.append(entry)
        self._count += 1
        self._digest = (self._digest ^ entry.code) * _PRIME & _MASK
        if self._at_once:
            self.compare()

    def post(self) -> None:
        """Send a digest of what was noted since the last time, for others to compare theirs with.

        Does not block, unless the others are ``_IN_FLIGHT`` comparisons behind.
        """
        if self._first == self._count or self._recorded is not None:
            return
        self.settle(keep=_IN_FLIGHT - 1)
        if self._channel is None:
            self._channel = _Channel(self._group, self._device)
            self._letter = post_places(self._group, timeout_of(self._group, self._device), self._last)
        entries, digest = self._log[self._first - self._before_log :], self._digest
        self._first, self._digest = self._count, 0
        if self._first - self._before_log > 2 * _NUM_KEPT:
            del self._log[:_NUM_KEPT]
            self._before_log += _NUM_KEPT
        self._posted.append(_Posted(entries, *self._channel.post(digest)))

    def settle(self, keep: int = 0) -> None:
        """Read the comparisons that were posted, all but the last ``keep``.

        Blocks the CPU until all ranks have posted as much; raises ``RuntimeError`` on all of them if they have done
        different things.
        """
        if self._recorded is not None:
            return
        while len(self._posted) > keep:
            self._read(self._posted.popleft())

    def compare(self) -> None:
        """Post, and settle at once."""
        self.post()
        self.settle()

    def record(self) -> None:
        """Keep what is noted from here on: it is not done now, but each time that ``repeat`` is called."""
        if not self._is_alone:
            self.compare()
            self._recorded = []

    def recorded(self) -> Sequence[Entry]:
        """End the recording, and return what was noted in it."""
        entries, self._recorded = self._recorded or [], None
        return entries

    def repeat(self, entries: Sequence[Entry]) -> None:
        """Note that what was recorded is done once more."""
        self.settle(keep=1)
        for entry in entries:
            self.note(entry)
        if not self._at_once:
            self.post()

    def watch(self, event: Event) -> None:
        """Have a hang letter written if the device, which is to complete ``event``, waits for other ranks too long.

        Nothing is watched while a step is recorded: events are part of the graph then, and may not be asked.
        """
        if self._letter is not None and not self._at_once and self._recorded is None:
            self._letter.watch(event)

    def _last(self, most: int) -> tuple[int, list[str]]:
        """Return the number of the first of the last entries, ``most`` at most, and all of them in words."""
        count, log = self._count, self._log
        words = [entry.words for entry in log[-most:]]
        return max(0, count - len(words)), words

    def _read(self, posted: _Posted) -> None:
        assert self._channel is not None
        try:
            posted.work.wait()
        except RuntimeError as error:
            assert self._letter is not None
            raise RuntimeError(
                f"rank {self._group.rank()} {posted.entries[-1].words}, and the others do not: one has stopped, or has "
                f"not come within their group's timeout\n{self._letter.write(str(error))}"
            ) from error
        highest, lowest = posted.values.tolist()
        if highest != -lowest:
            self._posted.clear()
            self._first, self._digest = self._count, 0
            # Some ranks may have posted more than others, so in the same channel words would be compared with digests.
            self._channel = _Channel(self._group, self._device)
            assert self._letter is not None
            words = [entry.words for entry in posted.entries]
            raise RuntimeError(_different(all_gather_object((words, self._letter.place()), self._channel.group)))


class _Channel:
    """Exchanges of digests over host memory, which wait for no other communicator's."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=datetime.timedelta(seconds=limit_of(timeout_of(group, device))),
            backend="gloo",
            use_local_synchronization=True,
            group_desc="yafsdp_journal",
        )
        self._backend = self.group._get_backend(torch.device("cpu"))
        self._options = AllreduceOptions()
        self._options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        arena = Arena(torch.device("cpu"))
        arena.reserve([Region("digests", "digests", _IN_FLIGHT * ALIGNMENT_NBYTES)])
        rows = arena.place("digests").tensor(torch.int64, (_IN_FLIGHT, ALIGNMENT_NBYTES // torch.int64.itemsize))
        self._values = [row[:2] for row in rows]  # (2,): a digest and its negative, and then the largest of each
        self._arrays = [values.numpy() for values in self._values]
        self._next = 0

    def post(self, digest: int) -> tuple[torch.Tensor, dist.Work]:
        values, array = self._values[self._next], self._arrays[self._next]
        self._next = (self._next + 1) % _IN_FLIGHT
        array[0], array[1] = digest, -digest
        return values, self._backend.allreduce([values], self._options)


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> datetime.timedelta:
    """Return how long a collective of ``group`` may take: on ``device``'s type of device, if it has one for that."""
    on = device if device.type in {d.type for d in group._device_types} else torch.device("cpu")
    timeout: datetime.timedelta = group._get_backend(on).options._timeout
    return timeout


@dataclass(frozen=True)
class _Posted:
    """One comparison under way."""

    entries: list[Entry]
    values: torch.Tensor
    work: dist.Work


_journals: dict[dist.ProcessGroup, Journal] = {}  # by object, so that destroyed groups are not found again


def journal_of(group: dist.ProcessGroup, device: torch.device) -> Journal:
    """Return the one journal of ``group``, whose ranks compute on ``device``'s type of device."""
    if group not in _journals:
        _journals[group] = Journal(group, device)
    return _journals[group]


def _different(found: Sequence[tuple[Sequence[str], str]]) -> str:
    """Word the error by what each rank has done, in order, and where it is."""
    _, difference = first_difference([words for words, _ in found])
    return (
        f"ranks do different things; the first difference is {difference}. All must run the same units in the same "
        "order, forward and backward, and synchronize gradients in the same backwards; where they use different "
        "parameters of a unit, or units in backward that others do not, call "
        "model.set_reduce_scatter_unused_params(True). Where it was noticed: "
        + "; ".join(f"rank {rank} {place}" for rank, (_, place) in enumerate(found))
    )
