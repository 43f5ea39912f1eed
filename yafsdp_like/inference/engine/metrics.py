"""What an engine says of itself: how things stand, and what was done since the start."""

from __future__ import annotations

from dataclasses import dataclass

from yafsdp_like.inference.engine.step_log import StepFigures


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
