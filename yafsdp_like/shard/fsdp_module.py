"""The methods of a sharded module: those of FSDP2's ``FSDPModule``, and this runtime's own.

Owns what users can ask of a module after ``fully_shard`` and set on it. How it is sharded is ``api.py``'s, what its
forward and backward do the hooks'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, overload

import torch.distributed.fsdp
from torch import nn

from yafsdp_like.memory.streams import GATHER, Event, UserStream
from yafsdp_like.shard.drop_in import ShardState, accept, loading_advice, refuse_others
from yafsdp_like.shard.forecast.traced_units import read_off
from yafsdp_like.shard.forecast.training_forecast import ForecastOptions, forecast_training
from yafsdp_like.shard.hooks import abandon, finish_accumulating
from yafsdp_like.shard.memory_report import ComparedMemory, MemoryReport, compared
from yafsdp_like.shard.runtime.engine import ShardEngine, engine_for, engine_of
from yafsdp_like.shard.runtime.rebuild import Report
from yafsdp_like.shard.runtime.running import backward_task
from yafsdp_like.shard.runtime.unit_state import Unit, units_of
from yafsdp_like.shard.runtime.unit_tree import unit_tree_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from yafsdp_like.comm.custom import Hook
    from yafsdp_like.memory.plan import MemoryPlan
    from yafsdp_like.shard.forecast.activations import Args, ExampleBatch
    from yafsdp_like.shard.forecast.quantities import TrainingForecast

    Base = nn.Module  # at run time the sharded module's class adds it
else:
    Base = object


class UnshardHandle(torch.distributed.fsdp.UnshardHandle):
    """What ``unshard(async_op=True)`` returns."""

    def __init__(self, engine: ShardEngine, units: Sequence[Unit]) -> None:
        self._engine, self._units = engine, units

    def wait(self) -> None:
        """Register the full parameters and make the current stream, not the CPU, wait for the all-gather."""
        for unit in self._units:
            self._engine.params.unshard(unit.gather_slot, refresh=True)


class GradientReductionHandle:
    """What ``finalize_backward(async_op=True)`` returns."""

    def __init__(self, engine: ShardEngine) -> None:
        self._engine = engine

    def wait(self) -> None:
        """Make the current stream, not the CPU, wait for all reductions: what follows sees every gradient."""
        self._engine.gradients.wait_for_reductions()


@refuse_others
class FSDPModule(Base):
    """The methods that a module has after ``fully_shard``, beside its own.

    Modules compute on full parameters, which are all-gathered before forward and backward into the slots of a memory
    plan that is made at the first forward; outside of them, modules register the sharded ``DTensor`` parameters.

    ``.grad`` of a sharded parameter is the same DTensor in every step. Once it is set to None, the next forward gives
    its memory back to PyTorch's allocator, and the next backward takes memory for it again. If the gradient, or a
    tensor that shares its bytes (``detach()``, ``view``, ``to_local()``), is still referenced then, that keeps its
    values and its memory, and the next gradient is another DTensor.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make a plain module, of the class before sharding: slicing a sharded container calls this."""
        plain: Any = cls.__mro__[2]
        return plain(*args, **kwargs)

    @overload
    def memory_plan(self) -> MemoryPlan: ...
    @overload
    def memory_plan(self, batch: ExampleBatch | Args, options: ForecastOptions = ...) -> TrainingForecast: ...
    def memory_plan(self, batch: Any = None, options: ForecastOptions = ForecastOptions()) -> Any:  # noqa: B008 (frozen)
        """Return every region of the runtime on this rank, in bytes; with a batch, all that a step takes, by phase.

        Changes nothing. Before the first forward this is taken for the root, and may still be on the meta device. With
        ``(tokens, targets)``, say, or an ``ExampleBatch``, a step is traced without memory (``TrainingForecast``).
        """
        engine = engine_of(self._unit())
        tree = unit_tree_of(self) if engine is None else engine.tree
        if batch is not None:
            layout = tree.plan() if engine is None else engine.memory.next_layout()
            return forecast_training(self, read_off(tree, layout), batch, options)
        return tree.plan().plan if engine is None else engine.memory.plan()

    def memory_report(
        self,
        batch: ExampleBatch | Args | None = None,
        options: ForecastOptions = ForecastOptions(),  # noqa: B008 (frozen)
        optimizer: torch.optim.Optimizer | None = None,
    ) -> MemoryReport:
        """Return the bytes held now beside those planned, and what departed from the plan: spills, evictions.

        ``print`` it for a table. With ``batch``, and ``options`` as ``memory_plan`` takes them, what a step was to take
        stands beside the peaks that PyTorch's allocator has had since they were reset; on a CPU nobody measures
        activations. With ``optimizer`` its states are counted. Changes nothing.
        """
        engine = engine_of(self._unit())
        if engine is not None:
            found = engine.rebuild.report()
        else:
            units = self._units(recurse=True)
            on_device = sum(unit.arena.nbytes for unit in units if not unit.is_on_host)
            found = Report(on_device, (), 0, 0, sum(unit.host_nbytes for unit in units))
        rows: tuple[ComparedMemory, ...] = ()
        if engine is not None or batch is not None:
            forecast = None if batch is None else self.memory_plan(batch, options)
            plan = self.memory_plan() if forecast is None else forecast.plan
            rows = compared(self, plan, forecast, optimizer)
        return MemoryReport(**vars(found), rows=rows)

    # --- running

    def unshard(self, async_op: bool = False) -> UnshardHandle | None:
        """All-gather this module's own parameters, which stay until ``reshard`` or the end of its next backward.

        With ``async_op`` the parameters are registered only by the returned handle's ``wait()``.
        """
        engine, units = self._engine(), units_of(self)
        engine.rebuild.if_changed()
        engine.params.publish()
        for unit in units:
            if blockers := engine.params.blockers(unit.gather_slot):
                found = [b.unit.name for b in blockers]
                engine.params.isolate(unit, f"unshard() was called while {found} is unsharded")
            elif waiting := engine.params.others_awaiting_backward(unit.gather_slot):
                engine.params.isolate(unit, f"unshard() was called while {waiting} awaits its backward")
        handle = UnshardHandle(engine, units)
        if async_op:
            for unit in units:
                engine.params.prefetch(unit, refresh=True)
            return handle
        handle.wait()
        return None

    def reshard(self) -> None:
        """Release this module's own full parameters and register the sharded ones."""
        for unit in units_of(self):
            if (engine := engine_of(unit)) is not None:
                engine.params.reshard(unit)

    def mark_weights_changed(self) -> None:
        """Cast the sharded parameters again in the next forward.

        Needed only between a step of this package's ``AdamW`` and the next forward, after writes to sharded parameters
        that PyTorch does not count: through ``.data``, or to many in one ``torch._foreach`` call.
        """
        for unit in self._units(recurse=True):
            unit.freshness.main_shards_written()

    def set_debug_mode(self, debug: bool, own_slots: bool = True) -> None:
        """Set whether memory is checked for reads and writes where there should be none.

        Released slots read as NaN (integers as 0x6b bytes), and a forward that turns finite inputs into NaN is an
        error: it reads a view of parameters that was kept outside of their unit's forward. Guard bytes lie around every
        parameter, in slots and shards, and behind every gradient; they are checked when a slot is taken and released,
        at the begin and end of forwards and backwards, and after optimizers' steps, as is that nobody has written
        to a released slot, and that no two units hold the same bytes. A ``RuntimeError`` names the units, the rank, and
        what ran since memory was last intact.

        Slow, since it waits for the GPU all the time, and large: each unit has an all-gather slot of its own, unless
        ``own_slots`` is False, which leaves places as planned and finds errors of the schedule. To be called on
        the root, between steps, on all ranks. The environment variable ``YAFSDP_DEBUG=1`` sets it for all models, and
        ``YAFSDP_DEBUG=planned`` without slots of their own. It is set for all models that share slots.
        """
        engine = self._engine()
        for one in (engine, *engine.beside):
            one.params.set_debug(debug, own_slots)

    def reset_iter_state(self) -> None:
        """Forget a forward or backward that raised, as the next forward does too, and drop unsynchronized gradients."""
        abandon(self._engine())

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Set whether backward reduce-scatters gradients, or accumulates them unsharded until a backward that does.

        The first False gives each unit a gradient slot of its own, as large as its full gradients, at the next forward.
        """
        for unit in self._units(recurse):
            unit.set_policy(requires_gradient_sync=requires_gradient_sync)
            if not requires_gradient_sync:
                unit.need(own_gradient_slot=True, unsynced_gradients=True)
        if requires_gradient_sync:
            self.set_requires_all_reduce(True, recurse=recurse)

    def set_reduce_scatter_unused_params(self, reduce_scatter_unused_params: bool, *, recurse: bool = True) -> None:
        """Set whether a synchronized backward also reduces trainable parameters without a gradient, as zeros.

        For ranks that use different parameters of a unit, or units that others do not, in one step. ``.grad`` is then
        never None after it. Must be the same on all ranks; over a process group, ranks must still all-gather the same
        units.
        """
        for unit in self._units(recurse):
            unit.set_policy(reduces_unused=reduce_scatter_unused_params)

    def set_requires_all_reduce(self, requires_all_reduce: bool, *, recurse: bool = True) -> None:
        """Set whether backward averages gradients over replicas, or only inside each, until a backward that does.

        ``.grad`` holds those of this replica meanwhile, where FSDP2 keeps them apart from it: do not drop it. Without
        replicas (a 1-D mesh) there is nothing to average.
        """
        for unit in self._units(recurse):
            if not requires_all_reduce:
                unit.set_policy(averaged="nothing")
            elif unit.policy.averaged == "nothing":
                unit.set_policy(averaged="all")

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Set whether the next backward's end waits for its reductions: gradients are incomplete until one does."""
        self._engine().gradients.set_is_last_backward(is_last_backward)

    def set_manual_backward_finalization(self, enabled: bool) -> None:
        """Set whether ``finalize_backward`` ends backwards: until it is called, gradients are incomplete.

        To be called on the root, outside of backwards. Gradients are reduced in backward all the same, where
        ``set_requires_gradient_sync`` says so.
        """
        self._engine().gradients.finalize_by_user(enabled)

    def finalize_backward(self, *, async_op: bool = False) -> GradientReductionHandle | None:
        """Reduce gradients of backwards without synchronization, release units, and wait for all reductions.

        For the root, after a backward, with ``set_requires_gradient_sync(True)``: units for which it is False keep
        their gradients. With ``async_op`` the waiting is left to the returned handle's ``wait()``.
        """
        if backward_task() is not None:
            raise RuntimeError("finalize_backward() was called in a backward: call it once backward() has returned")
        engine = self._engine()
        finish_accumulating(engine, [unit for unit in engine.units if unit.policy.requires_gradient_sync])
        handle = GradientReductionHandle(engine)
        if async_op:
            return handle
        handle.wait()
        return None

    def set_reshard_after_forward(self, reshard_after_forward: bool, recurse: bool = True) -> None:
        """Override the argument of ``fully_shard``; after the first forward as a hint: the plan may have no room.

        Raises ``ValueError`` for what is no bool.
        """
        if not isinstance(reshard_after_forward, bool):
            raise ValueError(f"reshard_after_forward should be a bool, got {type(reshard_after_forward)}")
        for unit in self._units(recurse):
            unit.set_policy(reshard_after_forward=reshard_after_forward, forward_ranks=0)
            unit.use_forward_shard(())

    def set_reshard_after_backward(self, reshard_after_backward: bool, *, recurse: bool = True) -> None:
        """Set whether parameters are released after backward; after the first forward a hint, as above."""
        for unit in self._units(recurse):
            unit.set_policy(reshard_after_backward=reshard_after_backward)

    def set_keep_unsharded_storage(self, keep: bool, *, recurse: bool = True) -> None:
        """Accept both: full parameters have the same addresses in every step, in slots that units share by turns."""

    def set_unshard_in_backward(self, unshard_in_backward: bool) -> None:
        """Set whether this module's backward reads its parameters; that of an embedding, say, does not."""
        for unit in units_of(self):
            unit.set_policy(unshard_in_backward=unshard_in_backward)

    def set_modules_to_forward_prefetch(self, modules: Sequence[FSDPModule]) -> None:
        """Prefetch ``modules`` when this one's forward starts, instead of the next. Set before the plan, it widens it.

        Raises ``ValueError`` for modules that are not sharded.
        """
        for unit in units_of(self):
            unit.prefetch_in_forward(_units_to_prefetch(modules))

    def set_modules_to_backward_prefetch(self, modules: Sequence[FSDPModule]) -> None:
        """Prefetch ``modules`` when this one's backward starts, instead of the next. Set before the plan, it widens it.

        Raises ``ValueError`` for modules that are not sharded.
        """
        for unit in units_of(self):
            unit.prefetch_in_backward(_units_to_prefetch(modules))

    def set_gradient_divide_factor(self, factor: float) -> None:
        """Divide this module's own gradients by ``factor`` instead of the number of ranks."""
        for unit in units_of(self):
            unit.set_policy(gradient_divisor=factor)

    def set_reduce_scatter_divide_factor(self, factor: float) -> None:
        """Do the same under FSDP2's former name of ``set_gradient_divide_factor``."""
        self.set_gradient_divide_factor(factor)

    def set_force_sum_reduction_for_comms(self, enable: bool) -> None:
        """Set whether gradients are reduced with sums and divided separately, for backends without a mean."""
        for unit in units_of(self):
            unit.set_policy(sum_only=enable)

    def set_post_optim_event(self, event: Event) -> None:
        """Make all-gathers of the next forward wait for ``event`` too (as for the current stream in any case)."""
        self._engine().streams.wait(GATHER, event)

    # --- communication

    def set_custom_all_gather(self, comm: Any) -> None:
        """All-gather this module's own parameters by ``comm``, an ``AllGather`` of FSDP2, over their process group.

        It is called once for each dtype, with flat buffers from its ``allocate``, which are in no plan. To be set
        before the first forward (``RuntimeError``), as the next two.
        """
        for unit in units_of(self):
            unit.customize(all_gather=comm)

    def set_custom_reduce_scatter(self, comm: Any) -> None:
        """Reduce-scatter this module's own gradients by ``comm``, a ``ReduceScatter`` of FSDP2, in the same way."""
        for unit in units_of(self):
            unit.customize(reduce_scatter=comm)

    def set_all_reduce_hook(self, hook: Hook, *, stream: UserStream | None = None) -> None:
        """Call ``hook`` with this module's reduced gradients, to reduce them further in place, on ``stream`` if given.

        Once for each parameter, with a flat tensor in ``reduce_dtype``, before it is divided and added to ``.grad``: as
        FSDP2 does, but for its one buffer. On a 2-D mesh after replicas were averaged, where ``stream`` is an error.
        """
        if stream is not None and any(unit.mesh.ndim == 2 for unit in units_of(self)):
            raise ValueError("stream cannot be set when using native HSDP")
        for unit in units_of(self):
            unit.customize(hook=hook, stream=stream)

    def set_separate_reduce_scatter_group(self, enable: bool = True, *, recurse: bool = True) -> None:
        """Accept it: reductions always have a communicator of their own. Warns that False does nothing."""
        if not enable:
            accept("set_separate_reduce_scatter_group(False)", "reductions always have a communicator of their own")

    def set_reduce_scatter_max_input_buffers(self, max_input_buffers: int, *, recurse: bool = True) -> None:
        """Set how many gradient slots backward may fill before it waits for a reduction: 1 beside its own by default.

        Set before the plan, it widens that; the largest number of any unit counts, as in FSDP2. Raises ``TypeError``
        for what is no int, ``ValueError`` below 1.
        """
        if isinstance(max_input_buffers, bool) or not isinstance(max_input_buffers, int):
            raise TypeError(f"max_input_buffers must be an int, got {type(max_input_buffers).__name__}")
        if max_input_buffers < 1:
            raise ValueError(f"max_input_buffers must be a positive int, got {max_input_buffers}")
        for unit in self._units(recurse):
            unit.set_policy(reductions_in_flight=max_input_buffers)

    def set_allocate_memory_from_process_group_for_comm(self, enable: bool) -> None:
        """Accept it, with a warning: collectives read and write shards and slots, which are in the plan already."""
        self._refuse_custom("set_allocate_memory_from_process_group_for_comm")
        if enable:
            accept("set_allocate_memory_from_process_group_for_comm", "collectives work on planned memory, in place")

    def set_symm_mem_for_comm(self, backend: str = "NCCL") -> None:
        """Accept it, with a warning: GPUs of one host map each other's memory where they can, see ``comm/choice.py``.

        Raises ``ValueError`` for another backend than FSDP2's.
        """
        if backend != "NCCL":
            raise ValueError(f'expected backend to be "NCCL", found {backend!r}')
        self._refuse_custom("set_symm_mem_for_comm")
        accept("set_symm_mem_for_comm", 'GPUs of one host map each other\'s memory already (transport="peer")')

    def _refuse_custom(self, method: str) -> None:
        if moves := self._unit().custom.moves:
            raise AssertionError(f"cannot call {method}() when a collective is custom: {', '.join(moves)}")

    # --- nn.Module

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as any module does; where that is an error, say what differs first, and how to load whole tensors."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            if advice := loading_advice(self, state_dict):
                raise RuntimeError(f"{error}\n{advice}") from error
            raise

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Apply ``.to()``, ``.to_empty()`` and the like to the sharded parameters; put these back into the arena."""
        self.reshard()
        with torch.inference_mode(False):  # whose tensors count no writes, and could not be trained
            result = super()._apply(fn, recurse)
            for unit in units_of(self):
                unit.materialize()
        return result

    def _get_fsdp_state(self) -> ShardState:
        """Return what torch's own functions ask for."""
        state = ShardState()
        state.unit = self._unit()
        return state

    def _unit(self) -> Unit:
        return units_of(self)[0]

    def _units(self, recurse: bool) -> list[Unit]:
        modules = self.modules() if recurse else [self]
        return list(dict.fromkeys(unit for m in modules for unit in units_of(m)))

    def _engine(self) -> ShardEngine:
        return engine_for(self._unit(), self)


def _units_to_prefetch(modules: Sequence[Any]) -> list[Unit]:
    for module in modules:
        if not isinstance(module, FSDPModule):
            raise ValueError(f"Expects FSDPModule but got {type(module)}: {module}")
    return [unit for module in modules for unit in units_of(module)]
