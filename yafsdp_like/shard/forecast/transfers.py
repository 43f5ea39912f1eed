"""Bytes that one rank receives over each link in a step, by unit and operation, as the plan has them move.

Owns the counting: which all-gathers a step repeats, and what crosses which link. See ``Transfer`` for the names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.shard.forecast.quantities import Transfer
from yafsdp_like.shard.spec.memory_layout import GATHER_SLOTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yafsdp_like.shard.forecast.quantities import Link, Phase
    from yafsdp_like.shard.forecast.traced_units import Cluster, PlannedModel, TracedUnit


def gathered_again(planned: PlannedModel) -> set[str]:
    """Return the names of units that are all-gathered for backward: others' values are still in their slots.

    A slot is stale after forward, and its bytes are taken by the first unit that shares some and is gathered before the
    unit's own backward.
    """
    slots = [slot for slot in planned.layout.plan.slots if slot.kind == GATHER_SLOTS]
    again = set()
    for slot in slots:
        if len(slot.live.intervals) < 2:
            continue
        (_, released), (_, end) = slot.live.intervals
        begin = slot.live.intervals[1][0]
        if any(
            other is not slot
            and other.segment.overlaps(slot.segment)
            and any(released < first < end and first <= begin for first, _ in other.live.intervals)
            for other in slots
        ):
            again.add(slot.name)
    return again


def transfers_of(planned: PlannedModel) -> Iterator[Transfer]:
    """Yield what each unit moves in one step with one backward."""
    again, cluster = gathered_again(planned), planned.cluster
    for unit in planned.units:
        for phase in ("forward", "backward"):
            if phase == "forward" or unit.name in again:
                full = sum(p.full_nbytes for p in unit.params)
                yield from _crossing(unit, phase, "all-gather", full, cluster)
                if unit.is_on_host:
                    rows = sum(p.shards.chunk_numel * p.main_dtype.itemsize for p in unit.params)
                    yield Transfer(unit.name, phase, "parameters in", "host", rows)
        trained = [p for p in unit.params if p.has_gradient]
        full = sum(p.shards.padded_numel * p.gradient_dtype.itemsize for p in trained)
        yield from _crossing(unit, "backward", "reduce-scatter", full, cluster)
        sums = sum(p.shards.chunk_numel * p.reduce_dtype.itemsize for p in trained)
        if cluster.num_replicas > 1 and sums:
            averaged = 2 * sums * (cluster.num_replicas - 1) // cluster.num_replicas
            link: Link = "network" if cluster.num_ranks > cluster.ranks_per_host else "peers"
            yield Transfer(unit.name, "backward", "average over replicas", link, averaged)
        if unit.is_on_host and trained:
            kept = sum(p.shards.chunk_numel * p.grad_dtype.itemsize for p in trained)
            yield Transfer(unit.name, "backward", "gradients out", "host", kept)


def _crossing(unit: TracedUnit, phase: Phase, operation: str, nbytes: int, cluster: Cluster) -> Iterator[Transfer]:
    """Yield what a rank receives of ``nbytes`` that all ranks share: the rest of its own part.

    Over several hosts everything that a host does not have comes to it once, over the links of all its ranks.
    """
    received = nbytes * (cluster.num_shards - 1) // cluster.num_shards
    num_hosts = cluster.num_hosts
    crossing = nbytes * (num_hosts - 1) // num_hosts // min(cluster.ranks_per_host, cluster.num_shards)
    shares: tuple[tuple[Link, int], ...] = (("network", crossing), ("peers", received - crossing))
    for link, share in shares:
        if share > 0:
            yield Transfer(unit.name, phase, operation, link, share)
