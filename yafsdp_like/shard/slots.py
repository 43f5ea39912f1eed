"""Where a unit's full parameters and full gradients lie: at fixed addresses, in states that ``engine.py`` changes.

This file owns the tensors on a slot's bytes and what compute last did with them. It decides neither which bytes those
are (``memory_layout.py``, ``allocated_memory.py``) nor when they are filled and left.

[Note: one address per unit]
Autograd saves views of a unit's full parameters in forward and reads them in backward. They must find the same values
at the same address, so a slot belongs to one unit for good: slots share bytes with other units' slots
(``neighbours``), never addresses with "any free slot". When execution asks for two slots at once that share bytes,
one unit moves to a slot of its own for its later forwards, while what was saved earlier keeps the old slot
(``ForwardUse.slot``).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from yafsdp_like.shard.nested import addresses_in

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from yafsdp_like.comm.transport import Gather, Reduce
    from yafsdp_like.memory.arena import Place
    from yafsdp_like.memory.layout import FlatLayout
    from yafsdp_like.memory.streams import Event
    from yafsdp_like.shard.param import ShardedParam
    from yafsdp_like.shard.unit import Unit

Generation = tuple[int, ...]  # what a unit's main shards are by now; equal generations are equal values


class SlotState(enum.Enum):
    """What a slot's bytes are to the compute stream. The transitions are in ``engine.py``, and those of a replayed step
    in ``graph.py``; no others happen.
    """

    EMPTY = "nobody's: any neighbour may take the bytes"
    FILLED = "gathered ahead, not yet read: a neighbour in need may still take the bytes"
    STALE = "read and released, the values still there: any neighbour may take the bytes"
    HELD = "being read or written by running work: nobody may touch the bytes"
    KEPT = "idle but left unsharded on purpose: given up when a neighbour needs the bytes"


class GatherSlot:
    """A unit's full parameters at a fixed address.

    ``params[k]`` is the ``nn.Parameter`` that modules compute on; ``outputs[k]``, ``(padded_numel,)``, is the same
    bytes for the collective to write. They are different tensors: see [Note: version counters]. ``places`` has one
    place per parameter; ``extent`` is what is gathered, or None when the slot is the shard (one rank). Of the
    parameters in ``aliased`` the places show this rank's shard itself: see [Note: windows].
    """

    def __init__(
        self, unit: Unit, places: Sequence[Place], extent: Place | None, aliased: Collection[int] = ()
    ) -> None:
        self.unit = unit
        self.extent = extent
        self.aliased = frozenset(aliased)
        self.neighbours: list[GatherSlot] = []  # slots that share bytes with this one
        self.state = SlotState.EMPTY
        self.ready: Event = None  # the gather has arrived
        self.released: Event = None  # the last reader is done; None once a gather has waited for it
        self.generation: Generation = ()  # of the main shards when they were gathered
        self.active: dict[ForwardUse, None] = {}  # uses whose backward is running
        self.params = [_full_param(p, place) for p, place in zip(unit.params, places, strict=True)]
        self.outputs = [
            place.flat(p.compute_dtype, p.shards.padded_numel) for p, place in zip(unit.params, places, strict=True)
        ]

    @cached_property
    def _addresses(self) -> range:
        """What the slot occupies; nothing where it is the shard, which stays."""
        if self.extent is None or not self.outputs:
            return range(0)
        start = min(output.data_ptr() for output in self.outputs)
        return range(start, max(output.data_ptr() + output.nbytes for output in self.outputs))

    def aliases(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a full parameter of this slot or a view of one: its values go when the slot is
        released.
        """
        return any(address in self._addresses for address in addresses_in(tensor))

    @cached_property
    def all_gather(self) -> Gather:
        """Brings every rank's compute shard here. First asked for once transports are connected."""
        inputs = [p.compute for p in self.unit.params]
        return self.unit.transport.gather(self.outputs, inputs, self.aliased, self.unit.column)


def _full_param(p: ShardedParam, place: Place) -> nn.Parameter:
    full = nn.Parameter(place.tensor(p.compute_dtype, p.shards.shape), requires_grad=p.trainable)
    vars(full).update(vars(p.sharded))
    return full


class GradientSlot:
    """A unit's full gradients from their arrival in backward until they are reduced.

    For each trainable parameter ``k``: ``views[k]`` has its shape and ``inputs[k]`` is ``(padded_numel,)``, in its
    ``gradient_dtype``. ``holds`` are those with some gradient in the slot, ``arrived`` those for which it is all that
    the backwards so far have computed.
    Padding holds anything.
    """

    def __init__(self, unit: Unit, extent: Place | None, layout: FlatLayout) -> None:
        self.unit = unit
        self.extent = extent  # None: nothing is trainable
        self.neighbours: list[GradientSlot] = []
        self.state = SlotState.EMPTY
        self.released: Event = None  # the reduction is done; None once compute has waited for it
        self.holds: set[int] = set()
        self.early: dict[int, Event] = {}  # reduced before the rest, and when that was done
        self.arrived: dict[int, int | None] = {}  # parameter -> the backward in which it arrived last
        self.views: dict[int, torch.Tensor] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.homes: tuple[int, ...] = ()  # of gradients that are still held, where the unit's go meanwhile
        self._reduces: dict[tuple[tuple[int, ...], tuple[int, ...]], Reduce] = {}
        for k in unit.trainable:
            assert extent is not None
            p, place = unit.params[k], extent.part(layout.segments[k])
            self.views[k] = place.tensor(p.gradient_dtype, p.shards.shape)
            self.inputs[k] = place.flat(p.gradient_dtype, p.shards.padded_numel)

    def reduce_scatter(self, which: Sequence[int]) -> Reduce:
        """Reduces the gradients of these parameters into their gradient shards."""
        key = tuple(which), self.homes
        if key not in self._reduces:
            params = [self.unit.params[k] for k in which]
            self._reduces[key] = self.unit.transport.reduce(
                [p.grad for p in params],
                [self.inputs[k] for k in which],
                [p.reduce_dtype.to_real() for p in params],
                self.unit.staging,
            )
        return self._reduces[key]

    def spare_kept_grads(self, which: Sequence[int]) -> None:
        """The gradients of these parameters are written next: those of before that are still held keep their values."""
        moved = [self.unit.params[k].spare_kept_grad() for k in which]
        if any(moved):
            self.homes = tuple(p.homes.index if p.homes else 0 for p in self.unit.params)


@dataclass(eq=False)
class ForwardUse:
    """One forward call of a unit whose backward may come: which slot its saved tensors point to.

    Held by the autograd graph only, so that it dies with a graph that is never run backward.
    """

    slot: GatherSlot
    task: int | None = None  # the running backward that has reached it, by autograd's number
