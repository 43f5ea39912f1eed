"""A paper estimate: one training step on more GPUs than were at hand, from what was measured on two.

Owns the assumptions, each with its value and source, and the arithmetic from them to times and bytes. Nothing here is
a measurement of the machine that it runs on, and no process is started: memory is the runtime's own plan, drawn for any
number of ranks on a model without memory.

[Note: what an estimate is made of]
The pieces are those of [Note: what a step is made of] in `shard/forecast/step_time.py`. Compute is the unsharded step,
a third of it forward, and what the runtime takes from it: while the kernel that adds peers' gradients runs, matrix
products stand still. Beside compute run the stream of gathers and that of reductions, which share this rank's ingress
of the link and of the network. Forward takes as long as the longest of these, backward too; then comes the embedding's
reduction, behind which nothing is left to hide it, and before forward what of the early gathers the update was too
short to hide. Two gather slots save two of a chain's gathers in forward, where the update has made them, and two in
backward, where forward has left them.

Two cases stand for what is not known. The easy one: copies take nothing from compute, and the gaps between them are
filled by the other stream's. The hard one: copies slow matrix products as they did beside twelve layers of them, the
two streams take turns, and collectives between hosts take from compute what they took on one host. Neither is a bound:
both leave out why a long step on two GPUs lasts 2 to 3 % longer than either says.
"""

from dataclasses import dataclass

import torch

from launch.metrics import GIB
from yafsdp_like import MixedPrecisionPolicy
from yafsdp_like.hardware import H200_RATES
from yafsdp_like.memory.plan import MemoryPlan
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.shard.forecast.step_time import Traffic, beside, longest
from yafsdp_like.shard.forecast.traced_units import Cluster, cut
from yafsdp_like.shard.spec.unit_spec import UnitPolicy

COMPUTE_NBYTES, GRAD_NBYTES, MOMENTS_NBYTES = 2, 4, 8  # of an element: bf16, reduced in fp32, AdamW's two in fp32
NUM_SLOTS = 2  # of a chain of blocks


@dataclass(frozen=True)
class Figure:
    """One number that the estimate rests on."""

    value: float
    unit: str
    source: str  # starts with "measured", "derived" or "assumed"


@dataclass(frozen=True)
class Assumptions:
    """All of them. Measured means 2 × H200 of one host (NVLink, 18 links), torch 2.11, Llama-3-8B shape, T tokens."""

    pull_rate: Figure = Figure(372e9, "byte/s", "measured: a copy of 256 MiB from another GPU by the copy engine")
    ingress: Figure = Figure(
        372e9, "byte/s", "assumed: any number of peers together send to a GPU what one was measured to send"
    )
    copy_gap: Figure = Figure(
        (0.770 - 0.715) / 16 * 1e-3, "s", "derived: a block gathered by 18 copies and by 2, 0.770 and 0.715 ms"
    )
    memory_rate: Figure = Figure(
        H200_RATES.memory_nbytes, "byte/s", "measured: a copy inside a GPU, bytes read and written"
    )
    barrier: Figure = Figure(
        24e-6, "s", "derived: half of what pulls and the adding kernel leave of a reduction of 0.87 ms (measured)"
    )
    slowed_by_gather_short: Figure = Figure(
        0.27e-3 / 3, "s", "derived: 0.27 ms a gather at T 1024 (measured), of it one third the pulls; the rest is gone"
    )
    slowed_by_gather_long: Figure = Figure(
        0.20e-3 / 3, "s", "derived: 0.20 ms a gather at T 4096 (measured), of it one third the pulls"
    )
    update: Figure = Figure(31.4e-3, "s", "measured: AdamW by unit on two ranks; bound by memory, so 1 / ranks of it")
    graph_saves_1024: Figure = Figure(1 - 0.938, "of eager", "measured: the unsharded step as one CUDA graph, T 1024")
    graph_saves_2048: Figure = Figure(1 - 0.960, "of eager", "measured: the same, T 2048")
    graph_saves_4096: Figure = Figure(1 - 0.981, "of eager", "measured: the same, T 4096")
    graph_saves_8192: Figure = Figure(0.019 / 2, "of eager", "assumed: as many ms as at T 4096")
    forward_share: Figure = Figure(1 / 3, "of compute", "assumed: backward has twice the operations of forward")
    ranks_per_host: Figure = Figure(8, "GPUs", "assumed")
    network_rate: Figure = Figure(
        40e9, "byte/s", "assumed, nothing was measured: a 400 Gb/s port for each GPU, at four fifths of its rate"
    )
    network_step: Figure = Figure(10e-6, "s", "assumed, nothing was measured: latency of one step of a ring")
    slowed_by_collective: Figure = Figure(
        0.29,
        "of its time",
        "derived: ours over NCCL took 43 ms longer than over peers at T 4096 (measured, one run), with 147 ms of "
        "collectives by their times alone (0.851 ms a block's gather, 2.44 ms its reduction in fp32)",
    )

    def graph_saves(self, seq_len: int) -> float:
        """The share of the eager unsharded step that its graph does without. Raises ValueError for other lengths."""
        figure = getattr(self, f"graph_saves_{seq_len}", None)
        if figure is None:
            raise ValueError(f"no graph of the unsharded step was measured at T {seq_len}, expected 1024 to 8192")
        return float(figure.value)

    def slowed_by_gather(self, seq_len: int) -> float:
        """Seconds that a gather's pulls over two ranks take from compute, linear in T between what was measured."""
        short, long = self.slowed_by_gather_short.value, self.slowed_by_gather_long.value
        return short + (long - short) * min(1.0, max(0.0, (seq_len - 1024) / (4096 - 1024)))


@dataclass(frozen=True)
class Topology:
    """Ranks, where they are, and how parameters are sharded over them."""

    name: str
    per_host: int  # ranks
    num_hosts: int = 1  # over which one replica is sharded
    num_replicas: int = 1
    strided_copies: bool = False  # a column's chunks as one copy; nothing in the runtime does that

    @property
    def num_shards(self) -> int:
        """Ranks over which one replica is sharded."""
        return self.per_host * self.num_hosts

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.num_shards * self.num_replicas


@dataclass(frozen=True)
class UnitShape:
    """What is gathered, or reduced, together."""

    numel: int
    num_params: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder as its blocks, and the unit that surrounds them."""

    num_blocks: int
    block: UnitShape
    root: UnitShape
    wide: UnitShape  # the embedding, or the head: each is reduced by itself
    head_share: float  # of the operations of a step

    @classmethod
    def of(cls, config: DecoderConfig, seq_len: int) -> "ModelShape":
        """Return the shape of a decoder, and its head's share of the operations at `seq_len` tokens."""
        wide = config.vocab_size * config.dim
        head_flops = 6 * wide * seq_len
        return cls(
            config.num_layers,
            UnitShape(config.block_num_params, 9),
            UnitShape(2 * wide + config.dim, 3),
            UnitShape(wide, 1),
            head_flops / config.train_flops(1, seq_len),
        )


def gather_of(unit: UnitShape, on: Topology, by: Assumptions) -> Traffic:
    """Peers' chunks; over hosts a column first, with a barrier before it and behind it."""
    network = ring(unit.numel * COMPUTE_NBYTES // on.per_host, on.num_hosts, by)
    barriers = 2 * by.barrier.value if on.num_hosts > 1 else 0.0
    pulls = pulls_of(unit, on, by)
    return Traffic(pulls.link, pulls.gaps + barriers, network)


def reduction_of(unit: UnitShape, on: Topology, by: Assumptions) -> Traffic:
    """Pulls between two barriers and one kernel, then sums across hosts, then their mean over replicas."""
    pulls = pulls_of(unit, on, by)
    sums_nbytes = unit.numel * GRAD_NBYTES // on.per_host
    network = ring(sums_nbytes, on.num_hosts, by) + 2 * ring(sums_nbytes // on.num_hosts, on.num_replicas, by)
    added_nbytes = unit.numel * (COMPUTE_NBYTES + GRAD_NBYTES / on.per_host)
    return Traffic(pulls.link, pulls.gaps + 2 * by.barrier.value, network, added_nbytes / by.memory_rate.value)


def pulls_of(unit: UnitShape, on: Topology, by: Assumptions) -> Traffic:
    """One copy per parameter, peer and host: a column's chunks are no neighbours in a slot."""
    peers = on.per_host - 1
    link_nbytes = unit.numel * COMPUTE_NBYTES * peers / on.per_host
    rate = min(by.pull_rate.value, by.ingress.value)
    return Traffic(link_nbytes / rate, num_copies(unit, on) * by.copy_gap.value)


def num_copies(unit: UnitShape, on: Topology) -> int:
    """Return the copies of one all-gather: one per parameter, peer and, unless they are strided, host."""
    return unit.num_params * (on.per_host - 1) * (1 if on.strided_copies else on.num_hosts)


def ring(nbytes: int, width: int, by: Assumptions) -> float:
    """Seconds of an all-gather to, or a reduce-scatter of, ``nbytes`` on every rank."""
    return (width - 1) * (nbytes / width / by.network_rate.value + by.network_step.value)


@dataclass(frozen=True)
class Case:
    """What is taken of things that were not measured; see [Note: what an estimate is made of]."""

    name: str
    copies_slow_compute: bool
    streams_take_turns: bool


EASY, HARD = Case("easy", False, False), Case("hard", True, True)


@dataclass(frozen=True)
class StepEstimate:
    """Forward and backward of one step, in seconds, and what forward and backward last as long as."""

    forward: float
    backward: float
    start: float  # early gathers that the update did not hide
    end: float  # the embedding's reduction
    forward_bound: str
    backward_bound: str

    @property
    def seconds(self) -> float:
        """Forward and backward, and what is not hidden before and behind them."""
        return self.start + self.forward + self.backward + self.end


@dataclass(frozen=True)
class Estimator:
    """Of one model, length and case, on any topology; ``floor`` is the eager unsharded step, in seconds."""

    config: DecoderConfig
    seq_len: int
    floor: float
    case: Case
    by: Assumptions

    def step(self, on: Topology) -> StepEstimate:
        """Estimate one step on a topology."""
        model = ModelShape.of(self.config, self.seq_len)
        gather, reduction = gather_of(model.block, on, self.by), reduction_of(model.block, on, self.by)
        wide = reduction_of(model.wide, on, self.by)
        gathers = gather.times(max(0, model.num_blocks - NUM_SLOTS))
        reductions = reduction.times(model.num_blocks) + wide  # the head's goes behind the blocks' backward
        busy = self.floor * (1 - self.by.graph_saves(self.seq_len))
        share = self.by.forward_share.value
        forward, forward_bound = self._longest(busy * share, model.head_share, gathers, Traffic())
        backward, backward_bound = self._longest(busy * (1 - share), model.head_share, gathers, reductions)
        return StepEstimate(forward, backward, self._start(model, on), wide.stream, forward_bound, backward_bound)

    def ratio(self, on: Topology) -> float:
        """Return the estimate over the eager unsharded step."""
        return self.step(on).seconds / self.floor

    def _longest(self, compute: float, head_share: float, gathers: Traffic, reductions: Traffic) -> tuple[float, str]:
        """Blocks hide traffic behind their compute, and the head's compute is beside none."""
        both = gathers + reductions
        head = compute * head_share
        taken = both.adding + (self._slowed(both) if self.case.copies_slow_compute else 0.0)
        lasts, bound = longest(beside(compute - head, gathers, reductions, taken, self.case.streams_take_turns))
        return lasts + head, bound

    def _slowed(self, traffic: Traffic) -> float:
        """By pulls in proportion to their bytes, by collectives in proportion to their time."""
        block = ModelShape.of(self.config, self.seq_len).block
        one = pulls_of(block, Topology("two ranks", 2), self.by).link
        by_pulls = traffic.link / one * self.by.slowed_by_gather(self.seq_len)
        return by_pulls + traffic.network * self.by.slowed_by_collective.value

    def _start(self, model: ModelShape, on: Topology) -> float:
        """The root and the first block are gathered while units after the root are updated."""
        early = gather_of(model.root, on, self.by).stream + gather_of(model.block, on, self.by).stream
        update = self.by.update.value * 2 / on.num_shards
        return max(0.0, early - update * (1 - model.root.numel / self.config.num_params))


# --- memory ---


def plan_for(config: DecoderConfig, on: Topology, policy: MixedPrecisionPolicy | None = None) -> MemoryPlan:
    """The plan of one rank; replicas hold what one of them alone would. ``policy``: bf16, reduced in fp32."""
    policy = policy or MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    with torch.device("meta"):
        model = Decoder(config)
    cluster = Cluster(on.num_shards, on.per_host, transport="hierarchical" if on.num_hosts > 1 else "peer")
    return cut(model, list(model.layers), UnitPolicy(policy, None), cluster).layout.plan


@dataclass(frozen=True)
class Memory:
    """Of one rank at one length, in bytes."""

    plan: int
    moments: int
    rest: int  # activations, the allocator's slack, the driver's own: what the unsharded step takes beside weights

    @property
    def device(self) -> int:
        """Bytes in all."""
        return self.plan + self.moments + self.rest


def memory_of(config: DecoderConfig, plan: MemoryPlan, unsharded_device_gib: float) -> Memory:
    """The unsharded model holds bf16 weights and gradients; all else of it, a sharded one has too."""
    rest = int(unsharded_device_gib * GIB) - 2 * COMPUTE_NBYTES * config.num_params
    return Memory(plan.nbytes + plan.transient_nbytes, MOMENTS_NBYTES * -(-config.num_params // plan.world_size), rest)


def topologies(by: Assumptions) -> list[Topology]:
    """List the topologies: 2, 4 and 8 GPUs of one host, then many hosts.

    Many hosts: sharded over all of them, the same with strided copies (not in the runtime yet), and a replica each.
    """
    per_host = int(by.ranks_per_host.value)
    found = [Topology(f"{n} GPUs", n) for n in (2, 4, 8)]
    for n in (8, 32, 128):
        name = f"{n * per_host} GPUs, {n} hosts"
        found += [
            Topology(f"{name}, sharded over all", per_host, n),
            Topology(f"{name}, sharded over all, strided copies", per_host, n, strided_copies=True),
            Topology(f"{name}, a replica each", per_host, 1, n),
        ]
    return found
