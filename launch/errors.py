"""What a run that fails says, and which rank says it.

A launcher ends all ranks as soon as one has ended, so ranks that know less wait for those that know more: a rank with
an error of its own speaks at once, one that was told of it a little later, one that lost another rank last. Of ranks
that know as much the first one speaks.
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from launch.command_line import GRACE_SECONDS, LOST_PEER, NO_MEMORY
from yafsdp_like.comm.consistency import ABOUT_INPUT, AgreedError

NOTE = "a rank ran out of memory"  # a key of the store
TOLD_SECONDS, LOST_SECONDS = 0.5, 2.5  # what ranks that know less wait before they speak


def report(error: Exception, rank: int) -> None:
    """Say what is wrong on standard error, in one line, or with its traceback where it is a mistake of ours."""
    if isinstance(error, torch.OutOfMemoryError) and (notes := getattr(error, "__notes__", [])):
        _leave_note(notes[0])
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        time.sleep(LOST_SECONDS)
    elif isinstance(error, AgreedError):
        time.sleep(TOLD_SECONDS)
    if not _is_first_to_speak(rank):
        time.sleep(GRACE_SECONDS)
    words = _one_line(error, rank)
    if words is None:
        traceback.print_exception(error)
    else:
        complain(words)


def complain(words: str) -> None:
    """Print one line of an error on standard error."""
    print(f"error: {words}", file=sys.stderr, flush=True)


def _one_line(error: Exception, rank: int) -> str | None:
    """None for a mistake of ours."""
    where = f" (rank {rank})" if rank or (dist.is_initialized() and dist.get_world_size() > 1) else ""
    if isinstance(error, AgreedError):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))
    ):
        first = (str(error) or type(error).__name__).splitlines()[0]
        advice = getattr(error, "__notes__", ["lower micro_batch_size or seq_len, or shard over more ranks"])
        return f"{first[:300]}{where}; {'; '.join(advice)}"
    if isinstance(error, ABOUT_INPUT):
        return f"{error}{where if rank or isinstance(error, OSError) else ''}"
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        why = _read_note() or str(error).splitlines()[0]
        return f"rank {rank} lost another rank, which has ended or cannot be reached: {why}"
    return None


def _leave_note(words: str) -> None:
    """Leave words for ranks that will have lost this one, where there is still a store."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):
            _get_default_store().set(NOTE, words)


def _read_note() -> str:
    """Return what a rank has left that ran out of memory; "" without one, or where nobody can be asked any more."""
    with contextlib.suppress(RuntimeError):
        if dist.is_initialized() and _get_default_store().check([NOTE]):
            return bytes(_get_default_store().get(NOTE)).decode()
    return ""


def _is_first_to_speak(rank: int) -> bool:
    """Before ranks have met, and where they cannot be asked any more, the first rank is."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rank == 0
    try:
        return int(_get_default_store().add("ranks that reported an error", 1)) == 1
    except RuntimeError:
        return rank == 0
