"""What a pool of models takes, in bytes, before anything is allocated: homes of weights, slabs, buffers. Integers only.

[Note: homes]
Weights and pages lie in one region of slabs. Each model has a home, the slabs that its weights fill when it is awake:
always the same, so that what is recorded with these addresses stays true. While it sleeps, pages or other models may
have them. Models whose homes do not meet are awake together. Homes are given out by size, the largest first, each where
it meets the fewest others; those that cannot be apart lie on each other, which leaves room for the rest. Some slabs are
nobody's home, so that there are pages whoever is awake; more are had by letting idle models sleep.

[Note: whole on all ranks]
Ranks that compute together have parts of layers' matrices, but all of the embedding and the head. Where they map each
other's memory, the host of each has 1/N of such a unit, as many bytes as any other's; a rank copies these to their
place in its home, and pulls the rest out of the others' homes. So the link to the host carries each byte of a model
once, whichever rank's link it is.

A step's workspace and logits have the size of the largest model's, and are any model's in turn, since all steps follow
each other on one stream; tables are each model's own, for they keep what a model's last step has left.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from yafsdp_like.inference.kv.slabs import SlabGrid, ceil_div
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.adapter_layout import ADAPTER_IMAGES
from yafsdp_like.inference.plan.buffers import ALWAYS, LOGITS, TABLES, WORKSPACE
from yafsdp_like.inference.plan.capacity import Capacity
from yafsdp_like.inference.plan.serving_plan import HOST_KV_SLABS, SUMS, ServingPlan, Site, plan_serving
from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, Segment
from yafsdp_like.memory.plan import MemoryPlan, Region, SlotPlace, readable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from yafsdp_like.hardware import Hardware
    from yafsdp_like.inference.options import PoolOptions
    from yafsdp_like.inference.plan.packed_weights import PackedUnit
    from yafsdp_like.models.decoder import DecoderConfig

SLABS, HOST_WEIGHTS = "slabs", "host weights"  # kinds, and their regions' names
_PULLS = "peer: the parts of embeddings and heads"  # what moves bytes between ranks that map memory


@dataclass(frozen=True)
class PooledModel:
    """A model that is to join a pool: its shape, and how it is served."""

    config: DecoderConfig
    dtype: torch.dtype = torch.bfloat16  # of weights
    options: EngineOptions = field(default_factory=EngineOptions)  # batches and scheduling; memory is the pool's


@dataclass(frozen=True)
class ModelPlan:
    """Where one model of a pool lies when it is awake."""

    name: str
    serving: ServingPlan  # when it is awake alone: its grid are the slabs that are left for pages then
    home: range  # slabs
    units: tuple[Segment, ...]  # each packed unit's bytes, from the start of the home
    host_units: tuple[Segment, ...]  # those of them that this rank's host has, from the start of the image there

    @property
    def image_nbytes(self) -> int:
        """Bytes of weights on this rank's host."""
        return self.host_units[-1].end_nbytes

    @property
    def token_nbytes(self) -> float:
        """Bytes of one token's keys and values, in all layers."""
        return sum(group.shape.nbytes / group.shape.page_size for group in self.serving.groups)

    @property
    def home_nbytes(self) -> int:
        """Bytes of weights on the device."""
        return self.units[-1].end_nbytes

    def is_pulled(self, unit: int) -> bool:
        """Return whether a unit is brought in parts by all ranks; see [Note: whole on all ranks]."""
        return self.host_units[unit].nbytes < self.units[unit].nbytes

    @property
    def slots_nbytes(self) -> int:
        """Bytes of slots of LoRA adapters, which lie in the home behind the units."""
        return 0 if self.serving.adapters is None else self.serving.adapters.region().nbytes

    @property
    def slots(self) -> Segment:
        """Where these slots lie in the slabs' region."""
        return Segment(self.home.start * self.serving.grid.slab_nbytes + self.home_nbytes, self.slots_nbytes)

    @property
    def images_region(self) -> str:
        """Name of the region of the model's adapters in host memory."""
        return f"{self.name}: {ADAPTER_IMAGES}"

    @property
    def tables_region(self) -> str:
        """Name of the region of the model's own tables."""
        return f"{self.name}: {TABLES}"

    def meets(self, other: ModelPlan) -> bool:
        """Return whether the two cannot be awake together."""
        return _common(self.home, other.home) > 0

    def slabs_of(self, unit: int) -> range:
        """Return the slabs that a unit lies in."""
        return self._slabs_of(self.units[unit])

    @property
    def slabs_of_slots(self) -> range:
        """The slabs that slots of adapters lie in."""
        return self._slabs_of(Segment(self.home_nbytes, self.slots_nbytes)) if self.slots_nbytes else range(0)

    def _slabs_of(self, segment: Segment) -> range:
        slab_nbytes, first = self.serving.grid.slab_nbytes, self.home.start
        return range(first + segment.offset_nbytes // slab_nbytes, first + ceil_div(segment.end_nbytes, slab_nbytes))


@dataclass(frozen=True)
class PoolPlan:
    """Every place of a pool of models, on the device and in host memory."""

    options: PoolOptions
    grid: SlabGrid  # of weights and pages
    host_grid: SlabGrid | None  # of pages that are swapped out
    models: Mapping[str, ModelPlan]

    @cached_property
    def memory(self) -> MemoryPlan:
        """Of the arena. Not in it: graphs of all models, CUDA's context, and what kernels are compiled to."""
        plans = [*self.models.values()]
        regions = [Region(SLABS, SLABS, self.grid.region_nbytes, self.maps_memory)]
        regions += [Region(kind, kind, _largest(plans, kind)) for kind in (WORKSPACE, LOGITS)]
        regions += [Region(plan.tables_region, TABLES, _buffers_nbytes(plan.serving, TABLES)) for plan in plans]
        homes = tuple(SlotPlace(plan.name, SLABS, self._bytes_of(plan), ALWAYS) for plan in plans)
        transports = ((SUMS,) if self.num_ranks > 1 else ()) + ((_PULLS,) if self.maps_memory else ())
        return MemoryPlan(self.num_ranks, tuple(regions), homes, transports)

    @cached_property
    def host(self) -> MemoryPlan:
        """Of host memory, pinned where the device is a GPU."""
        regions = [Region(HOST_WEIGHTS, HOST_WEIGHTS, self.host_weights_nbytes)]
        if self.host_grid is not None:
            regions.append(Region(HOST_KV_SLABS, HOST_KV_SLABS, self.host_grid.region_nbytes))
        for plan in self.models.values():
            if plan.serving.adapters is not None:
                regions.append(replace(plan.serving.adapters.host_region(), name=plan.images_region))
        return MemoryPlan(self.num_ranks, tuple(regions))

    @property
    def num_ranks(self) -> int:
        """Ranks that compute every step together, each with such arenas of its own."""
        return self._site.num_ranks

    @property
    def maps_memory(self) -> bool:
        """Whether these ranks read each other's slabs; see [Note: whole on all ranks]."""
        return self._site.maps_memory

    @property
    def _site(self) -> Site:
        return next(iter(self.models.values())).serving.site

    @cached_property
    def host_weights_nbytes(self) -> int:
        """Bytes for models' weights in host memory."""
        asked = self.options.host_weights_nbytes
        return self.all_weights_nbytes if asked is None else asked // ALIGNMENT_NBYTES * ALIGNMENT_NBYTES

    @cached_property
    def all_weights_nbytes(self) -> int:
        """Bytes of all models' weights."""
        return sum(plan.image_nbytes for plan in self.models.values())

    @cached_property
    def lend_late(self) -> dict[int, int]:
        """How many models' home each slab is, where it is any: pages come last from those that most models want."""
        found: dict[int, int] = {}
        for plan in self.models.values():
            for slab in plan.home:
                found[slab] = found.get(slab, 0) + 1
        return found

    @cached_property
    def recordings_nbytes(self) -> int:
        """The bytes that CUDA graphs of all models' steps take beside the arena; 0 on a CPU."""
        return sum(plan.serving.recordings_nbytes for plan in self.models.values())

    def least_slabs(self, name: str) -> int:
        """Return the slabs that one context of the longest sequence of a model needs."""
        serving = self.models[name].serving
        return serving.capacity.num_slabs(serving.grid, serving.max_seq_len)

    def _bytes_of(self, plan: ModelPlan) -> Segment:
        return Segment(plan.home.start * self.grid.slab_nbytes, plan.home_nbytes + plan.slots_nbytes)

    def __str__(self) -> str:
        lines = [*self._lines(), str(self.memory)]
        if self.num_ranks > 1:
            lines.insert(0, f"{self.num_ranks} ranks compute every step together, each with its part of every model:")
        if self.recordings_nbytes:
            lines.append(f"  beside the arena: {readable(self.recordings_nbytes)} for CUDA graphs of all models' steps")
        missing = self.all_weights_nbytes - self.host_weights_nbytes
        room = "room for the weights of all models" if missing <= 0 else f"{readable(missing)} too few for all weights"
        return "\n".join([*lines, f"in host memory, {room}: {self.host}"])

    def _lines(self) -> Iterator[str]:
        for name, plan in self.models.items():
            apart = [other.name for other in self.models.values() if other is not plan and plan.meets(other)]
            serving = plan.serving
            yield (
                f"{name}: {readable(plan.home_nbytes)} of weights, {len(serving.placement.packed_units)} units in "
                f"{str(serving.site.dtype).removeprefix('torch.')}; sequences of at most {serving.max_seq_len:,} "
                f"tokens; awake " + (f"in turn with {', '.join(apart)}" if apart else "beside all others")
            )


def plan_pool(
    models: Mapping[str, PooledModel],
    options: PoolOptions,
    hardware: Hardware | None = None,
    num_ranks: int = 1,
    maps_memory: bool = False,
) -> PoolPlan:
    """Plan to serve ``models``, by name, within ``options``; ``hardware`` is a CPU by default.

    With several ranks models are tensor parallel over all of them: the plan is of one rank, and so are the options'
    bytes; ``maps_memory`` says whether they read each other's memory. Raises ValueError for models that cannot be
    served, or do not fit one by one: which, and how many bytes are missing.
    """
    if not models:
        raise ValueError("expected at least one model, found none")
    site = Site(num_ranks=num_ranks, maps_memory=maps_memory and num_ranks > 1, hardware=hardware)
    alone = {name: _alone(name, model, options, replace(site, dtype=model.dtype)) for name, model in models.items()}
    kinds = [max(_buffers_nbytes(plan, kind) for plan in alone.values()) for kind in (WORKSPACE, LOGITS)]
    buffers_nbytes = sum(kinds) + sum(_buffers_nbytes(plan, TABLES) for plan in alone.values())
    buffers_nbytes += max(plan.buffers.image_nbytes for plan in alone.values())
    images = tuple(dict.fromkeys(shape for plan in alone.values() for shape in plan.capacity.beside))
    shapes = Capacity(tuple(group for plan in alone.values() for group in plan.groups), chunk=1, beside=images)
    graphs_nbytes = sum(plan.recordings_nbytes for plan in alone.values())
    grid = shapes.grid(options.memory_limit_nbytes - buffers_nbytes - graphs_nbytes)
    if grid is None:
        raise ValueError(
            f"memory_limit_nbytes={options.memory_limit_nbytes} leaves no slab for weights and pages beside "
            f"{buffers_nbytes:,} bytes for the buffers of steps and {graphs_nbytes:,} for CUDA graphs"
        )
    units = {name: tuple(_units(plan)) for name, plan in alone.items()}
    host_units = {name: tuple(_host_units(plan)) for name, plan in alone.items()}
    slots = {name: plan.adapters.region().nbytes if plan.adapters else 0 for name, plan in alone.items()}
    sizes = [ceil_div(units[name][-1].end_nbytes + slots[name], grid.slab_nbytes) for name in alone]
    for (name, plan), size in zip(alone.items(), sizes, strict=True):
        _check_fits(name, plan, grid, size, options)
    wanted = max(_wanted_slabs(plan, grid, options) for plan in alone.values())
    homes = _place(sizes, max(min(sum(sizes), grid.num_slabs - wanted), max(sizes)))
    host_grid = _host_grid(shapes, options)
    plans = {
        name: ModelPlan(name, _awake_alone(plan, grid, home, host_grid), home, units[name], host_units[name])
        for (name, plan), home in zip(alone.items(), homes, strict=True)
    }
    found = PoolPlan(options, grid, host_grid, plans)
    _check_host(found)
    return found


def _alone(name: str, model: PooledModel, options: PoolOptions, site: Site) -> ServingPlan:
    """Plan a model as if it had all memory: what its buffers take, and whether it fits at all."""
    own = model.options
    if (own.memory_limit_nbytes, own.kv_nbytes, own.host_kv_nbytes) != (None, None, 0):
        raise ValueError(f"model {name!r}: memory is the pool's; leave it out of the model's options, found {own}")
    if own.speculation is not None and own.speculation.draft is not None:
        raise ValueError(f"model {name!r}: models of a pool have no draft models; speculate=prompt-lookup needs none")
    within = replace(own, memory_limit_nbytes=options.memory_limit_nbytes)
    try:
        return plan_serving(model.config, within, site, "resident" if site.num_ranks == 1 else "tensor_parallel")
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}") from error


def _units(plan: ServingPlan) -> Iterator[Segment]:
    """Yield where units lie in the home: one that comes in parts has room for as many bytes of each rank."""
    sites = [(_part_nbytes(plan, packed), packed) for packed in plan.placement.packed_units]
    return _in_a_row(packed.nbytes if part is None else part * plan.site.num_ranks for part, packed in sites)


def _host_units(plan: ServingPlan) -> Iterator[Segment]:
    """Yield what one rank's host has of each unit, and where it lies in the image."""
    return _in_a_row(_part_nbytes(plan, packed) or packed.nbytes for packed in plan.placement.packed_units)


def _part_nbytes(plan: ServingPlan, packed: PackedUnit) -> int | None:
    """Return the bytes that each rank brings of a unit that is whole on all; None where each brings all of its own."""
    is_cut = any(parameter.cut is not None for parameter, _ in packed.parameters())
    return None if is_cut or not plan.site.maps_memory else packed.part_nbytes(plan.site.num_ranks)


def _in_a_row(sizes: Iterable[int]) -> Iterator[Segment]:
    offset = 0
    for nbytes in sizes:
        yield Segment(offset, nbytes)
        offset += nbytes


def _least_tokens(plan: ServingPlan) -> int:
    """Return the tokens of context that must fit: a whole sequence's, if its length is said, else those of one step."""
    return plan.options.max_seq_len or min(plan.max_seq_len, plan.options.max_batch_tokens)


def _check_fits(name: str, plan: ServingPlan, grid: SlabGrid, num_home: int, options: PoolOptions) -> None:
    least = _least_tokens(plan)
    missing = num_home + plan.capacity.num_slabs(grid, least) - grid.num_slabs
    if missing > 0:
        raise ValueError(
            f"model {name!r} does not fit memory_limit_nbytes={options.memory_limit_nbytes}: beside its weights, "
            f"{num_home * grid.slab_nbytes:,} bytes, keys and values of {least:,} tokens must fit, and "
            f"{missing * grid.slab_nbytes:,} bytes are missing; it fits with "
            f"memory_limit_nbytes={options.memory_limit_nbytes + missing * grid.slab_nbytes}"
        )


def _check_host(plan: PoolPlan) -> None:
    """Raise where a model has no room in host memory even alone; with room, any order of loads finds it."""
    for name, model in plan.models.items():
        if model.image_nbytes > plan.host_weights_nbytes:
            raise ValueError(
                f"model {name!r} can never be loaded: its weights are {model.image_nbytes:,} bytes, and "
                f"host_weights_nbytes={plan.options.host_weights_nbytes}; it must be at least {model.image_nbytes}"
            )


def _wanted_slabs(plan: ServingPlan, grid: SlabGrid, options: PoolOptions) -> int:
    """Return how many slabs are to be nobody's home: as asked for, or one context of the longest sequence."""
    if options.kv_nbytes is not None:
        return ceil_div(options.kv_nbytes, grid.slab_nbytes)
    return plan.capacity.num_slabs(grid, _least_tokens(plan))


def _place(sizes: Sequence[int], num_slabs: int) -> list[range]:
    """Give each model as many slabs of ``num_slabs``; see [Note: homes]."""
    placed: dict[int, range] = {}
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        last = num_slabs - sizes[index]
        starts = {0, last, *(home.stop for home in placed.values()), *(h.start - sizes[index] for h in placed.values())}

        def cost(start: int, size: int = sizes[index]) -> tuple[int, int, int]:
            met = [_common(range(start, start + size), home) for home in placed.values()]
            return sum(common > 0 for common in met), -sum(met), start

        start = min((start for start in starts if 0 <= start <= last), key=cost)
        placed[index] = range(start, start + sizes[index])
    return [placed[index] for index in range(len(sizes))]


def _common(one: range, other: range) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))


def _awake_alone(plan: ServingPlan, grid: SlabGrid, home: range, host_grid: SlabGrid | None) -> ServingPlan:
    """Return the plan with what is left for pages while no other model is awake."""
    left = SlabGrid((grid.num_slabs - len(home)) * grid.slab_nbytes, grid.slab_nbytes)
    longest = plan.options.max_seq_len or plan.capacity.longest(left, plan.max_seq_len)
    return replace(plan, grid=left, host_grid=host_grid, max_seq_len=longest)


def _host_grid(shapes: Capacity, options: PoolOptions) -> SlabGrid | None:
    if not options.host_kv_nbytes:
        return None
    grid = shapes.grid(options.host_kv_nbytes)
    if grid is None:
        least = max(shape.nbytes for shape in shapes.shapes)
        raise ValueError(f"host_kv_nbytes {options.host_kv_nbytes} hold no pages; of these one has {least}")
    return grid


def _buffers_nbytes(plan: ServingPlan, kind: str) -> int:
    return sum(region.nbytes for region in plan.buffers.regions if region.kind == kind)


def _largest(plans: Sequence[ModelPlan], kind: str) -> int:
    return max(_buffers_nbytes(plan.serving, kind) for plan in plans)
