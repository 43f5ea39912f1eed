"""One step of a model on tensors without memory: what its activations and gradients take, when, and what it computes.

Owns how a model is run so: parameters are replaced for the time of the trace by ones that have no memory, the hooks of
a sharded model are left out, and what the runtime itself does around a unit is done here on the same timeline. The
module's own code runs, once: activation checkpointing, hooks and control flow are what they are.

[Note: what is traced]
Parameters are in the dtype that the unit computes in, and not counted: they lie in the plan's slots. So do gradients
that linear layers write in place; others count from the operation that makes them to the copy into the slot. Inputs are
cast as the unit's policy says. A gradient shard is born where the unit's reduction takes it.

Tensors say that they are on the CPU, since PyTorch without CUDA has no others that autograd takes; what a GPU does
otherwise is in ``on_gpu.py``. Compiled modules run as they were written, since what a compiler keeps is known only once
it has run.
Offloaded activations leave and come back as in a run (``offloaded.py``).
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from yafsdp_like.memory.layout import aligned
from yafsdp_like.ops import linear
from yafsdp_like.shard.forecast.ghosts import Ghosts, unlogged
from yafsdp_like.shard.forecast.offloaded import TracedOffload, stand_in
from yafsdp_like.shard.forecast.on_gpu import GPU
from yafsdp_like.shard.forecast.storages import BLOCK_NBYTES, OperationCounts, StepPlace, StorageMode, StorageTimeline
from yafsdp_like.shard.forecast.substitutes import Substitutes
from yafsdp_like.shard.runtime.nested import cast_floating, map_tensors, needs_cast, tensors_in
from yafsdp_like.shard.runtime.running import backward_task
from yafsdp_like.shard.runtime.unit_state import Unit
from yafsdp_like.shard.runtime.watching import NOTHING, Watched, differentiable, watch_inputs, watch_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from yafsdp_like.shard.forecast.quantities import Phase, WorkKind
    from yafsdp_like.shard.forecast.traced_units import TracedUnit

CPU = torch.device("cpu")
ACTIVATIONS, HEAD, GRADIENTS = "activations", "logits and loss", "gradient shards"


Args = tuple[Any, ...]  # what a forward is called with


@dataclass(frozen=True)
class ExampleBatch:
    """What one forward is called with, and how a loss comes of what it returns.

    Tensors may be real ones or on the meta device; only shapes and dtypes count. ``loss`` maps the output to a scalar;
    by default that is the output itself, or its ``loss``, and where there is none, the sum of what needs a gradient.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class StepOptions:
    """What of a step changes when memory is taken."""

    on_gpu: bool = True  # kernels as a GPU has them; else as the CPU's operations
    accumulates: bool = False  # gradients of earlier backwards are held already
    update_in_backward: bool = False


@dataclass(frozen=True)
class Trace:
    """A forward and a backward: memory over time, work by unit, phase and kind, and what was assumed."""

    timeline: StorageTimeline
    work: dict[tuple[str, Phase, WorkKind], OperationCounts]
    notes: tuple[str, ...] = ()
    gradients: dict[int, tuple[str, int]] = field(default_factory=dict)  # numbers of gradient shards: unit, parameter
    copied: dict[tuple[str, str], int] = field(default_factory=dict)  # bytes of activations: unit, "out" or "in"
    host_nbytes: int = 0  # in which offloaded activations wait

    def resharded(self, units: Iterable[TracedUnit]) -> Trace:
        """Return the trace of the same units over another number of ranks: only gradient shards have other sizes."""
        by_name, born = {unit.name: unit for unit in units}, list(self.timeline.born)
        for number, (unit, k) in self.gradients.items():
            born[number] = replace(born[number], nbytes=aligned(by_name[unit].gradient_nbytes(k), BLOCK_NBYTES))
        return replace(self, timeline=replace(self.timeline, born=born))

    def levels(self, phase: Phase) -> Iterator[tuple[StepPlace, dict[str, int]]]:
        """Yield live bytes by category after each event of one phase."""
        return ((place, live) for place, live in self.timeline.levels() if place.phase == phase)

    def peak(self, phase: Phase) -> tuple[StepPlace, dict[str, int]]:
        """Return where in a phase most bytes are live, and how many by category."""
        best, most = (StepPlace(phase=phase), dict[str, int]()), -1
        for place, live in self.levels(phase):
            if (total := sum(live.values())) > most:
                best, most = (place, {name: nbytes for name, nbytes in live.items() if nbytes}), total
        return best

    def end(self, phase: Phase) -> dict[str, int]:
        """Return the live bytes by category at the end of a phase: after forward, what backward needs."""
        last: dict[str, int] = {}
        for _, live in self.levels(phase):
            last = dict(live)
        return {name: nbytes for name, nbytes in last.items() if nbytes}


def trace_step(model: nn.Module, units: Sequence[TracedUnit], batch: ExampleBatch, options: StepOptions) -> Trace:
    """Run a forward and a backward of ``model`` without memory, and return what they would take and compute.

    The model is unchanged afterwards. Raises what its forward raises, and ``ValueError`` where no loss comes of it.
    """
    try:
        return _trace(model, units, batch, options, Ghosts())
    except Exception as error:  # of code that mixes in tensors with memory, say, which fake tensors allow
        try:
            with unlogged(FakeTensorMode.__module__):
                return _trace(model, units, batch, options, Ghosts(FakeTensorMode(allow_non_fake_inputs=True)))
        except Exception:
            raise error from None


def _trace(
    model: nn.Module, units: Sequence[TracedUnit], batch: ExampleBatch, options: StepOptions, ghosts: Ghosts
) -> Trace:
    mode = StorageMode()
    step = _Step(units, mode, options)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        notes, offloaded = stack.enter_context(_without_memory(model, units, step, ghosts))
        stack.enter_context(ghosts.factories())
        stack.enter_context(mode)
        stack.enter_context(Substitutes(mode, GPU if options.on_gpu else {}))
        stack.enter_context(torch.enable_grad())
        args, kwargs = map_tensors(lambda t: ghosts.like(t, counted_by=mode), (batch.args, batch.kwargs))
        step.run(model, args, kwargs, batch.loss)
        mode.close()
        del args, kwargs
    copied = Counter[tuple[str, str]]()  # adds up what several calls offload of one unit
    for one in offloaded:
        copied.update(one.copied)
    host_nbytes = sum(one.host_nbytes for one in offloaded)
    return Trace(mode.timeline.in_place(), mode.work, tuple(notes), step.gradients, copied, host_nbytes)


class _Step:
    """Where the traced step is, and which gradients have arrived."""

    def __init__(self, units: Sequence[TracedUnit], mode: StorageMode, options: StepOptions) -> None:
        self.mode, self.options = mode, options
        self.root = next((unit for unit in units if unit.name == "root"), None)
        self._units = {unit.name: unit for unit in units}
        self._num_inner = sum(unit is not self.root for unit in units)
        self._in_forward: list[str] = []
        self._in_backward: list[str] = []
        self._ended: set[str] = set()  # of the inner units, in forward
        self._entered: set[str] = set()  # of the inner units, in backward
        self._arrived: dict[str, set[int]] = {}
        self._reduced: dict[str, set[int]] = {unit.name: set() for unit in units}
        self._uses: dict[str, int] = {}  # forwards whose backward is still to come
        self._updated: list[int] = []  # memory of gradients that an update in backward has read
        self.gradients: dict[int, tuple[str, int]] = {}  # see ``Trace``

    def run(self, model: nn.Module, args: Any, kwargs: Any, loss_of: Callable[[Any], Tensor] | None) -> None:
        """Run both, and reduce at the end what waits for it."""
        if self.options.accumulates:
            for unit in self._units.values():
                self._take(unit, [k for k, p in enumerate(unit.params) if p.has_gradient])
        self._settle("forward")
        output = model(*args, **kwargs)
        loss = (loss_of or _loss_in)(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"expected a scalar loss that needs a gradient, found {_described(loss)}")
        del output
        self._settle("backward")
        torch.autograd.backward(loss)
        for unit in self._units.values():
            self._reduce(unit)
        self._give_back()

    # --- where it is ---

    def _settle(self, phase: Phase) -> None:
        running = self._in_backward if phase == "backward" else self._in_forward
        unit = running[-1] if running else (self.root.name if self.root is not None else "")
        inner = self._entered if phase == "backward" else self._ended
        is_head = not inner if phase == "backward" else len(inner) == self._num_inner
        by_root = (not running or running[-1] == "root") and self._num_inner > 0
        self.mode.place = StepPlace(unit, phase, HEAD if is_head and by_root else ACTIVATIONS)

    def begin_forward(self, unit: TracedUnit) -> None:
        """Note that a unit's forward runs."""
        self._in_forward.append(unit.name)
        self._settle("forward")

    def end_forward(self, unit: TracedUnit) -> None:
        """Note that it is over."""
        self._in_forward.remove(unit.name)
        if unit is not self.root:
            self._ended.add(unit.name)
        self._settle("forward")

    def expect(self, unit: TracedUnit) -> None:
        """Note that a forward will have a backward."""
        self._uses[unit.name] = self._uses.get(unit.name, 0) + 1

    def start_backward(self, unit: TracedUnit) -> None:
        """Note that a gradient enters a unit."""
        if unit.name not in self._in_backward:
            self._in_backward.append(unit.name)
            if unit is not self.root:
                self._entered.add(unit.name)
        self._settle("backward")

    def end_backward(self, unit: TracedUnit) -> None:
        """Note that a unit has computed the gradients of its inputs: its own are reduced, unless a use is to come."""
        self._uses[unit.name] -= 1
        if unit.name in self._in_backward:
            self._in_backward.remove(unit.name)
        if self._uses[unit.name] <= 0:
            self._reduce(unit)
        self._settle("backward")

    # --- gradients ---

    def sink_is_open(self, unit: TracedUnit, k: int) -> bool:
        """Whether a linear layer may write parameter ``k``'s gradient into the slot."""
        p = unit.params[k]
        written = k in self._arrived.get(unit.name, ())
        return p.gradient_dtype is p.compute_dtype and self._uses.get(unit.name, 0) <= 1 and not written

    def arrive(self, unit: TracedUnit, k: int) -> None:
        """Note that a gradient is complete, in the slot."""
        arrived = self._arrived.setdefault(unit.name, set())
        arrived.add(k)
        if k in unit.early:
            self._take(unit, sorted(arrived))

    def _reduce(self, unit: TracedUnit) -> None:
        arrived = self._arrived.pop(unit.name, set())
        if arrived:
            self._give_back()
        self._take(unit, sorted(arrived))

    def _take(self, unit: TracedUnit, params: Sequence[int]) -> None:
        for k in params:
            if k not in self._reduced[unit.name] and not unit.is_on_host:
                number = self.mode.take(unit.gradient_nbytes(k), GRADIENTS)
                self.gradients[number] = unit.name, k
                if self.options.update_in_backward:
                    self._updated.append(number)
            self._reduced[unit.name].add(k)

    def _give_back(self) -> None:
        while self._updated:
            self.mode.give_back(self._updated.pop())


def _loss_in(output: Any) -> Tensor:
    """Return a scalar of what a forward returned: see ``ExampleBatch``."""
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Tensor) and output.numel() == 1:
        return output
    differentiable_ones = [t for t in tensors_in(output) if t.requires_grad]
    if not differentiable_ones:
        raise ValueError(f"nothing in what the forward returned needs a gradient: found {_described(output)}")
    total: Tensor = torch.stack([t.sum() for t in differentiable_ones]).sum()
    return total


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# --- the model without memory ---


class _Sink:
    """A place in a gradient slot that is in the plan, for ``ops.linear``."""

    def __init__(self, step: _Step, unit: TracedUnit, k: int, place: Tensor) -> None:
        self._step, self._unit, self._k, self._place = step, unit, k, place

    def open(self) -> tuple[Tensor, bool] | None:
        """Return the place, where the runtime would."""
        return (self._place, False) if self._step.sink_is_open(self._unit, self._k) else None

    def withdraw(self) -> Tensor | None:
        """Return nothing: sums of several uses go through autograd."""
        return None

    def check_readable(self) -> None:
        """Find nothing wrong."""


@contextmanager
def _without_memory(
    model: nn.Module, units: Sequence[TracedUnit], step: _Step, ghosts: Ghosts
) -> Iterator[tuple[list[str], list[TracedOffload]]]:
    """Let the model run on ghosts, with the trace's hooks instead of the runtime's.

    Yields what is to be noted, and what stands for offloaded activations.
    """
    modules = list(model.modules())
    registries: list[dict[Any, Any]] = [
        registry for m in modules for registry in (m._parameters, m._buffers, m._forward_pre_hooks, m._forward_hooks)
    ]
    saved = [dict(registry) for registry in registries]
    installed = [m for m in modules if "forward" not in vars(m)]
    handles: list[Any] = []
    try:
        for module in modules:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if _is_runtimes(hook)]:
                    del hooks[key]
        offloaded = stand_in(modules, step.mode, ghosts.bytes)
        _replace_parameters(modules, units, step, ghosts)
        for module in modules:
            linear.install(module)
        for unit in units:
            for module in unit.modules:
                handles += _watch(module, unit, step)
        yield _notes(modules), list(offloaded.values())
    finally:
        for handle in handles:
            handle.remove()
        for module in installed:
            linear.uninstall(module)
        for registry, before in zip(registries, saved, strict=True):
            registry.clear()
            registry.update(before)


def _is_runtimes(hook: Any) -> bool:
    """Whether a hook is one of ``shard/hooks.py``."""
    return isinstance(hook, partial) and bool(hook.args) and isinstance(hook.args[0], Unit)


def _replace_parameters(modules: Sequence[nn.Module], units: Sequence[TracedUnit], step: _Step, ghosts: Ghosts) -> None:
    made: dict[int, nn.Parameter] = {}
    for unit in units:
        for k, (p, places) in enumerate(zip(unit.params, unit.places, strict=True)):
            ghost = nn.Parameter(ghosts.make(_shaped(p.shards.shape), p.compute_dtype), p.has_gradient)
            step.mode.ignore(ghost)
            if p.has_gradient:
                ghost.register_post_accumulate_grad_hook(partial(_take_gradient, step, unit, k))
                if ghost.dim() == 2 and not ghost.is_complex():
                    place = ghosts.make(ghost, p.gradient_dtype)
                    step.mode.ignore(place)
                    linear.attach(ghost, _Sink(step, unit, k, place))
            for module, name in places:
                made[id(module._parameters[name])] = ghost
                module._parameters[name] = ghost
    ours = {id(ghost) for ghost in made.values()}
    for module in modules:
        for name, param in module._parameters.items():
            if param is not None and id(param) not in ours:  # tied elsewhere, or not sharded
                if id(param) not in made:
                    made[id(param)] = nn.Parameter(ghosts.make(param, param.dtype), param.requires_grad)
                    step.mode.ignore(made[id(param)])
                module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = stands_for = ghosts.make(buffer, buffer.dtype)
                step.mode.ignore(stands_for)


def _shaped(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, device="meta")


def _take_gradient(step: _Step, unit: TracedUnit, k: int, param: Tensor) -> None:
    """Copy a gradient that autograd has completed into the slot, if it is not there; it lives until then."""
    grad, param.grad = param.grad, None
    step.arrive(unit, k)
    del grad


def _notes(modules: Sequence[nn.Module]) -> list[str]:
    compiled = any(vars(m).get("_compiled_call_impl") is not None or hasattr(m, "_orig_mod") for m in modules)
    words = "compiled modules are traced as they were written: most take less once they are compiled"
    return [words] if compiled else []


# --- what the runtime does around a unit ---


def _watch(module: nn.Module, unit: TracedUnit, step: _Step) -> list[Any]:
    calls: list[tuple[bool, Watched]] = []  # whether the trace's forward runs, not a checkpoint's again
    policy = unit.policy.mp

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        inputs: Any = (args, kwargs)
        if policy.cast_forward_inputs and needs_cast(tensors_in(inputs), policy.param_dtype):
            inputs = cast_floating(inputs, policy.param_dtype)
        is_new = backward_task() is None
        watched = NOTHING
        if is_new:
            step.begin_forward(unit)
        if is_new and torch.is_grad_enabled():
            step.expect(unit)
            if needing := differentiable(tensors_in(inputs)):
                inputs, watched = watch_inputs(unit.name, partial(step.end_backward, unit), inputs, needing)
        calls.append((is_new, watched))
        return inputs

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        is_new, watched = calls.pop()
        if is_new:
            watched.adopt_writes(unit.name, lambda _: step.start_backward(unit))
            output = watch_outputs(lambda _: step.start_backward(unit), output, watched)
            step.end_forward(unit)
        return cast_floating(output, policy.output_dtype)

    return [
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after),
    ]
