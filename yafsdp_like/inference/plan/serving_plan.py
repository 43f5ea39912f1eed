"""What a served model takes, in bytes, before anything is allocated: which mode, what fits, and why. No GPU is needed.

Owns the choice of where weights lie, and the plan of all memory of an engine. It knows sizes and rates; how
bytes are moved is `weights.py`'s.

[Note: what is kept]
All weights stay on the device where one context of ``max_seq_len`` tokens fits beside them. Elsewhere units are moved:
gathered from the ranks that hold a part each, or streamed from the host. A plan then leaves room for such a context of
each of ``max_batch_size`` sequences, if it can, and moves as few units as will do, evenly spread, so that each has the
time of the resident ones before it to arrive in: layers first, then the head, and the embedding last, since it is moved
whole and a step reads a few rows of it. Where ``max_seq_len`` is not said, the tokens of one step stand for it.
Tensor parallel ranks keep their parts of all layers, and all pages of their heads: the mode is for latency, since all
ranks then serve the same requests, and is taken only when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, get_args

import torch

from yafsdp_like.inference.kv.image_pages import image_shapes
from yafsdp_like.inference.kv.layer_groups import LayerGroup
from yafsdp_like.inference.options import AnyMode, EngineOptions
from yafsdp_like.inference.plan.adapter_layout import AdapterLayout
from yafsdp_like.inference.plan.buffers import PlacedBuffers, StepShape, plan_buffers
from yafsdp_like.inference.plan.capacity import Capacity, last_that_holds
from yafsdp_like.inference.plan.guards import guarded, most_guards_nbytes
from yafsdp_like.inference.plan.packed_weights import pack_units
from yafsdp_like.inference.plan.placement import Mode, Placement, placements
from yafsdp_like.inference.plan.quantized_fields import stored_units
from yafsdp_like.inference.plan.recordings import recordings_nbytes
from yafsdp_like.inference.plan.step_floors import decode_seconds, moving_seconds, read_nbytes, read_numel
from yafsdp_like.memory.plan import MemoryPlan, Region, readable
from yafsdp_like.models.tensor_parallel import cuts_of, share_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from yafsdp_like.hardware import Hardware, Rates
    from yafsdp_like.inference.kv.slabs import SlabGrid
    from yafsdp_like.models.decoder import DecoderConfig

SUMS = "process group: sums"  # what moves bytes between ranks that compute together

KV_SLABS, HOST_KV_SLABS = "kv slabs", "host kv slabs"  # kinds, and their regions' names
DRAFT = "draft: "  # of names of regions of the model that drafts


@dataclass(frozen=True)
class Site:
    """Where the model is to run."""

    dtype: torch.dtype = torch.bfloat16  # of weights
    num_ranks: int = 1  # that may share weights; each serves its own requests, unless they are tensor parallel
    maps_memory: bool = False  # whether they read each other's memory, rather than call collectives
    transport: str = "process group"  # what moves bytes between them, in words
    hardware: Hardware | None = None  # None: a CPU, or nothing known

    @property
    def dtype_name(self) -> str:
        """As torch names it, without the module."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ServingPlan:
    """Every place of an engine, on the device and in host memory, and why weights lie where they do."""

    config: DecoderConfig
    options: EngineOptions
    site: Site
    placement: Placement
    capacity: Capacity
    buffers: PlacedBuffers
    grid: SlabGrid  # of pages on the device
    host_grid: SlabGrid | None  # of pages that are swapped out
    max_seq_len: int
    reasons: tuple[str, ...] = ()
    draft: ServingPlan | None = None  # of the model that drafts tokens, see ``draft_plan.py``

    @property
    def mode(self) -> Mode:
        """Where weights lie."""
        return self.placement.mode

    @cached_property
    def rank_config(self) -> DecoderConfig:
        """What one rank computes of the decoder's layers: all heads and the whole feed-forward, or its part of them."""
        return _rank_config(self.config, self.site, self.mode)

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Groups of layers that share page tables."""
        return self.capacity.groups

    @property
    def num_context_tokens(self) -> int:
        """Tokens of context that fit at once, in sequences of ``max_seq_len``."""
        return self.capacity.num_tokens(self.grid, self.max_seq_len)

    def decode_seconds(self, rates: Rates, num_sequences: int = 0) -> float:
        """Return the seconds that decoding a token of so many sequences of ``max_seq_len`` tokens takes at least."""
        pages_nbytes = num_sequences * self.capacity.nbytes_of(self.max_seq_len)
        experts = self.config.experts
        visited = 1.0 if experts is None else experts.experts_per_token / experts.num_experts
        return decode_seconds(self.placement, rates, num_sequences, pages_nbytes, visited)

    @cached_property
    def recordings_nbytes(self) -> int:
        """The bytes that CUDA graphs take beside the arena; 0 on a CPU, or a device that is not known."""
        return _recordings_nbytes(self.rank_config, self.options, self.site, self.mode)

    @cached_property
    def adapters(self) -> AdapterLayout | None:
        """Where LoRA adapters lie; None where none is served."""
        return _adapters(self.config, self.options, self.site, self.mode)

    @cached_property
    def memory(self) -> MemoryPlan:
        """Of the arena. Not in it: ``recordings_nbytes``, CUDA's context, and what kernels are compiled to."""
        regions = (
            *self.placement.regions(),
            Region(KV_SLABS, KV_SLABS, self.grid.region_nbytes),
            *self.buffers.regions,
            *(() if self.adapters is None else (self.adapters.region(),)),
        )
        slots = (*self.placement.slot_places(), *self.buffers.slots())
        transports = {"gathered": (self.site.transport,), "tensor_parallel": (SUMS,)}.get(self.mode, ())
        clocks = (self.placement.clock, self.buffers.clock)
        plan = MemoryPlan(self.site.num_ranks, regions, slots, transports, clocks=clocks)
        plan = guarded(plan, most_guards_nbytes(self.config)) if self.options.is_debugged else plan
        if self.draft is None:
            return plan
        drafts = (replace(region, name=DRAFT + region.name) for region in self.draft.memory.regions)
        return replace(plan, regions=(*plan.regions, *drafts))

    @cached_property
    def host(self) -> MemoryPlan:
        """Of host memory, pinned where the device is a GPU."""
        regions = tuple(self.placement.host_regions())
        if self.host_grid is not None:
            regions = (*regions, Region(HOST_KV_SLABS, HOST_KV_SLABS, self.host_grid.region_nbytes))
        if self.adapters is not None:
            regions = (*regions, self.adapters.host_region())
        return MemoryPlan(self.site.num_ranks, regions)

    def __str__(self) -> str:
        lines = [*self.reasons, str(self.memory)]
        if self.recordings_nbytes:
            lines.append(f"  beside the arena: {readable(self.recordings_nbytes)} for CUDA graphs of steps")
        if self.buffers.image_nbytes:
            lines.append(f"  beside the arena: {readable(self.buffers.image_nbytes)} to encode an image")
        return "\n".join([*lines, f"in host memory: {self.host}"] if self.host.regions else lines)


def plan_serving(
    config: DecoderConfig, options: EngineOptions, site: Site | None = None, mode: AnyMode = "auto"
) -> ServingPlan:
    """Plan to serve ``config`` within ``options``; ``site`` is a CPU, or an unknown GPU, in bf16 by default.

    "auto" takes the first that fits of resident, gathered (where there are several ranks) and streamed. Without
    ``memory_limit_nbytes`` that is resident; gathered or streamed, when asked for, then move all layers.

    Raises ValueError for what cannot be, and where it does not fit: how many bytes are missing, and what would fit.
    """
    if mode not in get_args(AnyMode):
        raise ValueError(f"mode must be one of {list(get_args(AnyMode))}, found {mode!r}")
    if options.memory_limit_nbytes is None and options.kv_nbytes is None:
        raise ValueError("expected memory_limit_nbytes or kv_nbytes, in bytes, found neither")
    site = site or Site()
    frame, tried = _framed(config, options, site, mode)
    for candidate in tried:
        placement = frame.choose(candidate)
        if placement is not None:
            return frame.plan(placement, asked=mode != "auto")
    raise ValueError(frame.refusal(tried))


def least_nbytes(config: DecoderConfig, options: EngineOptions, site: Site, mode: AnyMode = "auto") -> int:
    """Return the smallest ``memory_limit_nbytes`` with which ``plan_serving`` finds a place for all else that is asked.

    Raises ValueError for what cannot be.
    """
    unlimited = replace(options, memory_limit_nbytes=1 << 60)
    frame, tried = _framed(config, unlimited, site, mode)
    return frame.needed_nbytes(tried)[0]


def _framed(config: DecoderConfig, options: EngineOptions, site: Site, mode: AnyMode) -> tuple[_Frame, Sequence[Mode]]:
    """Return what is common to the modes that are tried, and these."""
    adapters = _adapters(config, options, site, mode)
    frame = _Frame.of(config, options, site, _rank_config(config, site, mode), adapters)
    every: Sequence[Mode] = ("resident", "gathered", "streamed") if site.num_ranks > 1 else ("resident", "streamed")
    return frame, every if mode == "auto" else [mode]


def _adapters(config: DecoderConfig, options: EngineOptions, site: Site, mode: AnyMode) -> AdapterLayout | None:
    cuts = cuts_of(config, site.num_ranks) if mode == "tensor_parallel" else None
    return AdapterLayout.of(pack_units(config, site.dtype, cuts), options)


@lru_cache(maxsize=16)  # whoever looks for what fits asks for the same ones again and again, and their slots are placed
def _all_placements(*asked: Any) -> tuple[Placement, ...]:
    return tuple(placements(*asked))


def _rank_config(config: DecoderConfig, site: Site, mode: AnyMode) -> DecoderConfig:
    return share_of(config, site.num_ranks) if mode == "tensor_parallel" else config


def _recordings_nbytes(share: DecoderConfig, options: EngineOptions, site: Site, mode: Mode) -> int:
    return recordings_nbytes(share, options, mode) if site.hardware else 0


# --- what fits ---


@dataclass(frozen=True)
class _Frame:
    """What all modes that are tried have in common."""

    config: DecoderConfig
    options: EngineOptions
    site: Site
    capacity: Capacity
    step: StepShape  # of sequences of ``least`` tokens, until the plan is made
    share: DecoderConfig  # what one rank computes
    max_seq_len: int  # at most
    least: int  # tokens of context that must fit
    adapters_nbytes: int  # of their slots

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        options: EngineOptions,
        site: Site,
        share: DecoderConfig,
        adapters: AdapterLayout | None,
    ) -> _Frame:
        """Make what all modes have in common; ``share`` is what one rank computes of ``config``."""
        windows = [config.window_of(layer) for layer in range(config.num_layers)]
        dtype = options.kv_dtype or site.dtype_name
        if dtype.startswith("float8") and config.kv_scales_problem:
            raise ValueError(
                f"keys and values cannot be kept as kv_dtype {dtype}: {config.kv_scales_problem}; leave kv_dtype out "
                "to keep them in the weights' dtype, which needs no scales"
            )
        groups = LayerGroup.of_windows(windows, share.num_kv_heads, share.head_dim, options.page_size, dtype)
        capacity = Capacity(groups, options.max_batch_tokens, image_shapes(config.vision, site.dtype_name))
        longest = capacity.longest_asked(options, config.max_seq_len)
        least = options.max_seq_len or min(longest, options.max_batch_tokens)
        step = StepShape(
            options.max_batch_size,
            options.max_batch_tokens,
            least,
            options.page_size,
            len(groups),
            site.hardware.num_multiprocessors if site.hardware else 1,
            adapters.rank if adapters else 0,
            adapters.num_slots if adapters else 0,
            options.max_decode_rows,
        )
        adapters_nbytes = adapters.region().nbytes if adapters else 0
        return cls(config, options, site, capacity, step, share, longest, least, adapters_nbytes)

    @cached_property
    def buffers(self) -> PlacedBuffers:
        """What a step needs beside weights and pages."""
        return plan_buffers(self.share, self.step, self.site.dtype)

    def choose(self, mode: Mode) -> Placement | None:
        """See [Note: what is kept]; None where not even one context fits beside the weights."""
        candidates = self._placements(mode)
        if mode in ("gathered", "streamed"):
            if self.options.memory_limit_nbytes is None:
                return candidates[self.config.num_layers - 1]
            wanted = self.least * self.options.max_batch_size
            for placement in candidates:
                if all(self._fits(nbytes, wanted, mode) for nbytes in (placement.nbytes_at_least, placement.nbytes)):
                    return placement
        smallest = _smallest(candidates)
        return smallest if self._fits(smallest.nbytes, self.least, mode) else None

    def _placements(self, mode: Mode) -> Sequence[Placement]:
        return _all_placements(self.config, self.site.dtype, mode, self.site.num_ranks, self.site.maps_memory)

    def recordings_nbytes(self, mode: Mode) -> int:
        """Return the bytes that CUDA graphs take in a mode."""
        return _recordings_nbytes(self.share, self.options, self.site, mode)

    def room(self, weights_nbytes: int, mode: Mode) -> int | None:
        """Return the bytes that are left for keys and values; None: any number."""
        limit = self.options.memory_limit_nbytes
        beside = self.buffers.nbytes + self.adapters_nbytes + self.recordings_nbytes(mode) + self.guards_nbytes
        return None if limit is None else limit - weights_nbytes - beside

    @property
    def guards_nbytes(self) -> int:
        """What guards take in debug mode, at most."""
        return most_guards_nbytes(self.config) if self.options.is_debugged else 0

    def _fits(self, weights_nbytes: int, num_tokens: int, mode: Mode) -> bool:
        room = self.room(weights_nbytes, mode)
        if self.options.kv_nbytes is not None:
            return room is None or self.options.kv_nbytes <= room
        assert room is not None, "options say one or the other"
        return room > 0 and self.capacity.holds(room, num_tokens, self.max_seq_len)

    def _beside(self, placement: Placement, num_tokens: int) -> tuple[_Frame, SlabGrid | None]:
        """Return this with tables of so many positions, and the pages beside them, if a sequence as long fits these.

        Pages take all that is left of the limit, unless they have a number of bytes of their own.
        """
        frame = replace(self, step=replace(self.step, max_seq_len=num_tokens))
        room, asked = frame.room(placement.nbytes, placement.mode), self.options.kv_nbytes
        grid = self.capacity.grid(asked or room or 0) if room is None or room >= (asked or 1) else None
        return frame, grid if grid is not None and self.capacity.fits(grid, num_tokens) else None

    def plan(self, placement: Placement, asked: bool) -> ServingPlan:
        """Make the plan, for sequences as long as fits with tables of their positions."""
        least, most = self.least, self.max_seq_len
        longest = least + last_that_holds(lambda n: self._beside(placement, least + n)[1] is not None, most - least)
        frame, grid = self._beside(placement, longest)
        assert grid is not None, "least tokens of context fit"
        host_grid = self._host_grid(grid)
        plan = ServingPlan(
            self.config, self.options, self.site, placement, self.capacity, frame.buffers, grid, host_grid, longest
        )
        return replace(plan, reasons=tuple(_reasons(plan, frame, asked)))

    def _host_grid(self, grid: SlabGrid) -> SlabGrid | None:
        if not self.options.host_kv_nbytes:
            return None
        found = self.capacity.grid(self.options.host_kv_nbytes)
        if found is None:
            least = max(shape.nbytes for shape in self.capacity.shapes)
            raise ValueError(f"host_kv_nbytes {self.options.host_kv_nbytes} hold no pages; of these one has {least}")
        return found

    # --- what does not fit ---

    def needed_nbytes(self, tried: Sequence[Mode]) -> tuple[int, Placement, int]:
        """Return the smallest limit, the weights' places under it, and the bytes of keys and values among it."""
        smallest = min((_smallest(self._placements(mode)) for mode in tried), key=lambda p: p.nbytes)
        context = self.options.kv_nbytes or self.capacity.nbytes_for(self.least, self.max_seq_len)
        graphs = self.recordings_nbytes(smallest.mode)
        beside = self.buffers.nbytes + self.adapters_nbytes + graphs + self.guards_nbytes
        return smallest.nbytes + beside + context, smallest, context

    def refusal(self, tried: Sequence[Mode]) -> str:
        """Say how many bytes are missing, and what would fit."""
        limit = self.options.memory_limit_nbytes
        assert limit is not None, "anything fits without a limit"
        needed, smallest, context = self.needed_nbytes(tried)
        graphs = self.recordings_nbytes(smallest.mode)
        what = "kv_nbytes" if self.options.kv_nbytes else f"keys and values of {self.least:,} tokens"
        remedies = [f"memory_limit_nbytes={needed}", *self._smaller_contexts(smallest)]
        if 0 < needed - limit <= graphs:
            remedies.append(f"graphs=False, since CUDA graphs take {graphs:,}")
        adapters = f", {self.adapters_nbytes:,} for slots of adapters" if self.adapters_nbytes else ""
        return (
            f"the model does not fit memory_limit_nbytes={limit}: {needed - limit:,} bytes are missing. {needed:,} are "
            f"needed, at least: {smallest.nbytes:,} for weights ({smallest.mode}), {self.buffers.nbytes:,} for the "
            f"buffers of a step{adapters} and {context:,} for {what}. It fits with {', or with '.join(remedies)}"
        )

    def _smaller_contexts(self, placement: Placement) -> Iterator[str]:
        room = self.room(placement.nbytes, placement.mode) or 0
        longest = self.capacity.longest(self.capacity.grid(room), self.max_seq_len) if room > 0 else 0
        if self.options.kv_nbytes and longest:
            yield f"kv_nbytes={room}"
        elif longest:
            yield f"max_seq_len={longest}"


def _smallest(candidates: Sequence[Placement]) -> Placement:
    """Return the smallest of those that move all layers, if any do.

    Which of embedding and head are then best moved depends on the slots.
    """
    return min(candidates[-3:], key=lambda placement: placement.nbytes)


# --- in words ---


def _reasons(plan: ServingPlan, frame: _Frame, asked: bool) -> Iterator[str]:
    yield _why(plan, frame, asked)
    yield _context(plan)
    if plan.site.hardware and plan.site.hardware.rates:
        yield from _floors(plan, plan.site.hardware.rates)
    if plan.mode == "gathered" and not plan.site.maps_memory:
        yield "  forwards call collectives, so that all ranks must make the same number of forwards"
    if plan.mode == "tensor_parallel":
        yield "  all ranks serve the same requests in the same steps; what goes by the clock, the first one decides"


def _why(plan: ServingPlan, frame: _Frame, asked: bool) -> str:
    placement = plan.placement
    total = sum(packed.nbytes for packed in placement.packed_units)
    if plan.mode == "resident":
        return f"resident: all {total:,} bytes of weights stay on the device"
    if plan.mode == "tensor_parallel":
        return _why_tensor_parallel(plan, total)
    moved, all_units = len(placement.non_resident), len(placement.packed_units)
    source = f"the shards of {plan.site.num_ranks} ranks" if plan.mode == "gathered" else "host memory"
    room = frame.room(total, "resident")
    because = "as asked for"
    if not asked:
        assert room is not None
        because = f"since all {total:,} bytes of weights would leave {max(room, 0):,} for keys and values"
        because += ", fewer than kv_nbytes" if plan.options.kv_nbytes else f", too few for {frame.least:,} tokens"
    return f"{plan.mode}: {moved} of {all_units} units come out of {source} in every forward, {because}"


def _why_tensor_parallel(plan: ServingPlan, kept_nbytes: int) -> str:
    config, share = plan.config, plan.rank_config
    whole_nbytes = sum(packed.nbytes for packed in stored_units(config, plan.site.dtype))
    return (
        f"tensor_parallel: {plan.site.num_ranks} ranks compute every step together, as asked for: each has "
        f"{share.num_heads} of {config.num_heads} heads, {share.num_kv_heads} of {config.num_kv_heads} of keys and "
        f"values, {share.ffn_dim:,} of {config.ffn_dim:,} of the feed-forward, and {kept_nbytes:,} of "
        f"{whole_nbytes:,} bytes of weights"
    )


def _context(plan: ServingPlan) -> str:
    tokens, longest = plan.num_context_tokens, plan.max_seq_len
    return f"  {tokens:,} tokens of context fit, in sequences of at most {longest:,}"


def _floors(plan: ServingPlan, rates: Rates) -> Iterator[str]:
    """Say how long steps take at least. A unit that is moved hides behind the arithmetic of enough tokens."""
    floor, (seconds, per_byte) = plan.decode_seconds(rates), moving_seconds(plan.placement, rates)
    yield f"  a step that decodes takes {1e3 * floor:.1f} ms at least: {1 / floor:,.0f} tokens/s for each sequence"
    if seconds:
        nbytes_each = read_nbytes(plan.placement) / read_numel(plan.placement)
        tokens = rates.flops * nbytes_each / 2 * per_byte
        yield f"  moving takes {1e3 * seconds:.1f} ms a forward, and a layer's hides in steps of {tokens:,.0f} tokens"
