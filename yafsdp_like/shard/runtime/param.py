"""One sharded parameter: the DTensor that the user sees, and this rank's flat chunks of it.

This file owns what is a single parameter's: dtypes, rows, shards and ``.grad``, and which modules register it. It knows
nothing of the unit that it is all-gathered with (``unit_state.py``).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.modules.batchnorm import _NormBase

from yafsdp_like.memory.layout import contiguous_stride
from yafsdp_like.ops.split_master import SplitTensor, SplitValues, values_of
from yafsdp_like.shard.runtime.extension import Extension, attributes_of, is_extended, refuse_subclass
from yafsdp_like.shard.runtime.gradient_shard import GradientShard
from yafsdp_like.shard.runtime.nested import layers_of
from yafsdp_like.shard.runtime.param_placement import ParamPlacement, words_of
from yafsdp_like.shard.spec.unit_spec import ParamSpec, param_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.fsdp import MixedPrecisionPolicy

    from yafsdp_like.memory.arena import Place
    from yafsdp_like.shard.spec.unit_spec import UnitPolicy

NOWHERE = torch.empty(0, device="meta")  # stands for a shard that has no place yet


@dataclass(frozen=True)
class ParamMark:
    """The mark of a parameter that says where it lives now.

    It is the sharded one, a slot's full one, or one that was sharded or adopted and holds nothing that is trained any
    more (``is_replaced``).

    Pickled and copied with the parameter, it becomes an empty set: files that ``torch.load`` trusts know nothing of us.
    """

    param_ref: weakref.ref[ShardedParam]
    is_replaced: bool = False

    @property
    def param(self) -> ShardedParam:
        """The parameter, which lives as long as its unit."""
        param = self.param_ref()
        assert param is not None
        return param

    def __reduce__(self) -> tuple[type[set[Any]], tuple[()]]:
        return set, ()


@dataclass(frozen=True)
class _Stand:
    """A tensor that the user put in a parameter's place for a while, and what modules compute on instead of it."""

    module: nn.Module
    attribute: str
    given: torch.Tensor
    computed: torch.Tensor


class _Owner(NamedTuple):
    """A module that registers a parameter, under which name. Weak: see [Note: who owns whom]."""

    ref: weakref.ref[nn.Module]
    attribute: str
    keeps_dict_only: bool  # unlike nn.LSTM, which keeps a list of its weights beside the dict

    @classmethod
    def of(cls, module: nn.Module, attribute: str) -> Self:
        return cls(weakref.ref(module), attribute, type(module).__setattr__ is nn.Module.__setattr__)


def statistics_dtype(module: nn.Module | None) -> torch.dtype | None:
    """Return in which dtype a norm with running statistics keeps them, and so computes; None for other modules."""
    statistics = module.running_mean if isinstance(module, _NormBase) else None
    return None if statistics is None else statistics.dtype


class ShardedParam:
    """One parameter: its sharded DTensor, who registers it, and this rank's flat chunks of it.

    ``main`` and ``compute`` are ``(chunk_numel,)``, padding included, in ``main_shard_dtype`` and ``compute_dtype``
    (``Place.flat``); the DTensor shows their first ``local_shape`` elements.
    """

    def __init__(
        self,
        param: nn.Parameter,
        owners: list[tuple[nn.Module, str]],
        placement: ParamPlacement,
        on_host: bool = False,
        computed_in: torch.dtype | None = None,
    ) -> None:
        self.name = owners[0][1]  # the full name from the root, once the root is known
        self._owners = [_Owner.of(module, attribute) for module, attribute in owners]
        self._computed_in = computed_in  # by the user's wish, whatever the policy says otherwise
        self.on_host = on_host  # whether the main shard and the gradient are in host memory
        self.placement, self.rank, self.shards = placement, placement.rank, placement.shards
        self.attributes = attributes_of(param)  # the user's own, which a cast or move of the module would lose
        self.extension: Extension | None = None  # of the parameter's class
        self.sharded = self._shard(param)
        self.registered: torch.Tensor = param  # what modules were last made to see: the sharded parameter or a full one
        self._stands: list[_Stand] = []  # of given tensors, while full parameters are registered
        self.compute_dtype = self.gradient_dtype = self.reduce_dtype = self.grad_dtype = param.dtype
        self.is_split = False  # see [Note: split master]
        self.offloads_remainder = False  # see [Note: remainders on the host]
        self.is_cast = True  # compute shards are main shards in another dtype, if they are other memory
        self.placed: torch.Tensor | None = None  # ``local`` as Unit.materialize left it; None: not in the arena
        self._address = 0  # and its address
        self.main = self.compute = NOWHERE  # filled by Unit.materialize, and the other by the build
        self.grad_shard: GradientShard | None = None  # if it is trainable; made by the build

    @property
    def owners(self) -> list[tuple[nn.Module, str]]:
        """The modules that register this parameter, and under which name."""
        return [(module, attribute) for ref, attribute, _ in self._owners if (module := ref()) is not None]

    def _shard(self, param: torch.Tensor) -> nn.Parameter:
        """Return the parameter's DTensor on this rank's rows, with its hooks."""
        rows = self.placement.own_part(param)
        self.extension = Extension(self.name, self.placement) if is_extended(rows) else None
        if self.on_host and not rows.is_meta:
            rows = rows.cpu()
        sharded = nn.Parameter(self.placement.dtensor(rows), requires_grad=param.requires_grad)
        for hook in (param._backward_hooks or {}).values():
            sharded.register_hook(hook)
        for hook in (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values():
            sharded.register_post_accumulate_grad_hook(hook)
        return sharded

    @property
    def local(self) -> torch.Tensor:
        """This rank's rows as the DTensor holds them, ``local_shape``."""
        return self.sharded._local_tensor  # type: ignore[attr-defined]

    @property
    def is_placed(self) -> bool:
        """Whether ``local`` is what Unit.materialize left, and where: ``share_memory_`` moves it."""
        local: torch.Tensor = self.sharded._local_tensor  # type: ignore[attr-defined]
        return self.placed is local and (self.extension is not None or local.data_ptr() == self._address)

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype that the optimizer sees."""
        return self.local.dtype

    @property
    def trainable(self) -> bool:
        """Whether the user wants gradients."""
        return self.sharded.requires_grad

    def spec(self, name: str, policy: UnitPolicy, as_computed: bool, has_room: bool) -> ParamSpec:
        """Return what a plan needs to know, by the policy of now.

        Norms with running statistics must be of one dtype with those, and are. Without ``has_room`` there are no
        gradients.
        """
        return param_spec(
            name,
            self.shards,
            self.main_dtype,
            policy,
            computed_in=self._computed_in or statistics_dtype(next((module for module, _ in self.owners), None)),
            as_computed=as_computed,
            has_gradient=has_room and self.trainable,
            pieces=() if self.extension is None else self.extension.known_pieces(name),
        )

    def take_dtypes(self, spec: ParamSpec) -> None:
        """Compute and reduce in the dtypes of ``spec`` from now on."""
        self.compute_dtype, self.gradient_dtype = spec.compute_dtype, spec.gradient_dtype
        self.reduce_dtype, self.grad_dtype, self.is_split = spec.reduce_dtype, spec.grad_dtype, spec.is_split
        self.offloads_remainder = spec.offloads_remainder
        self.is_cast = not self.is_split and self.extension is None

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's rows."""
        return self.shards.local_shape(self.rank)

    def adopt(self, given: nn.Parameter) -> nn.Parameter:
        """Take over a parameter that the user assigns in this one's place, and return the sharded one for modules.

        Raises ``ValueError`` when its global shape differs, or when it is distributed otherwise.
        """
        refuse_subclass(given, self.name)
        own = self.placement
        if tuple(given.shape) != own.shape:
            raise ValueError(
                f"{self.name}: expected a parameter of shape {own.shape} in its place, found "
                f"{tuple(given.shape)} (rank {self.rank})"
            )
        if own.is_as_before(given):
            self.sharded = self._shard(given)
        elif isinstance(given, DTensor) and (given.device_mesh, given.placements) == (own.mesh, own.placements):
            self.sharded = given
        else:
            raise ValueError(
                f"{self.name}: expected a parameter with {own.placements} on {own.mesh} in its place, found "
                f"{words_of(given)} (rank {self.rank}); redistribute it first"
            )
        self.placed = None
        return self.sharded

    def restore_attributes(self) -> None:
        """Give the DTensor what attributes the user has set on the parameter."""
        for name, value in self.attributes.items():
            vars(self.sharded).setdefault(name, value)

    def add_owner(self, module: nn.Module, attribute: str) -> None:
        """Tie ``module`` to this parameter too: it sees what the others see."""
        self._owners.append(_Owner.of(module, attribute))
        module._parameters[attribute] = self.registered  # type: ignore[assignment]

    def rename(self, name: str) -> None:
        """Take the full name from the root."""
        self.name = name
        if self.extension is not None:
            self.extension.name = name

    def leave_place(self) -> None:
        """Forget where ``local`` was put: it is to be put somewhere else."""
        self.placed = None

    @property
    def main_shard_dtype(self) -> torch.dtype:
        """What the main shard holds: the values, or the lower halves of those that are split."""
        return torch.int16 if self.is_split else self.main_dtype

    def look(self, policy: MixedPrecisionPolicy) -> None:
        """Find out what the parameter's class all-gathers, if it says that itself."""
        if self.extension is not None:
            self.extension.look(self.local, self.owners[0][0], policy)

    def write_extension(self, policy: MixedPrecisionPolicy) -> None:
        """Write what the parameter's class all-gathers, if it says that itself, to the compute shard."""
        if self.extension is not None:
            self.extension.write(self.local, self.owners[0][0], policy, self.compute)

    def place_compute(self, shard: torch.Tensor) -> None:
        """Let ``shard``, ``(chunk_numel,)``, be what is all-gathered; it may be the main shard."""
        self.compute = shard
        if (halves := self._halves) is not None:
            halves.move_high(shard[: self.local.numel()])

    def leave_compute(self) -> None:
        """Copy upper halves of a split master out of the compute shard, whose memory is about to be freed."""
        if (halves := self._halves) is not None:
            halves.move_high(halves.high.clone())
            self.compute = NOWHERE

    @property
    def _halves(self) -> SplitValues | None:
        local = self.local
        return local.split_values if self.is_split and isinstance(local, SplitTensor) else None

    def settle(self) -> bool:
        """Split what was written to a split master into halves, on the current stream; return whether anything was."""
        return self.is_split and (halves := self._halves) is not None and halves.settle()

    @property
    def is_written(self) -> bool:
        """Whether a split master was written since it was last split into halves."""
        return self.is_split and (halves := self._halves) is not None and halves.written is not None

    def place_main(self, place: Place) -> None:
        """Move this rank's rows to ``place``, where the DTensor holds them from now on.

        Those of a class with an all-gather of its own stay in tensors of that class, on the same device.
        """
        if self.extension is not None:
            local = self.local.to(place.arena.device)
            self.sharded._local_tensor = self.placed = local  # type: ignore[attr-defined]
            return
        self.main = place.flat(self.main_shard_dtype, self.shards.chunk_numel)
        with torch.no_grad():
            if self.is_split:
                local = self._split_into(self.main)
            else:
                local = place.tensor(self.main_dtype, self.local_shape)
                local.copy_(values_of(self.local))
        self.sharded._local_tensor = self.placed = local  # type: ignore[attr-defined]
        self._address = local.data_ptr()

    def _split_into(self, main: torch.Tensor) -> torch.Tensor:
        """Return this rank's rows with their lower halves in ``main``; the upper ones await a compute shard."""
        flat = values_of(self.local).flatten()
        values = SplitValues.of(flat, main[: flat.numel()], self.offloads_remainder)
        return SplitTensor(values, self.local_shape, contiguous_stride(self.local_shape))

    def make_grad(self, device: torch.device, place: Place | None = None, guard_nbytes: int = 0) -> None:
        """Make the gradient shard, without memory yet or in ``place``, unless there is one of this kind."""
        numel = self.shards.chunk_numel * (2 if self.main_dtype.is_complex else 1)
        if self.grad_shard is None or not self.grad_shard.fits(numel, self.grad_dtype, device, guard_nbytes):
            self.grad_shard = GradientShard(
                numel, self.grad_dtype, self.local_shape, device, self.placement.dtensor, place, guard_nbytes
            )
        if self.grad_dtype != self.main_dtype:
            self.sharded.grad_dtype = None  # any: torch's own code sets zeros like it

    @property
    def has_own_grad(self) -> bool:
        """Whether what is reduced next is added to ``.grad``: that is the gradient shard, and has no hooks."""
        own, sharded = self.grad_shard, self.sharded
        return own is not None and sharded.grad is own.dtensor and not sharded._backward_hooks

    def take_grad(self) -> None:
        """Get memory for a gradient that is to be ``.grad``; one that the user still holds keeps its memory."""
        assert self.grad_shard is not None
        self.grad_shard.take()

    def pin_grad(self) -> bool:
        """Keep the gradient's memory for recordings. Return False where they would overwrite what the user holds."""
        return self.grad_shard is None or self.grad_shard.pin(adds=self.sharded.grad is self.grad_shard.dtensor)

    def release_grad(self) -> None:
        """Give the gradient's memory back where it is no longer ``.grad``, nor anybody else's."""
        if self.grad_shard is not None and self.sharded.grad is not self.grad_shard.dtensor:
            self.grad_shard.release()

    @property
    def is_grad_read(self) -> bool:
        """Whether what is reduced next is read on the CPU at once: by hooks, or to be added to other ``.grad``."""
        sharded = self.sharded
        hooks = sharded._backward_hooks or getattr(sharded, "_post_accumulate_grad_hooks", None)
        return bool(hooks) or (sharded.grad is not None and not self.has_own_grad)

    def _run_hooks(self) -> None:
        """Replace the gradient that has just been reduced by what the user's hooks return."""
        assert self.grad_shard is not None
        own: torch.Tensor = self.grad_shard.dtensor
        grad = own
        for hook in list((self.sharded._backward_hooks or {}).values()):
            given = hook(grad)
            grad = grad if given is None else given
        if grad is not own:
            own.copy_(grad)

    def deliver_grad(self, was_added: bool) -> None:
        """Set ``.grad`` to the gradient shard, which was just reduced, or add that to another one of the user's.

        Autograd never accumulates into the sharded parameter, so the user's hooks are run here: before, and after.
        """
        own, sharded = self.grad_shard, self.sharded
        assert own is not None
        if not sharded.requires_grad:
            return  # frozen since the forward: no optimizer is to see it
        if sharded._backward_hooks:
            self._run_hooks()
        if not was_added:
            grad = sharded.grad
            if grad is None:
                sharded.grad = own.dtensor
            else:
                local = grad.to_local()  # type: ignore[attr-defined]  # a DTensor
                local.add_(own.dtensor._local_tensor)
        for hook in (getattr(sharded, "_post_accumulate_grad_hooks", None) or {}).values():
            hook(sharded)

    def use_given(self) -> None:
        """Let modules compute on what the user has put in this parameter's place.

        Called where modules are, inside of transforms.
        """
        for module, attribute in self.owners:
            found = module._parameters.get(attribute)
            if found is not None and found is not self.registered and not self.is_mine(found):
                self._stand_in(module, attribute, found)

    def put_given_back(self) -> None:
        """Put back what the user has put there, once modules have computed, for ``functional_call`` to take out."""
        for stand in self._stands:
            if stand.module._parameters.get(stand.attribute) is stand.computed:
                stand.module._parameters[stand.attribute] = stand.given  # type: ignore[assignment]
        self._stands.clear()

    def is_mine(self, found: torch.Tensor | None) -> bool:
        """Return whether ``found`` is the sharded parameter or a slot's full one."""
        mark = vars(found).get("_yafsdp_ownership") if found is not None else None
        return isinstance(mark, ParamMark) and mark.param_ref() is self and not mark.is_replaced

    def _stand_in(self, module: nn.Module, attribute: str, given: torch.Tensor) -> None:
        """Let ``module`` compute on ``given`` as it would on an unsharded parameter: whole, and in ``compute_dtype``.

        Gradients of a given DTensor are averaged over its ranks, as those of sharded parameters are.
        """
        computed = given
        if self.placement.inner_mesh is not None and not self.placement.is_as_before(given):
            raise NotImplementedError(
                f"{self.name}: {words_of(given)} was given in the place of a parameter that was a DTensor before it "
                f"was sharded: give one with {self.placement.inner_placements} on {self.placement.inner_mesh} (rank "
                f"{self.rank})"
            )
        if self.placement.inner_mesh is None and isinstance(given, DTensor):
            computed = given.full_tensor(grad_placements=[Partial("avg")] * given.device_mesh.ndim)
        elif self.placement.inner_mesh is None and any(isinstance(layer, DTensor) for layer in layers_of(given)):
            raise NotImplementedError(
                f"{self.name}: a DTensor was given in its place under a torch.func transform, which cannot gather it: "
                f"give the whole tensor, .full_tensor() before the transform (rank {self.rank})"
            )
        if computed.is_floating_point() and computed.dtype != self.compute_dtype:
            computed = computed.to(self.compute_dtype)
        if computed is not given:
            module._parameters[attribute] = computed  # type: ignore[assignment]
            self._stands.append(_Stand(module, attribute, given, computed))


def register(params: Sequence[ShardedParam], values: Sequence[nn.Parameter]) -> list[ShardedParam]:
    """Make ``values``, the sharded parameters or a slot's full ones, what every owning module sees of ``params``.

    A tensor that the user has put there (``torch.func.functional_call``) stays. Returns the parameters for which
    modules are to compute on such a one: ``use_given`` is to come before they do. Runs four times per unit and step.
    """
    given = []
    for p, value in zip(params, values, strict=True):
        if p._stands:
            p.put_given_back()
        before = p.registered
        for ref, attribute, keeps_dict_only in p._owners:
            module = ref()
            if module is None:
                continue
            parameters = module._parameters
            found = parameters.get(attribute)
            if found is not before and not p.is_mine(found):
                if found is not None and value is not p.sharded and p not in given:
                    given.append(p)
            elif keeps_dict_only:
                parameters[attribute] = value
            else:
                setattr(module, attribute, value)
        p.registered = value
    return given
