"""Linear layers whose weight gradient is written in place: by the matrix product, where it will be reduced.

Owns the forward and backward of a linear layer, eager and compiled, and how a plain ``nn.Linear`` gets there. Where a
gradient belongs is said by the weight itself, which carries a ``Sink``; this file knows nothing of units and slots.
A weight without a sink is computed as torch does, and so is every call that has more to it than a plain backward:
autocast, functorch, inputs of other types than ``Tensor``, and gradients of gradients.

    y = x W^T + b        dx = g W        db = sum of g over its rows        dW = g^T x, into the sink

Autograd gets None as the weight's gradient. It completes the parameter all the same, once per backward, and
calls its post-accumulate hooks: with ``.grad`` None when every use wrote to the sink, with what the other uses sent
otherwise.

Shapes: R rows, which are all leading dimensions of an input together, D in_features, V out_features.

[Note: compiled linear layers]
A compiled graph cannot call a Python object, and one graph should serve all layers of one shape. So a weight carries a
number beside its sink: a tensor, which a graph takes as an input without being specialized for its value. The operator
``yafsdp_like::weight_grad`` finds the weight by that number when it runs. It is registered as an effect, since it
returns nothing that could keep the compiler from dropping, merging or reordering its calls.
"""

from __future__ import annotations

import itertools
import types
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.effects import EffectType
from torch.autograd import forward_ad
from torch.library import Library

from yafsdp_like.memory.arena import Arena
from yafsdp_like.memory.layout import aligned
from yafsdp_like.memory.plan import Region

_SINK, _NUMBER = "_yafsdp_sink", "_yafsdp_number"  # attributes of a weight; a graph reads the second only


class Sink(Protocol):
    """Where one weight's gradient is written.

    A sink should refer weakly to its destination: the weight holds the sink, and the garbage collector does not see
    through a graph's nodes, which hold both.
    """

    def open(self) -> tuple[Tensor, bool] | None:
        """Called in backward, on the compute stream, right before the gradient is written.

        Returns a contiguous tensor (V, D) to write to, of any dtype, and whether it holds a gradient to add to; None
        when the gradient is to go the usual way, through autograd.
        """

    def withdraw(self) -> Tensor | None:
        """Return a copy of what an earlier use wrote in this backward, and forget it; None if there is nothing.

        Autograd then adds it up in its own order.
        """

    def check_readable(self) -> None:
        """Raise a ``RuntimeError`` that says why autograd refuses to give the weight back, if that is known."""


def attach(weight: nn.Parameter, sink: Sink) -> None:
    """From now on, linear layers write ``weight``'s gradients to ``sink``. ``weight`` is a leaf of shape (V, D)."""
    setattr(weight, _SINK, sink)
    if not hasattr(weight, _NUMBER):
        setattr(weight, _NUMBER, _numbered(weight))


def sink_of(weight: Tensor) -> Sink | None:
    """The sink attached to ``weight``; None inside a graph, which cannot call it."""
    return None if torch.compiler.is_dynamo_compiling() else vars(weight).get(_SINK)


def install(module: nn.Module) -> None:
    """Makes ``module`` use ``linear``, if it is a linear layer that runs ``nn.Linear``'s own forward; else nothing.

    The instance gets a ``forward``, a bound method, and stays what it is to ``type``, ``print`` and ``state_dict``. A
    copy gets its own; what pickle brings back has ``nn.Linear``'s forward again.
    """
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "forward" not in vars(module):
        vars(module)["forward"] = types.MethodType(forward, module)


def uninstall(module: nn.Module) -> None:
    """Takes back what ``install`` did: a bound method keeps its module until garbage is collected."""
    if getattr(vars(module).get("forward"), "__func__", None) is forward:
        del vars(module)["forward"]


def forward(module: nn.Linear, input: Tensor) -> Tensor:
    """``nn.Linear.forward``, and named like it because pickle stores a bound method by its name."""
    found = module._parameters  # looked up by hand, as __getattr__ would: it takes as long as a small kernel's launch
    weight = found.get("weight")
    if weight is None or "bias" not in found:  # parametrized, or given by functional_call
        return linear(input, module.weight, module.bias)
    return linear(input, weight, found["bias"])


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of input (..., D), weight (V, D) and bias (V,): (..., V), with dW written to the weight's sink."""
    compiled = torch.compiler.is_dynamo_compiling()
    sink = getattr(weight, _NUMBER if compiled else _SINK, None)
    if sink is None or not weight.requires_grad or not _is_plain(input):
        return F.linear(input, weight, bias)
    if compiled:
        return _CompiledLinear.apply(input, weight, bias, sink)
    return _apply(input, weight, bias, sink)


def write_product(sink: Sink, grad: Tensor, input: Tensor) -> Tensor | None:
    """Writes ``grad.T @ input`` (V, D), of (R, V) and (R, D), to the sink; returns it instead if that is not open.

    The product of a sink of another dtype is rounded to the inputs' dtype first, as autograd's would be.
    """
    opened = sink.open()
    if opened is None:
        product, earlier = grad.t().mm(input), sink.withdraw()
        return product if earlier is None else earlier.add_(product)
    view, holds_gradient = opened
    if view.dtype == grad.dtype:
        if holds_gradient:
            view.addmm_(grad.t(), input)
        else:
            torch.mm(grad.t(), input, out=view)
    elif holds_gradient:
        view.add_(grad.t().mm(input))
    else:
        view.copy_(grad.t().mm(input))
    return None


def takes_gradient(accumulation: Any) -> bool | None:
    """Whether the running backward goes on to ``accumulation``, a leaf's ``AccumulateGrad`` node.

    False when the leaf's gradient was not asked for; None when it is a result of ``torch.autograd.grad``.
    """
    try:
        return torch._C._will_engine_execute_node(accumulation)
    except RuntimeError:  # autograd has no other answer for a leaf that torch.autograd.grad was asked for
        return None


def _is_plain(input: Tensor) -> bool:
    """Whether nothing but a plain backward can come of a call on ``input``."""
    return (
        type(input) is Tensor
        and torch.is_grad_enabled()
        and input.layout is torch.strided
        and not input.is_nested
        and not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _rows(grad: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """(..., V) and (..., D) as (R, V) and (R, D)."""
    num_dims = input.dim()
    if num_dims == 2:
        return grad, input
    if num_dims == 3:  # of a language model; ``flatten`` takes half as long
        return grad.flatten(0, 1), input.flatten(0, 1)
    num_rows = input.shape[:-1].numel()
    return grad.reshape(num_rows, grad.shape[-1]), input.reshape(num_rows, input.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, sink: Sink) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)
        ctx.sink = sink  # the weight that comes back may be another tensor: a checkpoint's, or one kept on the host
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None, None
        try:
            input, weight = ctx.saved_tensors
        except RuntimeError:
            ctx.sink.check_readable()
            raise
        needs_input, _, needs_bias, _ = ctx.needs_input_grad
        rows, input_rows = _rows(grad, input)
        grad_input = rows.mm(weight).view_as(input) if needs_input else None
        taken = takes_gradient(ctx.next_functions[1][0])
        grad_weight: Tensor | None = None
        if taken is None or torch.is_grad_enabled():  # gradients of gradients go through the product
            grad_weight = rows.t().mm(input_rows)
        elif taken:
            grad_weight = write_product(ctx.sink, rows, input_rows)
        return grad_input, grad_weight, rows.sum(0) if needs_bias else None, None


# ``Function.apply`` looks for functorch first, which ``_is_plain`` has done; small models are bound by such things.
_apply = super(torch.autograd.Function, _Linear).apply


class _CompiledLinear(torch.autograd.Function):
    """The same for a graph. See [Note: compiled linear layers]."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, number: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight, number)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        input, weight, number = ctx.saved_tensors
        needs_input, _, needs_bias, _ = ctx.needs_input_grad
        rows, input_rows = _rows(grad, input)
        grad_input = rows.mm(weight).view(input.shape) if needs_input else None
        torch.ops.yafsdp_like.weight_grad(rows, input_rows, number)
        return grad_input, None, rows.sum(0) if needs_bias else None, None


_counter = itertools.count()
_weights: WeakValueDictionary[int, Tensor] = WeakValueDictionary()


def _numbered(weight: Tensor) -> Tensor:
    """A number for ``weight``, as an int64 tensor () on the host."""
    arena, number = Arena(torch.device("cpu")), next(_counter)
    arena.reserve([Region("number", "number", aligned(torch.int64.itemsize))])
    _weights[number] = weight
    return arena.place("number").tensor(torch.int64, ()).fill_(number)


def _weight_grad(grad: Tensor, input: Tensor, number: Tensor) -> None:
    """Writes what eager mode would, and otherwise leaves the gradient in ``.grad``, since a graph returns none."""
    weight = _weights[int(number)]
    sink = sink_of(weight)
    assert sink is not None
    if not takes_gradient(torch.autograd.graph.get_gradient_edge(weight).node):
        return  # not asked for; where torch.autograd.grad asks for it, autograd says that it got none
    rest = write_product(sink, grad, input)
    if rest is not None:
        weight.grad = rest if weight.grad is None else weight.grad + rest


_library = Library("yafsdp_like", "DEF")
_library.define("weight_grad(Tensor grad, Tensor input, Tensor number) -> ()")
_library.impl("weight_grad", _weight_grad, "CompositeExplicitAutograd")
torch.library.register_fake("yafsdp_like::weight_grad", lambda grad, input, number: None, lib=_library)
torch.library._register_effectful_op("yafsdp_like::weight_grad", EffectType.ORDERED)
