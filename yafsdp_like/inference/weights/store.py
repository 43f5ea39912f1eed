"""A served model's weights on a device, whole when a forward reads them, wherever they lie between.

Owns the moving of units into slots, and the order of streams around it. Which units are moved, and where everything
lies, the plan says (`placement.py`); what the bytes mean, `packed_weights.py`; `loading.py` fills them.

[Note: the order of a forward]
A forward calls ``embedding``, ``layer`` and ``release`` for each layer in order, and ``head``, once each, all on one
stream. Each call makes the current stream wait until the unit is there. As soon as a unit is released, those that are
used next are prefetched, as many as find their bytes free: behind the last reader, which was issued just before. The
embedding is released by ``layer(0)``, the head by the next ``embedding``, which also releases what a forward that
failed has left.

[Note: same residency]
A CUDA graph of a forward needs the same units resident, and no copy in flight, when it begins and when it ends.
``reset_residency`` makes it so before a recording, before each of its replays, and at the end of what is recorded. The
units are those that are prefetched for the next forward while the head is computed, so waiting for them costs little.

[Note: own pace or lockstep]
Weights do not change, so ranks that map each other's memory gather without meeting: a rank may serve while another
idles, and only in the end does each wait for all (``close``), since others read its shard. Over a process group a
gather is a collective (``lockstep``): whoever drives the engines must step all of them equally often, and an engine
makes one forward in every step, of all calls above and without a reader where it has nothing to do. A rank that stops
makes the others wait.

[Note: tensor parallel]
Tensor parallel ranks make one forward together (``tp_group``): each has its part of every layer, and a forward holds
sums over all ranks. So all must step with the same requests, added and cancelled between the same two steps. Sums give
the same bits everywhere, so that all draw the same tokens, and the scheduler counts tokens and pages only; what it
knows by the clock (costs that were measured, deadlines) is the first rank's.

Shapes: D model, N heads, K kv heads, H head dim, F feed-forward, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from yafsdp_like.comm.consistency import check_same_on_all_ranks
from yafsdp_like.comm.tp_group import world_tp_group
from yafsdp_like.inference.plan.adapter_layout import PRODUCTS
from yafsdp_like.inference.plan.placement import WEIGHT_SLOTS
from yafsdp_like.inference.plan.quantized_fields import BESIDE_CODES, ORDER, SCALES, ZEROS, rows_per_scale
from yafsdp_like.kernels.quantized_matrix import Matrix, QuantizedMatrix
from yafsdp_like.memory.arena import Arena, Place
from yafsdp_like.memory.layout import Segment
from yafsdp_like.memory.pinned import pin_arena
from yafsdp_like.memory.streams import COMPUTE, GATHER, Event, Streams, streams_of
from yafsdp_like.models.vision import PROJECTOR, TOWER
from yafsdp_like.models.vision_weights import TowerDigest, ValueReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from yafsdp_like.comm.transport import Transport
    from yafsdp_like.inference.plan.packed_weights import PackedUnit
    from yafsdp_like.inference.plan.serving_plan import ServingPlan
    from yafsdp_like.models.decoder import DecoderConfig

_SHARED = ("gathered", "tensor_parallel")  # modes in which ranks have parts of weights


@dataclass(frozen=True)
class LayerWeights:
    """What one layer's forward reads, in the weights' dtype; N, K, F are this rank's (``ServingPlan.rank_config``)."""

    input_norm: Tensor  # (D,)
    qkv: Matrix  # ((N + 2 K) H, D): rows of queries, keys, values
    o: Matrix  # (D, N H)
    post_norm: Tensor  # (D,)
    gate_up: Matrix  # (2 F, D): rows of gate, up; of experts (2 E, F, D)
    down: Matrix  # (D, F); of experts (E, D, F)
    qkv_bias: Tensor | None = None  # ((N + 2 K) H,)
    q_norm: Tensor | None = None  # (H,)
    k_norm: Tensor | None = None  # (H,)
    router: Tensor | None = None  # (E, D), where there are experts
    o_bias: Tensor | None = None  # (D,)
    gate_up_bias: Tensor | None = None  # (2 F,)
    down_bias: Tensor | None = None  # (D,)


@dataclass(frozen=True)
class Store:
    """Bytes of a packed unit from ``start_nbytes`` on, where they are kept: to be filled once."""

    packed: PackedUnit
    start_nbytes: int  # a multiple of ``ALIGNMENT_NBYTES``, so that no element is cut
    values: Tensor  # (nbytes,) uint8; what goes beyond the unit is padding
    rank: int = 0  # whose part it is of parameters that are cut


@dataclass(eq=False)
class _Slot:
    """A moved unit's bytes on the device, and whether it is there."""

    name: str
    extent: Place  # what moving writes
    copy_in: Callable[[], None]  # issues the copies, on the current stream
    neighbours: list[_Slot] = field(default_factory=list)  # that share bytes with it
    is_resident: bool = False  # or is being prefetched
    arrived: Event | None = None  # to be waited for before it is read; None: it was
    in_use: bool = False


class Weights:
    """Weights as a plan places them: each unit stays on the device, or is moved there for each forward.

    ``arena`` holds all regions of the plan on the device, the engine's own too, and ``host`` those in host memory. See
    [Note: the order of a forward].
    """

    def __init__(
        self, plan: ServingPlan, arena: Arena, host: Arena, transport: Transport | None, streams: Streams
    ) -> None:
        self.config, self.dtype, self.device = plan.config, plan.site.dtype, arena.device
        self.plan, self.arena, self.host = plan, arena, host
        # See [Note: tensor parallel] and [Note: own pace or lockstep]; None: each rank makes its own forwards.
        self.tp_group = world_tp_group() if plan.mode == "tensor_parallel" else None
        self.rank = 0 if self.tp_group is None else self.tp_group.rank  # whose parts of parameters that are cut
        self.lockstep = self.tp_group is not None or (plan.mode == "gathered" and not plan.site.maps_memory)
        # See [Note: same residency]; gathering ranks in lockstep replay or skip, each on its own: they cannot record.
        self.graphable = self.tp_group is not None or not self.lockstep
        self._transport, self._streams = transport, streams
        wholes = [self._whole(unit) for unit in range(len(plan.placement.packed_units))]
        self._slots = self._slots_of(wholes)
        self._following = {unit: [self._slots[u] for u in plan.placement.following(unit)] for unit in self._slots}
        self._views = [_views(packed, whole) for packed, whole in zip(plan.placement.packed_units, wholes, strict=True)]
        self._layers = [_layer(self._views[1 + index], self.config) for index in range(self.config.num_layers)]
        self._head_unit = plan.placement.uses[-1]
        vision = self.config.vision
        self._tower = None if vision is None else TowerDigest(vision, self.dtype)

    # --- what a forward calls ---

    def embedding(self) -> Tensor:
        """Return the embedding (V, D), which is valid until ``layer(0)``."""
        for unit in self._slots:
            if unit:  # a tied head is the embedding, and stays in use
                self._release(unit)
        self._acquire(0)
        return self._views[0]["weight"]

    def layer(self, index: int) -> LayerWeights:
        """Return a layer's weights, which are valid until its ``release``."""
        if index == 0:
            self._release(0)
        self._acquire(1 + index)
        return self._layers[index]

    def release(self, index: int) -> None:
        """Release a layer; the forward has issued its last reader."""
        self._release(1 + index)

    def head(self) -> tuple[Tensor, Tensor]:
        """Return the last norm (D,) and the head (V, D), valid until the next ``embedding``."""
        self._acquire(self._head_unit)
        views = self._views[self._head_unit]
        return views["norm"], views["weight"]

    def vision(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the parameters of the vision tower and of its projector, by their names there; both always stay."""
        found = {packed.name: unit for unit, packed in enumerate(self.plan.placement.packed_units)}
        for name in (TOWER, PROJECTOR):
            self._acquire(found[name])
        return self._views[found[TOWER]], self._views[found[PROJECTOR]]

    @property
    def tower_digest(self) -> bytes:
        """What the vision tower is known by, once it is loaded: models of one digest share features of images."""
        assert self._tower is not None, "the model takes no images"
        return self._tower.value

    def watched(self, source: ValueReader) -> ValueReader:
        """Return what all values must be read through, so that the tower's digest is known."""
        return source if self._tower is None else self._tower.watch(source)

    def reset_residency(self) -> None:
        """Restore the residency that a recorded forward begins with, see [Note: same residency]."""
        for slot in self._slots.values():
            slot.in_use = False
            if not slot.neighbours and not slot.is_resident:
                self._prefetch(slot)  # to stay
        kept = self._prefetch_next(list(self._slots.values()))
        for slot in self._slots.values():
            slot.is_resident = slot in kept or not slot.neighbours
            self._wait_for(slot)

    def is_arriving(self) -> bool:
        """Return whether units that stay are still on their way, which only models of a pool's may be."""
        return False

    # --- slots ---

    def _acquire(self, unit: int) -> None:
        slot = self._slots.get(unit)
        if slot is None:
            return
        if not slot.is_resident:
            self._prefetch(slot)
        self._wait_for(slot)
        slot.in_use = True
        self._prefetch_next(self._following[unit])

    def _release(self, unit: int) -> None:
        slot = self._slots.get(unit)
        if slot is not None and slot.in_use:
            slot.in_use = False
            self._prefetch_next(self._following[unit])

    def _prefetch_next(self, order: Sequence[_Slot]) -> list[_Slot]:
        """Prefetch units of ``order`` up to the first whose bytes are in use, and return those that are resident."""
        kept: list[_Slot] = []
        for slot in order:
            if not slot.is_resident:
                if any(other.in_use or other in kept for other in slot.neighbours):
                    break
                self._prefetch(slot)
            kept.append(slot)
        return kept

    def _prefetch(self, slot: _Slot) -> None:
        for other in slot.neighbours:
            if other.in_use:
                raise RuntimeError(f"{slot.name!r} needs the bytes of {other.name!r}, which has not been released")
            other.is_resident = False
        self._streams.wait(GATHER, self._streams.record(COMPUTE))
        with self._streams.on(GATHER):
            slot.copy_in()
        slot.arrived, slot.is_resident = self._streams.record(GATHER), True

    def _wait_for(self, slot: _Slot) -> None:
        if slot.is_resident and slot.arrived is not None:
            self._streams.wait(COMPUTE, slot.arrived)
            slot.arrived = None

    # --- where units lie, and come from ---

    def _whole(self, unit: int) -> Place:
        """Return all bytes of a unit, where a forward reads them."""
        placement, name = self.plan.placement, self.plan.placement.packed_units[unit].name
        if unit not in placement.non_resident:
            return self.arena.place(name)
        slot = self._extent(unit)
        if not placement.granule_nbytes:
            return slot
        assert self._transport is not None
        own = self._transport.rank * placement.part_nbytes(unit)  # where this rank's part begins
        before, after = Segment(0, own), Segment(own, slot.segment.nbytes - own)
        parts = [slot.part(before), self.arena.place(f"{name}.shard"), slot.part(after)]
        return self.arena.alias(f"{name}.aliased_slot", parts)

    def _extent(self, unit: int) -> Place:
        return self.arena.place(WEIGHT_SLOTS).part(self.plan.placement.slots[0][unit])

    def _slots_of(self, wholes: Sequence[Place]) -> dict[int, _Slot]:
        """Make one slot per moved unit, in the order of a forward, with the slots that share its bytes."""
        packed_units = self.plan.placement.packed_units
        slots = {
            unit: _Slot(packed_units[unit].name, self._extent(unit), self._copy_into_slot(unit, wholes[unit]))
            for unit, _ in self.plan.placement.runs
        }
        for slot in slots.values():
            slot.neighbours = [o for o in slots.values() if o is not slot and o.extent.overlaps(slot.extent)]
        return slots

    def _copy_into_slot(self, unit: int, whole: Place) -> Callable[[], None]:
        placement = self.plan.placement
        name, values = placement.packed_units[unit].name, flat_bytes(whole)
        if self.plan.mode == "streamed":
            return partial(_copy, values, flat_bytes(self.host.place(name)))
        assert self._transport is not None, "a gathered plan is of a transport"
        shard = flat_bytes(self.arena.place(f"{name}.shard"))
        return self._transport.all_gather([values], [shard], in_place={0} if placement.granule_nbytes else ())

    def stores(self) -> Iterator[Store]:
        """Yield all that is to be filled on this rank and its host, unit by unit."""
        placement = self.plan.placement
        for unit, packed in enumerate(placement.packed_units):
            if unit not in placement.non_resident:
                yield Store(packed, 0, flat_bytes(self.arena.place(packed.name)), self.rank)
            elif self.plan.mode == "streamed":
                yield Store(packed, 0, flat_bytes(self.host.place(packed.name)))
            else:
                assert self._transport is not None
                values = flat_bytes(self.arena.place(f"{packed.name}.shard"))
                yield Store(packed, self._transport.rank * len(values), values)

    # --- before the first forward, and after the last ---

    def finish_loading(self, error: BaseException | None = None) -> None:
        """Wait for all ranks that share weights to have loaded, and raise where any failed.

        ``error`` is why this rank's stores are not filled.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what reading and drawing values took is not in the plan
        self._check_same_on_all_ranks("loaded", error)

    def close(self) -> None:
        """End the forwards. Where ranks map each other's memory, wait until all have ended theirs."""
        self._check_same_on_all_ranks("closed", None)

    def _check_same_on_all_ranks(self, line: str, error: BaseException | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._transport is not None:
            check_same_on_all_ranks(self._transport.everybody, [line], error)
        elif error is not None:
            raise error


def reserve(plan: ServingPlan, device: torch.device, transport: Transport | None = None) -> Weights:
    """Allocate all regions of the plan, once, and return weights on them that are still to be filled.

    A gathered or tensor parallel plan needs the transport of its ranks, who all call this together; it raises on all of
    them where it does on one, and RuntimeError where their plans differ. Raises ValueError for a transport that a plan
    cannot use, and what ``Arena.reserve`` does where there is no room.
    """
    transport = transport if plan.mode in _SHARED else None
    _check(plan, transport)
    arena, host = Arena(device), Arena(torch.device("cpu"))
    error: BaseException | None = None
    try:
        arena.reserve(plan.memory.regions)
        host.reserve(plan.host.regions)
        if device.type == "cuda":
            pin_arena(host, device)
    except Exception as caught:
        error = caught
    if transport is not None:
        check_same_on_all_ranks(transport.everybody, str(plan).splitlines(), error)
        if plan.mode == "gathered" and transport.mapped is not None:
            transport.mapped.connect(arena.blocks)
    elif error is not None:
        raise error
    return Weights(plan, arena, host, transport, streams_of(device))


def _check(plan: ServingPlan, transport: Transport | None) -> None:
    if plan.mode not in _SHARED:
        return
    if transport is None:
        raise ValueError(f"a {plan.mode} plan needs the transport of its ranks, found none")
    if plan.mode == "tensor_parallel" and transport.world_size != world_tp_group().size:
        raise ValueError(
            f"tensor_parallel takes all {world_tp_group().size} ranks, found those of {transport.world_size}"
        )
    if plan.mode == "gathered" and transport.mapped is not None and not transport.mapped.reads_shards:
        raise ValueError("weights cannot be gathered from peers of several hosts yet; use transport='process_group'")
    maps_memory = transport.mapped is not None
    if (transport.world_size, maps_memory) != (plan.site.num_ranks, plan.site.maps_memory):
        raise ValueError(
            f"the plan is for {plan.site.num_ranks} ranks (maps_memory={plan.site.maps_memory}), the transport of "
            f"{transport.world_size} (maps_memory={maps_memory})"
        )


def _views(packed: PackedUnit, whole: Place) -> dict[str, Tensor]:
    """Return views of the unit's fields, by name."""
    segments = packed.segments()
    return {f.name: whole.part(segments[f.name]).tensor(f.dtype, f.shape) for f in packed.fields}


def _layer(views: Mapping[str, Tensor], config: DecoderConfig) -> LayerWeights:
    parts = {name: view for name, view in views.items() if not name.endswith(tuple(f"_{end}" for end in BESIDE_CODES))}
    matrices = {name: _quantized(name, views, config) for name in PRODUCTS if f"{name}_{SCALES}" in views}
    return LayerWeights(**{**parts, **matrices})  # type: ignore[arg-type]


def _quantized(name: str, views: Mapping[str, Tensor], config: DecoderConfig) -> QuantizedMatrix:
    assert config.quantization is not None, "there are scales"
    codes, scales = views[name], views[f"{name}_{SCALES}"]
    columns = config.quantization.group_columns or codes.shape[-1] * 8 // config.quantization.bits
    zeros, order = views.get(f"{name}_{ZEROS}"), views.get(f"{name}_{ORDER}")
    return QuantizedMatrix(codes, scales, rows_per_scale(config), columns, zeros, order)


def flat_bytes(place: Place) -> Tensor:
    """Return all bytes of a place, (nbytes,) uint8."""
    return place.tensor(torch.uint8, (place.segment.nbytes,))


def _copy(destination: Tensor, source: Tensor) -> None:
    destination.copy_(source, non_blocking=True)
