"""What holds device memory at the borders of a step's phases, by category. Made only where `log.memory` asks for it.

Owns when it is looked at. What is counted is ``shard/memory_report.py``'s: regions of arenas, tensors of gradients and
states, and on a GPU what PyTorch's allocator holds beside them.
"""

from __future__ import annotations

from typing import Any

import torch

from launch.metrics import GIB, Record
from yafsdp_like.shard.memory_report import holders_of

PHASES = "forward", "backward", "update"
PEAK, RESERVED, DEVICE = "allocator's peak", "reserved", "device"  # not parts of the sum


class MemoryTimeline:
    """The bytes of one rank at the end of each phase of the last step: nothing is allocated, and no stream waits.

    Ends of phases are those of the CPU's work, in whose order PyTorch's allocator gives out memory. Its peaks are reset
    at every border; ``peaks_gib`` has those of the whole run.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._phases: dict[str, Record] = {}
        self._most: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """Note what is held now; of several forwards or backwards of a step the last one counts."""
        found = {name: nbytes / GIB for name, nbytes in holders_of(self._model, self._optimizer).items()}
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            for name, peak in self.peaks_gib().items():
                self._most[name] = peak
            found[PEAK] = torch.cuda.max_memory_allocated(self._device) / GIB
            found[RESERVED] = torch.cuda.memory_reserved(self._device) / GIB
            found[DEVICE] = (total - free) / GIB
            torch.cuda.reset_peak_memory_stats(self._device)
        self._phases[phase] = found

    def take(self) -> dict[str, Record]:
        """Return what was noted of the last step: GiB by phase and category."""
        return {phase: self._phases[phase] for phase in PHASES if phase in self._phases}

    def peaks_gib(self) -> Record:
        """Return the allocator's peaks of the whole run, by the names that ``metrics.memory`` has for them."""
        if self._device.type != "cuda":
            return {}
        now = {
            "allocated_gib": torch.cuda.max_memory_allocated(self._device) / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved(self._device) / GIB,
        }
        return {name: max(value, self._most.get(name, 0.0)) for name, value in now.items()}


def parts_of(sample: Record) -> Record:
    """Return the categories of a sample, whose sum is what the device holds."""
    return {name: gib for name, gib in sample.items() if name not in (PEAK, RESERVED, DEVICE)}
