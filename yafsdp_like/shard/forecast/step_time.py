"""How long a step will take, and what of it is what: from a forecast's operations and bytes, and a machine's rates.

Owns the arithmetic. Nothing here measures, and no tensor is made. `scripts/bench/scale.py` draws its estimates for many
hosts from the same pieces.

[Note: what a step is made of]
The device computes, and the kernel that adds peers' gradients holds it meanwhile. Beside compute run the stream of
gathers and that of reductions, over links. Forward takes as long as the longest of these, backward too; what the root
computes (a head and its loss) is beside no traffic. Offloaded activations go and come on streams of their own. Nothing
hides the gathers of the root and the first block before forward, except the update before them, nor the root's
reduction at the end of backward. Then comes the update, bound by memory. All of it is issued by one thread of the CPU,
which runs ahead of the device where it can: a phase cannot end before it is issued.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from yafsdp_like.hardware import MachineRates
    from yafsdp_like.shard.forecast.quantities import ModuleCost, Phase, TrainingForecast, Transfer

UPDATE_OVER_COPY = 1.1  # AdamW's kernel over a copy of as many bytes: measured, 8B on two H200, with fp32 moments
NARROW_OVER_COPY = 1.45  # the same with moments in bf16 or int8, rounded stochastically; 3B on one H200, 8B on two
BOTH_WAYS = 0.887  # of a host link's rate one way, that each way has while moments come and go; 3B on one H200
RECOMPUTING = 1.5  # of a unit's forward on the CPU: the same hooks again, and checkpointing's own
ACTIVATIONS = "activations out", "activations in"  # operations
REDUCED_BESIDE = 0.29  # of a collective's time that it takes from compute; measured over NCCL on two H200, T 4096


@dataclass(frozen=True)
class Traffic:
    """Gathers or reductions: seconds that they take of each of this rank's resources."""

    link: float = 0.0  # bytes from peers
    gaps: float = 0.0  # between copies, and barriers
    network: float = 0.0  # collectives, their latency included
    adding: float = 0.0  # the kernel, while which matrix products stand still
    host: float = 0.0  # copies between this device and its host, in the direction that takes longer

    @property
    def stream(self) -> float:
        """Seconds in all: nothing of it overlaps with another part of it."""
        return self.link + self.gaps + self.network + self.adding + self.host

    def times(self, number: float) -> Traffic:
        """Return the traffic of `number` of these."""
        return Traffic(*(number * part for part in dataclasses.astuple(self)))

    def __add__(self, other: Traffic) -> Traffic:
        """Return both, one after the other."""
        return Traffic(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def longest(lasts: Mapping[str, float]) -> tuple[float, str]:
    """Return the seconds and the name of what a phase lasts as long as."""
    bound = max(lasts, key=lambda name: lasts[name])
    return lasts[bound], bound


def beside(
    compute: float, gathers: Traffic, reductions: Traffic, taken: float, take_turns: bool = False
) -> dict[str, float]:
    """Return what a phase could last as long as, by name: compute with what is taken from it, links, and streams."""
    both = gathers + reductions
    lasts = {"compute": compute + taken}
    if take_turns:
        return lasts | {"both streams": both.stream - both.adding}
    lasts |= {"link": both.link, "network": both.network, "host link": both.host}
    return lasts | {"gathers": gathers.stream, "reductions": reductions.stream}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of one rank, in parts that add up."""

    forward: float  # compute of the device
    backward: float
    exposed: float  # communication and copies that nothing hides, and the adding of gradients
    issuing: float  # what the device waits for the CPU
    update: float
    forward_bound: str  # what it lasts as long as: "compute", "the CPU", or a link or stream
    backward_bound: str
    source: str  # of the rates

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return self.forward + self.backward + self.exposed + self.issuing + self.update

    def __str__(self) -> str:
        names = ("forward", "backward", "exposed", "issuing", "update")
        parts = ", ".join(f"{name} {getattr(self, name) * 1e3:.1f}" for name in names)
        return (
            f"{self.seconds * 1e3:.1f} ms a step ({parts} ms; forward is bound by {self.forward_bound}, backward by "
            f"{self.backward_bound}; from {self.source})"
        )


@dataclass(frozen=True)
class StepKind:
    """What a forecast does not say of the steps that are timed."""

    clips: bool = True  # gradients are read once more, for their norm
    is_graph: bool = False  # forward and backward are replayed, and the CPU issues nothing
    num_accumulated: int = 1  # forwards and backwards of a step
    root: str = "root"  # the root unit's name in the plan


class _Times:
    """The parts of one forecast on one machine."""

    def __init__(self, forecast: TrainingForecast, rates: MachineRates, kind: StepKind) -> None:
        self.forecast, self.rates, self.kind = forecast, rates, kind
        self.num_ranks = forecast.plan.world_size
        self.is_peer = any(transport.startswith("peer") for transport in forecast.plan.transports)
        units = dict.fromkeys(cost.unit for cost in forecast.costs)
        self.units = [unit for unit in units if unit]
        self.root = kind.root

    def compute(self, phase: Phase, of_root: bool | None = None) -> float:
        """Seconds of the device; of the root and what is outside of units alone, or of all but these."""
        return sum(
            seconds_of(cost, self.rates)
            for cost in self.forecast.costs
            if cost.phase == phase and of_root in (None, cost.unit in ("", self.root))
        )

    def issued(self, phase: Phase) -> float:
        """Seconds of the CPU."""
        if self.kind.is_graph:
            return 0.0
        num_kernels = sum(cost.num_kernels for cost in self.forecast.costs if cost.phase == phase)
        num_units = len(self.units) + (RECOMPUTING * self._num_recomputed() if phase == "backward" else 0)
        return num_kernels * _known(self.rates, "operation_s") + num_units * _known(self.rates, "unit_s") / 2

    def _num_recomputed(self) -> int:
        """Units whose forward runs again in backward: their products are three times forward's then, not twice."""
        flops = {(unit, phase): 0 for unit in self.units for phase in ("forward", "backward")}
        for cost in self.forecast.costs:
            if cost.unit and cost.phase in ("forward", "backward") and cost.kind == "matrix products":
                flops[cost.unit, cost.phase] += cost.flops
        return sum(flops[unit, "backward"] > 2.5 * flops[unit, "forward"] > 0 for unit in self.units)

    def traffic(self, phase: Phase, reduces: bool, of_root: bool) -> Traffic:
        """Gathers, or reductions, of the root or of all other units."""
        found = Traffic()
        for transfer in self.forecast.transfers:
            is_root = transfer.unit in ("", self.root)
            if transfer.operation in ACTIVATIONS:
                continue
            is_reduction = transfer.operation not in ("all-gather", "parameters in")
            if transfer.phase == phase and is_root == of_root and is_reduction == reduces:
                found += self._of(transfer)
        return found

    def activations(self, phase: Phase) -> float:
        """Seconds in which offloaded activations cross the link to the host, in either direction."""
        return sum(self._of(t).host for t in self.forecast.transfers if t.phase == phase and t.operation in ACTIVATIONS)

    def _of(self, transfer: Transfer) -> Traffic:
        if transfer.link == "host":
            name = "to_device_nbytes" if transfer.operation.endswith(" in") else "to_host_nbytes"
            return Traffic(host=transfer.nbytes / _known(self.rates, name))
        reduces = transfer.operation != "all-gather"
        if transfer.link == "network" or not self.is_peer:
            name = "reduce_scatter" if reduces else "all_gather"
            whole = transfer.nbytes * self.num_ranks // max(1, self.num_ranks - 1)
            rate = self.rates.collective_nbytes(name, whole) or _known(self.rates, "peer_nbytes")
            return Traffic(network=transfer.nbytes / rate)
        link = transfer.nbytes / _known(self.rates, "peer_nbytes")
        return Traffic(link, adding=self._adding(transfer) if reduces else 0.0)

    def _adding(self, transfer: Transfer) -> float:
        """Seconds in which every rank's part of the gradients is read, and their sum written."""
        read = transfer.nbytes * self.num_ranks / max(1, self.num_ranks - 1)
        plan = self.forecast.plan
        written = sum(region.nbytes for region in plan.regions if region.name == f"{transfer.unit}.grad_shard")
        return (read + written) / _known(self.rates, "memory_nbytes")

    def update(self) -> float:
        """Seconds of AdamW over this rank's shards, and of what comes from and goes to the host meanwhile."""
        plan = self.forecast.plan
        main, compute = plan.nbytes_of("main_shard") + plan.nbytes_of("remainder"), plan.nbytes_of("compute_shard")
        grads = plan.nbytes_of("grad_shard")
        moments = max(phase.nbytes.get("optimizer states", 0) for phase in self.forecast.phases)
        is_split = 0 < main <= compute
        moved = (2 if self.kind.clips else 1) * grads + 2 * (main + moments) + (2 if is_split else 1) * compute
        rate = _known(self.rates, "memory_nbytes")
        on_device = moved / rate * (NARROW_OVER_COPY if 0 < moments < 1.5 * grads else UPDATE_OVER_COPY)
        copies = [t for t in self.forecast.transfers if t.phase == "update"]
        ways = [sum((self._of(t).host for t in copies if t.operation.endswith(way)), 0.0) for way in (" in", " out")]
        return max(on_device, *ways, min(ways) and max(ways) / BOTH_WAYS)


def seconds_of(cost: ModuleCost, rates: MachineRates) -> float:
    """Return the device's seconds for one kind of operations: of computing, or of their bytes where that is longer."""
    kernels = cost.num_kernels * _known(rates, "kernel_s")
    moving = (cost.read_nbytes + cost.written_nbytes) / _known(rates, "memory_nbytes") + kernels
    if cost.kind == "matrix products":
        return max(moving, rates.product_seconds(cost.flops, cost.num_kernels) or 0.0)
    if cost.kind == "attention":
        return cost.flops / _known(rates, "attention_flops") + kernels
    return moving


def _known(rates: MachineRates, name: str) -> float:
    """Return a rate; ``ValueError`` for one that is not known."""
    value: float | None = getattr(rates, name)
    if not value:
        raise ValueError(f"the step time of this plan depends on {name}, which is not known of {rates.device}")
    return value


def step_time(forecast: TrainingForecast, rates: MachineRates, kind: StepKind = StepKind()) -> StepTime:
    """Predict the time of a step, from its second on; see [Note: what a step is made of].

    Raises ``ValueError`` for a forecast without operations, and where ``rates`` has no figure that the forecast needs:
    ``machine_rates`` completes measurements by published ones.
    """
    if not forecast.costs:
        raise ValueError("this forecast counts no operations, so there is nothing to time")
    times = _Times(forecast, rates, kind)
    update = times.update()
    start = _start(times, update)
    of_root = times.traffic("backward", True, True)
    end, early = of_root.times(forecast.root_tail), of_root.times(1 - forecast.root_tail)
    computes: list[float] = []
    ends: list[float] = []
    bounds: list[str] = []
    for phase in ("forward", "backward"):
        head = times.compute(phase, of_root=True)
        compute = times.compute(phase, of_root=False)
        gathers = times.traffic(phase, False, False)
        reductions = times.traffic(phase, True, False) + (early if phase == "backward" else Traffic())
        taken = reductions.adding + (gathers + reductions).network * REDUCED_BESIDE
        copies = {"copies of activations": times.activations(phase)}
        lasts, bound = longest(beside(compute, gathers, reductions, taken) | copies)
        computes.append(compute + head)
        ends.append(lasts + head)
        bounds.append(bound)
    issued = [times.issued(phase) for phase in ("forward", "backward")]
    device = [start + ends[0], ends[1]]
    waits = [max(0.0, issued[0] - device[0])]
    waits.append(max(0.0, sum(issued) - (waits[0] + sum(device))))
    bounds = ["the CPU" if waiting else bound for waiting, bound in zip(waits, bounds, strict=True)]
    number, exposed = kind.num_accumulated, sum(device) + end.stream - sum(computes)
    parts = (number * computes[0], number * computes[1], number * exposed, number * sum(waits), update)
    return StepTime(*parts, bounds[0], bounds[1], rates.source)


def _start(times: _Times, update: float) -> float:
    """Return what the update does not hide of the gathers that forward begins with: the root's and one more unit's."""
    first = next((unit for unit in times.units if unit != times.root), None)
    early = times.traffic("forward", False, True).stream
    transfers: Iterable[Transfer] = times.forecast.transfers
    early += sum(
        times._of(t).stream
        for t in transfers
        if t.unit == first and t.phase == "forward" and t.operation == "all-gather"
    )
    return max(0.0, early - update)
