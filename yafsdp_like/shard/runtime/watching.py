"""Hooks of autograd on a unit's backward: that a gradient is about to enter it, and that the last one has left it.

Owns the nodes and hooks on a unit's inputs and outputs. What is then done is said by the caller (``start``, ``end``).

[Note: inputs that a unit changes]
A unit's modules see aliases of its inputs: other tensors on the same bytes, with the same version counter, behind one
node that calls ``end``. They are no views to autograd, which refuses in-place work on views out of a custom function.
Such work changes the alias' history but not that of the tensor which the caller holds, so after forward that one takes
the alias' history over, as it would have without a node between the two. An input that is returned is given back as
the tensor that it was.

[Note: outputs that are changed later]
A hook on a view is lost when in-place work gives the view another history; one on the tensor that it is a view of stays
with the operation that computed it, behind which the unit's own backward begins.

[Note: functorch]
Under ``torch.func`` an output is wrapped once per transform, and each layer has a graph of its own, which may be run
backward: so all layers are watched. ``torch.func`` computes every gradient in such a way that it could be
differentiated again. That would read parameters which are no longer unsharded, so it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._C import _functorch
from torch._C._autograd import CreationMeta, _get_creation_meta
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from yafsdp_like.shard.runtime.held import replace_held
from yafsdp_like.shard.runtime.nested import layers_of, map_tensors

Start = Callable[[bool], None]  # its argument: gradients of the gradients are prepared for, but refused later


class Watched:
    """The inputs of one forward that need gradients: as they were ``given``, and as the modules have ``seen`` them."""

    __slots__ = ("_inputs", "_written")

    def __init__(self, given: Sequence[torch.Tensor] = (), seen: Sequence[torch.Tensor] = ()) -> None:
        self._inputs = [(g, s, g._version) for g, s in zip(given, seen, strict=True)]
        self._written: list[torch.Tensor] = []  # those that the modules have seen, and written

    def adopt_writes(self, name: str, start: Start) -> None:
        """Give inputs that unit ``name`` wrote in its forward the history of what it wrote.

        Gradients enter that by way of ``start``.
        """
        changed = [(given, seen) for given, seen, version in self._inputs if given._version != version]
        for given, seen in changed:
            if type(seen.grad_fn) is not _END_NODE:
                self._written.append(seen)
                _refuse_overlap(name, given, [other for other, _ in changed if other is not given])
                with _unsafe_preserve_version_counter(given):
                    _TakeOver.apply(start, given, seen)

    def given(self, output: torch.Tensor) -> torch.Tensor | None:
        """Return the tensor that the unit was given, if ``output`` is that."""
        for given, seen, _ in self._inputs:  # one, as a rule
            if seen is output:
                return given
        return None

    def is_untouched(self, output: torch.Tensor) -> bool:
        """Return whether ``output`` is an input, or a view of one, that the unit did nothing to."""
        return self.given(output) is not None and not any(seen is output for seen in self._written)


NOTHING = Watched()


class _EndOfBackward(torch.autograd.Function):
    """Identity on a unit's inputs; in backward it runs when the unit has computed all their gradients."""

    @staticmethod
    def forward(ctx: Any, end: Callable[[], None], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.end = end
        ctx.set_materialize_grads(False)
        return tuple([t.detach() for t in inputs])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.end()
        return (None, *grads)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tangents


_END_NODE = _EndOfBackward._backward_cls
# ``Function.apply`` looks for functorch first, which is done here; small models are bound by such things.
_end_of_backward = super(torch.autograd.Function, _EndOfBackward).apply


class _EndOfFunctionalBackward(torch.autograd.Function):
    """The same under functorch, where in-place work on the inputs is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, end: Callable[[], None], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, ctx.end, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.end()
        return (None, None, *_Once.apply(ctx.name, *grads))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tangents


class _Once(torch.autograd.Function):
    """Identity on gradients that have left a unit, and that must not be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(no_second_gradients(ctx.name))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tangents


class _StartOfBackward(torch.autograd.Function):
    """Identity on an output that is a leaf, with which a hook would stay for ever."""

    @staticmethod
    def forward(ctx: Any, start: Callable[[], None], output: torch.Tensor) -> torch.Tensor:
        ctx.start = start
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.start()
        return None, grad

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: torch.Tensor) -> torch.Tensor:
        return tangent


class _TakeOver(torch.autograd.Function):
    """Gives ``given`` the history of ``seen``, which holds the same values."""

    @staticmethod
    def forward(ctx: Any, start: Start, given: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(given)
        ctx.start, ctx.is_view = start, given._is_view()
        return given

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor | None, torch.Tensor]:
        ctx.start(False)
        # Of a view, autograd writes this result into the gradient of what it is a view of.
        return None, grad.clone().zero_() if ctx.is_view else None, grad

    @staticmethod
    def jvp(ctx: Any, _: None, given: torch.Tensor | None, seen: torch.Tensor | None) -> torch.Tensor | None:
        return seen


def no_second_gradients(name: str) -> str:
    """Say why gradients of gradients are refused."""
    return (
        f"gradients of gradients of sharded parameters are not supported, and would silently be wrong (unit {name!r}); "
        "use create_graph=False, and one torch.func transform that runs backward"
    )


def outside_transforms(function: Callable[..., None], *args: Any) -> None:
    """Call ``function``, whose own work is none of what a ``torch.func`` transform transforms."""
    if torch._C._are_functorch_transforms_active():
        with temporarily_clear_interpreter_stack():
            function(*args)
    else:
        function(*args)


def differentiable(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return those of ``tensors`` that need a gradient, to any transform."""
    if torch._C._are_functorch_transforms_active():
        return [t for t in tensors if any(layer.requires_grad for layer in layers_of(t))]
    return [t for t in tensors if t.requires_grad]


def _refuse_overlap(name: str, written: torch.Tensor, others: Sequence[torch.Tensor]) -> None:
    """Raise where two aliases of the same bytes would not know of each other's writes."""
    start, end = _span(written)
    if any(start < other_end and other_start < end for other_start, other_end in map(_span, others)):
        raise RuntimeError(
            f"unit {name!r} changed an input in place that it was given a second time, as another view of the same "
            "tensor: their gradients would be wrong; pass it once, or a clone of it"
        )


def _span(t: torch.Tensor) -> tuple[int, int]:
    """Return the addresses from ``t``'s first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


def watch_inputs(
    name: str, end: Callable[[], None], inputs: Any, tensors: Sequence[torch.Tensor]
) -> tuple[Any, Watched]:
    """Return ``inputs`` of unit ``name`` with ``tensors`` of them passed through one node that calls ``end``."""
    given = tensors if len(tensors) == 1 else list({id(t): t for t in tensors}.values())
    if torch._C._are_functorch_transforms_active():
        seen, watched = _EndOfFunctionalBackward.apply(name, end, *given), NOTHING
    else:
        seen = _end_of_backward(end, *given)
        watched = Watched(given, seen)
    by_id = {id(g): s for g, s in zip(given, seen, strict=True)}
    return map_tensors(lambda t: by_id.get(id(t), t), inputs), watched


def watch_outputs(start: Start, output: Any, watched: Watched) -> Any:
    """Return ``output`` with ``start`` called before any gradient of it enters the unit."""
    if torch._C._are_functorch_transforms_active():
        return map_tensors(lambda t: _watch_layers(start, t), output)
    return map_tensors(partial(_watch_output, start, watched), output)


def watch_held(start: Start, objects: Sequence[Any], watched: Watched) -> None:
    """Do the same for tensors that a forward has computed and returned inside ``objects``."""

    def watch(t: torch.Tensor) -> torch.Tensor:
        if torch._C._are_functorch_transforms_active():
            return _watch_layers(start, t)
        if not t.is_leaf and watched.given(t) is None:
            _watch_output(start, watched, t)
        return t

    replace_held(watch, objects)


def _watch_output(start: Start, watched: Watched, t: torch.Tensor) -> torch.Tensor:
    given = watched.given(t)
    if given is not None:
        return given
    if not t.requires_grad:
        return t
    if t.is_leaf:
        return _StartOfBackward.apply(lambda: start(False), t)
    source = t
    if t._is_view() and _get_creation_meta(t) == CreationMeta.DEFAULT:
        base = t._base
        assert base is not None
        if watched.is_untouched(base):
            return t
        source = t if base.is_leaf else base
    source.register_hook(lambda grad: start(False))
    return t


def _watch_layers(start: Start, t: torch.Tensor) -> torch.Tensor:
    """See [Note: functorch]."""
    for layer in layers_of(t):
        if layer.requires_grad:
            wrapped = _functorch.is_functorch_wrapped_tensor(layer)
            layer.register_hook(lambda grad, wrapped=wrapped: start(wrapped))
    return t
