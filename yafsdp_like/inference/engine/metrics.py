"""What an engine says of itself: how things stand, and what was done since the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yafsdp_like.inference.engine.step_log import StepFigures
from yafsdp_like.inference.kv.kv_cache import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping

    from yafsdp_like.inference.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Metrics(StepFigures):
    """How things stand, and what was done since the start."""

    num_running: int
    num_waiting: int  # swapped ones included
    num_swapped: int  # whose pages are on the host
    num_steps: int
    num_swapped_out: int  # preemptions by swapping
    num_recomputed: int  # preemptions by dropping pages
    num_tokens_computed: int
    num_tokens_cached: int  # of prompts, that were not computed
    num_tokens_drawn: int
    num_tokens_dropped: int  # drawn past an end
    num_tokens_drafted: int  # and verified
    num_tokens_accepted: int  # of those
    num_draws_late: int  # put off by a step, since what a grammar allows was not known yet
    num_chunks: int  # parts of prompts, less the last ones
    num_pages_evicted: int
    num_images_encoded: int
    num_images_found: int  # in pages, where they were encoded before, for this model or another
    kv_nbytes_used: int  # of pages that sequences hold, on the device
    kv_nbytes_cached: int  # of pages that nobody holds, and that are found by their content
    kv_nbytes: int
    host_kv_nbytes_used: int
    host_kv_nbytes_cached: int
    host_kv_nbytes: int
    num_adapters_woken: int  # copies of LoRA adapters into slots
    recordings_nbytes: int  # of device memory, that CUDA graphs took beside the arena, within what was planned

    @property
    def num_preempted(self) -> int:
        """Preemptions of both kinds."""
        return self.num_swapped_out + self.num_recomputed


def metrics_of(scheduler: Scheduler, others: Mapping[str, Any]) -> Metrics:
    """Return the metrics of an engine: its scheduler's, and ``others`` by their names."""
    pools = scheduler.cache.pools
    device, host = pools[Tier.DEVICE], pools.get(Tier.HOST)
    used, cached = device.used_and_cached_nbytes
    host_used, host_cached = (0, 0) if host is None else host.used_and_cached_nbytes
    return Metrics(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_swapped=sum(sequence.is_swapped for sequence in scheduler.waiting),
        **vars(scheduler.counts),
        num_pages_evicted=device.num_evicted,
        kv_nbytes_used=used,
        kv_nbytes_cached=cached,
        kv_nbytes=device.grid.num_slabs * device.grid.slab_nbytes,
        host_kv_nbytes_used=host_used,
        host_kv_nbytes_cached=host_cached,
        host_kv_nbytes=0 if host is None else host.grid.num_slabs * host.grid.slab_nbytes,
        **others,
    )
