"""What a training step takes on one rank, as numbers: bytes by category and phase, operations, and bytes on links.

Frozen values, made by ``training_forecast.py`` and read by whoever prints, draws or times them. No tensors, no modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from yafsdp_like.memory.plan import readable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from yafsdp_like.memory.plan import MemoryPlan

Phase = Literal["start", "forward", "backward", "update", "checkpoint"]
PHASES: tuple[Phase, ...] = ("start", "forward", "backward", "update", "checkpoint")

# Categories of device memory, in the order in which tables show them, and what each holds.
CATEGORIES = {
    "main shards": "what the optimizer updates; lower halves, where it is split",
    "compute shards": "the same in param_dtype: what is all-gathered",
    "gather slots": "units' full parameters, shared by live range",
    "gradient slots": "units' full gradients, shared by live range, and unsynchronized ones",
    "staging": "gradients of peers while they are added up, and shards on their way from and to the host",
    "granule ends": "unused ends of the memory that peers map",
    "buffers": "modules' buffers, and parameters that are not sharded",
    "gradient shards": "reduced gradients, from a unit's reduction to zero_grad",
    "optimizer states": "moments, and buffers for offloaded ones",
    "activations": "what forward saves for backward, and what both hold while they compute",
    "logits and loss": "of the same, what the root computes behind its last unit",
    "checkpoint": "what is made on the device to be saved",
    "allocator": "memory that PyTorch's allocator has reserved and holds no tensor",
    "NCCL": "the communication library's own buffers",
    "context": "the CUDA context, loaded kernels and libraries' workspaces",
}
OF_KIND = {  # categories by the kind of a plan's region
    "main_shard": "main shards",
    "remainder": "main shards",
    "compute_shard": "compute shards",
    "grad_shard": "gradient shards",
    "forward shards": "gather slots",
    "gather slots": "gather slots",
    "spill": "gather slots",
    "gradient slots": "gradient slots",
    "unsynced gradients": "gradient slots",
    "staging": "staging",
    "host staging": "staging",
    "layout staging": "staging",
    "granule end": "granule ends",
}
NO_TENSORS = ("allocator", "NCCL", "context")  # categories
ENGINE = (*dict.fromkeys(OF_KIND.values()),)  # categories whose bytes the plan knows exactly

WorkKind = Literal["matrix products", "attention", "other"]
Link = Literal["peers", "network", "host"]


@dataclass(frozen=True)
class ModuleCost:
    """What one kind of operations of one unit does in one phase of a step: what the time of the step follows from.

    ``unit`` is named as in the plan; "" is what runs outside of all units. Operations that a checkpoint runs again
    count in "backward". Bytes are those of each operation's operands and results in device memory, added up.
    """

    unit: str
    phase: Phase
    kind: WorkKind
    flops: int  # of matrix products and attention; 0 for others
    read_nbytes: int
    written_nbytes: int
    num_kernels: int  # operations that start a kernel: what the CPU has to issue


@dataclass(frozen=True)
class Transfer:
    """Bytes that one rank receives over one link in one step, for one operation of a unit.

    ``operation`` is "all-gather", "reduce-scatter", "average over replicas", or "... in" or "... out" with moments,
    remainders, activations, parameters (in) or gradients (out). Peers are the GPUs of one host; a host link is one
    GPU's to its own memory.
    """

    unit: str
    phase: Phase
    operation: str
    link: Link
    nbytes: int


@dataclass(frozen=True)
class PhaseMemory:
    """Device memory of one rank at the highest moment of one phase: bytes by category, and when that is."""

    phase: Phase
    nbytes: Mapping[str, int]  # by those of CATEGORIES that are not zero
    at: str = ""  # which unit's work runs then
    host_nbytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_nbytes(self) -> int:
        """Bytes on the device in all."""
        return sum(self.nbytes.values())

    @property
    def tensors_nbytes(self) -> int:
        """Bytes that tensors have among them."""
        return self.total_nbytes - sum(self.nbytes.get(category, 0) for category in NO_TENSORS)

    @property
    def engine_nbytes(self) -> int:
        """Bytes of the runtime's own regions among them, which the plan knows exactly."""
        return sum(self.nbytes.get(category, 0) for category in ENGINE)


@dataclass(frozen=True)
class TrainingForecast:
    """What one rank of a run will take from its second step on: memory by phase, operations, and bytes on links."""

    plan: MemoryPlan
    phases: tuple[PhaseMemory, ...]
    costs: tuple[ModuleCost, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    notes: tuple[str, ...] = ()  # what was assumed
    root_tail: float = 0.5  # of the root's reduction that is left at the end; a head of its own goes beside backward

    @property
    def peak(self) -> PhaseMemory:
        """The phase whose highest moment takes most; of equal ones, since what is reserved stays so, by tensors."""
        return max(self.phases, key=lambda phase: (phase.total_nbytes, phase.tensors_nbytes))

    def fits(self, device_nbytes: int) -> bool:
        """Return whether a device with so many bytes has room for the peak."""
        return self.peak.total_nbytes <= device_nbytes

    def link_nbytes(self) -> dict[str, int]:
        """Count the bytes that one rank receives over each link in one step."""
        totals: dict[str, int] = {}
        for transfer in self.transfers:
            totals[transfer.link] = totals.get(transfer.link, 0) + transfer.nbytes
        return totals

    @property
    def flops(self) -> int:
        """Operations of matrix products and attention in one forward and backward."""
        return sum(cost.flops for cost in self.costs)

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON holds them."""
        peak = self.peak
        return {
            "world_size": self.plan.world_size,
            "transports": list(self.plan.transports),
            "phases": [
                {"phase": p.phase, "at": p.at, "nbytes": dict(p.nbytes), "total_nbytes": p.total_nbytes}
                | ({"host_nbytes": dict(p.host_nbytes)} if p.host_nbytes else {})
                for p in self.phases
            ],
            "peak": {"phase": peak.phase, "at": peak.at, "total_nbytes": peak.total_nbytes},
            "flops": self.flops,
            "link_nbytes": self.link_nbytes(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [("", *(p.phase for p in self.phases))]
        for category in CATEGORIES:
            if any(p.nbytes.get(category) for p in self.phases):
                rows.append((category, *(_cell(p.nbytes.get(category, 0)) for p in self.phases)))
        rows.append(("on the device", *(readable(p.total_nbytes) for p in self.phases)))
        for category in dict.fromkeys(name for p in self.phases for name in p.host_nbytes):
            cells = (_cell(p.host_nbytes.get(category, 0)) for p in self.phases)
            rows.append((f"host: {category}", *cells))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        peak = self.peak
        lines.append(f"peak: {readable(peak.total_nbytes)} in {peak.phase}{', at ' + peak.at if peak.at else ''}")
        lines += [f"{readable(nbytes)} a step over the link: {link}" for link, nbytes in self.link_nbytes().items()]
        return "\n".join(line.rstrip() for line in lines)


def _cell(nbytes: int) -> str:
    return readable(nbytes) if nbytes else ""
