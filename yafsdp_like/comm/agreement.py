"""Ranks that fail together: an error of one rank ends the same step of work on all.

Owns the small exchanges between host processes (errors, small values); they block the CPU and travel over gloo. Knows
nothing of what the ranks are doing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")
ABOUT_INPUT = (ValueError, OSError)  # errors whose words are meant for the user, and need no traceback


class AgreedError(RuntimeError):
    """What every rank raises when one failed; the message is that rank's, and the same everywhere."""


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the body on every rank of `group`; if it fails on some, raise `AgreedError` on all of them.

    A rank that met a mistake of ours, not of the input's, raises its own error instead, with its traceback. The body
    must not communicate, or only in ways that fail on every rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    reports = share(None if error is None else described(error), group)
    if error is not None and not isinstance(error, (*ABOUT_INPUT, AgreedError)):
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            raise AgreedError(report if all(r == report for r in reports) else f"{report} (rank {rank})") from error


def share(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Every rank's value, in order of rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def host_group() -> dist.ProcessGroup:
    """A communicator over all ranks for host memory, whose traffic does not wait for that of any other."""
    group = dist.new_group(backend="gloo", group_desc="yafsdp_host")
    assert group is not None
    return group


def described(error: BaseException) -> str:
    """The words of an error, with its type unless they are meant for the user as they are."""
    return str(error) if isinstance(error, (*ABOUT_INPUT, AgreedError)) else f"{type(error).__name__}: {error}"
