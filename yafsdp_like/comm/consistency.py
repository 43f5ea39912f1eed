"""Ranks that fail together: an error of one rank ends the same step of work on all.

Owns the small exchanges between host processes (errors, small values); they block the CPU and travel over gloo. Knows
nothing of what the ranks are doing.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Value = TypeVar("Value")
ABOUT_INPUT = (ValueError, OSError)  # errors whose message is for the user, and needs no traceback


class AgreedError(RuntimeError):
    """What every rank raises when one failed; the message is that rank's, and the same everywhere."""


@contextmanager
def raise_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the body on every rank of `group`; if it fails on some, raise `AgreedError` on all of them.

    A rank whose error is a mistake of ours, not of the input, raises its own instead, with its traceback. The body must
    not communicate, or only in ways that fail on every rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    reports = all_gather_object(None if error is None else message_of(error), group)
    if error is not None and not isinstance(error, (*ABOUT_INPUT, AgreedError)):
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            raise AgreedError(report if all(r == report for r in reports) else f"{report} (rank {rank})") from error


def all_gather_object(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return every rank's value, in order of rank; blocks the CPU.

    Out of sight of dispatch modes, such as ``CommDebugMode``: it is no part of the work that these look at.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    with _disable_current_modes():
        dist.all_gather_object(values, value, group=group)
    return values


def check_same_on_all_ranks(group: dist.ProcessGroup, lines: Sequence[str], error: BaseException | None) -> None:
    """Raise on every rank of `group` unless all pass the same `lines` and none an `error`.

    A rank with an error raises it as it is. `RuntimeError` on the others, and on all for lines that differ: it names
    the first difference.
    """
    if group.size() == 1:
        if error is not None:
            raise error
        return
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    reports = all_gather_object((digest, None if error is None else f"{type(error).__name__}: {error}"), group)
    if error is not None:
        raise error
    failed = [(rank, message) for rank, (_, message) in enumerate(reports) if message is not None]
    if failed:
        raise RuntimeError("\n".join(f"rank {rank} failed to shard the model: {m}" for rank, m in failed))
    if any(other != digest for other, _ in reports):
        position, difference = first_difference(all_gather_object(list(lines), group))
        raise RuntimeError(
            f"ranks shard different models; the first difference is entry {position}: {difference}. Build the same "
            "modules, and call fully_shard on them in the same order with the same arguments, on every rank"
        )


def first_difference(lines_by_rank: Sequence[Sequence[str]]) -> tuple[int, str]:
    """Return where ranks' lines first differ, and what each rank has there."""
    longest = max(len(lines) for lines in lines_by_rank)
    padded = [[*lines, *["(nothing)"] * (longest - len(lines))] for lines in lines_by_rank]
    for position in range(longest):
        found: dict[str, list[int]] = {}
        for rank, lines in enumerate(padded):
            found.setdefault(lines[position], []).append(rank)
        if len(found) > 1:
            return position, "; ".join(f"rank {', '.join(map(str, ranks))}: {line}" for line, ranks in found.items())
    raise AssertionError("ranks disagree, yet no line differs")


def host_group() -> dist.ProcessGroup:
    """Make a communicator over all ranks for host memory, whose traffic waits for that of no other."""
    group = dist.new_group(backend="gloo", group_desc="yafsdp_host")
    assert group is not None
    return group


def message_of(error: BaseException) -> str:
    """Return the message of an error, with its type unless it is for the user as it is."""
    return str(error) if isinstance(error, (*ABOUT_INPUT, AgreedError)) else f"{type(error).__name__}: {error}"
