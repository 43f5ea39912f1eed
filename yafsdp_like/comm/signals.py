"""Barriers in stream order: no rank's work behind one starts before all ranks' work ahead of it has ended.

On GPUs a barrier is a list of flags that the stream itself writes and waits for, without a kernel: one thread that
waits on a multiprocessor keeps a matrix product that wants all of them waiting too (measured: up to a quarter longer).
On CPUs it is a barrier of the group, which blocks.

[Note: two flags]
Each rank has two flags for every other rank. In a barrier it sets the first of its own at each peer, waits until each
peer has set the first one here, and clears that; then the same with the second. The rank that waited for a flag
clears it, so all are 0 between barriers, and a barrier can be recorded and repeated. One flag would not do: a quick
peer could set it for the next barrier before it is cleared after this one. With two, a peer that sets a flag again has
passed the other one, which this rank set only after it had cleared the first.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from yafsdp_like.comm.descriptors import map_all_ranks
from yafsdp_like.comm.hang_letter import letter_of, limit_of
from yafsdp_like.memory.arena import MemoryBlock
from yafsdp_like.memory.streams import COMPUTE, GATHER, REDUCE, Event
from yafsdp_like.memory.vmm import MappedRange, checked, driver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CHANNELS = (GATHER, REDUCE, COMPUTE)  # streams that are in a barrier at the same time must not share flags
_FLAG_NBYTES = 4


class Barrier:
    """Barriers of CPU ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def stream_barrier(self, stream: str) -> None:
        """Block the CPU until all ranks are here."""
        self._group.barrier().wait()

    def arm_watchdog(self, event: Event) -> None:
        """Do nothing: a barrier of the group has a timeout of its own."""


class Flags:
    """Barriers of GPU ranks that map each other's memory."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._device = device
        self._block = MemoryBlock.allocate(len(_CHANNELS) * 2 * group.size() * _FLAG_NBYTES, device)
        torch.cuda.synchronize(device)  # flags are 0 before a peer can set one
        self._ranges = map_all_ranks(self._block.physical, group)
        self._barrier = {
            channel: _barrier_operations(self._ranges, number, group.rank()) for number, channel in enumerate(_CHANNELS)
        }
        timeout = group._get_backend(device).options._timeout
        self._watchdog = Watchdog(group.rank(), limit_of(timeout), partial(_letter, group))

    def stream_barrier(self, stream: str) -> None:
        """Issue the barrier to ``stream``, the current one, without blocking the CPU."""
        operations = self._barrier[stream]
        current = torch.cuda.current_stream(self._device).cuda_stream
        checked(driver.cuStreamBatchMemOp(current, len(operations), operations, 0))

    def arm_watchdog(self, event: Event) -> None:
        """End the process unless ``event`` is complete within the group's timeout."""
        if not torch.cuda.is_current_stream_capturing():  # a recorded barrier is watched when it is replayed
            self._watchdog.arm(event)


def _letter(group: dist.ProcessGroup) -> str:
    letter = letter_of(group)
    return "" if letter is None else letter.write()


def _barrier_operations(ranges: Sequence[MappedRange], channel: int, rank: int) -> list[Any]:
    """Return what a stream of ``rank`` does in a barrier; see [Note: two flags]."""
    others = [peer for peer in range(len(ranges)) if peer != rank]
    operations = []
    for phase in range(2):
        first = (2 * channel + phase) * len(ranges)
        operations += [_write(_flag(ranges[peer], first + rank), 1) for peer in others]
        for peer in others:
            flag = _flag(ranges[rank], first + peer)
            operations += [_wait_for_1(flag), _write(flag, 0)]
    return operations


def _flag(flags: MappedRange, number: int) -> int:
    return flags.bytes.data_ptr() + number * _FLAG_NBYTES


def _write(address: int, value: int) -> Any:
    """Write once all that the stream did before is visible to everybody."""
    operation = driver.CUstreamBatchMemOpParams()
    operation.writeValue.operation = driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WRITE_VALUE_32
    operation.writeValue.address = driver.CUdeviceptr(address)
    operation.writeValue.value = driver.cuuint32_t(value)
    return operation


def _wait_for_1(address: int) -> Any:
    operation = driver.CUstreamBatchMemOpParams()
    operation.waitValue.operation = driver.CUstreamBatchMemOpType.CU_STREAM_MEM_OP_WAIT_VALUE_32
    operation.waitValue.address = driver.CUdeviceptr(address)
    operation.waitValue.value = driver.cuuint32_t(1)
    operation.waitValue.flags = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ)
    return operation


class Watchdog:
    """Ends this process when work on its GPU has waited for other ranks too long, as NCCL's does.

    A stream that waits cannot be given an error, and a process that hangs says nothing: so ``write_letter`` prints
    where all ranks are.
    """

    def __init__(self, rank: int, timeout_s: float, write_letter: Callable[[], object]) -> None:
        self._rank, self._timeout_s, self._write_letter = rank, timeout_s, write_letter
        self._armed: tuple[Event, float] | None = None  # the oldest event that is not known to be complete
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, name="yafsdp_watchdog", daemon=True).start()

    def arm(self, event: Event) -> None:
        """Watch ``event``, which must be complete before the timeout; ignored while an earlier one is not complete."""
        with self._changed:
            if self._armed is None or self._armed[0].query():
                self._armed = event, time.monotonic() + self._timeout_s
                self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                while self._armed is None:
                    self._changed.wait()
                event, deadline = self._armed
                if event.query():
                    self._armed = None
                    continue
            if time.monotonic() > deadline:
                self._end()
            time.sleep(min(1.0, self._timeout_s / 10))

    def _end(self) -> None:
        print(
            f"rank {self._rank}: the GPU has waited for other ranks for {self._timeout_s:.0f} s, the timeout of their "
            "process group. A rank has stopped, or ranks do different things (other modules, other numbers of "
            "backwards): see the errors of the others, and init_process_group(timeout=...)",
            file=sys.stderr,
            flush=True,
        )
        self._write_letter()
        os.abort()
