"""Comparisons of what ranks do that are read later than they are posted, as on GPUs: here of two CPU ranks."""

import re
from typing import Any

import torch
import torch.distributed as dist

from tests.laws.test_divergence import Fork, first_gradients, shards
from tests.ranks import run_ranks
from yafsdp_like.comm.journal import _IN_FLIGHT, Entry, Journal

ODD_RANK = 1


def read_later() -> Journal:
    assert dist.group.WORLD is not None
    return Journal(dist.group.WORLD, torch.device("cuda"))  # whose notes are compared once posted; nothing is put there


def do(journal: Journal, *things: str) -> None:
    """Each of these things, posted alone."""
    for thing in things:
        journal.note(Entry.of(thing, 1))
        journal.post()


def told(journal: Journal) -> str:
    try:
        journal.settle()
    except RuntimeError as error:
        return str(error)
    return ""


def one_rank_is_ahead() -> str:
    journal = read_later()
    do(journal, "sits", "stands" if dist.get_rank() == ODD_RANK else "walks")
    if dist.get_rank() == ODD_RANK:
        do(journal, "runs", "jumps")
    return told(journal)


def test_ranks_are_told_the_first_difference_also_where_one_has_posted_more_since() -> None:
    """Prevents: a hang until the timeout, since one rank's words met another's digest."""
    first, second = run_ranks(one_rank_is_ahead, timeout=15.0)
    assert first == second and re.search("the first difference is rank 0: walks; rank 1: stands", first), first


def many_unread(differ_at: int | None) -> str:
    journal = read_later()
    try:
        for number in range(3 * _IN_FLIGHT):
            is_odd = number == differ_at and dist.get_rank() == ODD_RANK
            do(journal, f"does {number}" + (" otherwise" if is_odd else ""))
    except RuntimeError as error:
        return str(error)
    return told(journal)


def test_no_comparison_is_lost_however_many_are_posted_before_one_is_read() -> None:
    """Prevents: many backwards of one forward that write over digests that nobody has compared yet."""
    assert run_ranks(many_unread, None, timeout=15.0) == ["", ""]
    for differ_at in (0, 3 * _IN_FLIGHT - 1):
        first, second = run_ranks(many_unread, differ_at, timeout=15.0)
        assert first == second and f"rank 0: does {differ_at}; rank 1: does {differ_at} otherwise" in first, first


def stepped_after_different_backwards() -> tuple[str, list[float]]:
    """What an optimizer's step says, and one element of each weight after it."""
    model: Any = shards(Fork(), transport="process_group")
    x = torch.ones(4, 3)
    model(x, "both").backward()
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    journals, message = model._engine().collective_log.journals, ""
    for journal in journals:
        journal._at_once = False
    try:
        model(x, "ab"[dist.get_rank()]).backward()  # whose reductions meet
        assert any(grad is not None for grad in first_gradients(model))
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    finally:
        for journal in journals:
            journal._at_once = True
    return message, [p.to_local().flatten()[0].item() for p in model.parameters()]


def test_gradients_of_different_backwards_are_not_stepped_with() -> None:
    """Prevents: weights that have moved by another parameter's gradient before anybody looks, as on GPUs."""
    (first, weights), (second, others) = run_ranks(stepped_after_different_backwards, timeout=15.0)
    told = "rank 0: reduce-scatters gradients of unit 'root': a.*; rank 1: reduce-scatters gradients of unit 'root': b"
    assert first == second and re.search(told, first), first
    assert weights == others == [1.0, 1.0]


class Asked:
    """An event of a device."""

    times = 0

    def query(self) -> bool:
        self.times += 1
        return True


def record_a_step() -> tuple[bool, int]:
    """Whether an event is still watched that came before a recording, and how often those in it were asked."""
    journal, events = read_later(), [Asked() for _ in range(3)]
    do(journal, "sits")  # which connects
    journal.watch(events[0])
    journal.record()
    for event in events[1:]:
        journal.watch(event)
    journal.recorded()
    journal.watch(Asked())
    journal.settle()
    return events[0].times > 0, sum(event.times for event in events[1:])


def test_events_of_a_step_that_is_recorded_are_not_watched() -> None:
    """Prevents: a question to an event of a CUDA graph, which the driver refuses and the recording ends with."""
    assert run_ranks(record_a_step) == [(True, 0)] * 2
