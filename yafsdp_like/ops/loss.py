"""Cross entropy of a linear head, without the logits of a whole sequence.

Owns the loop over chunks of tokens and its gradients. It must not know which model calls it, nor what a sharded weight
is: only that a weight may say where its gradient is to be written.

Shapes: T tokens, C tokens of one chunk, D model, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from yafsdp_like.ops.linear import Sink, sink_of, takes_gradient, write_product

IGNORE_INDEX = -100  # a target of this value takes no part in the loss

_ROWS_PER_PRODUCT = 16384  # of a weight gradient that is summed in fp32 over products of lower precision


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Mean cross entropy of the logits `hidden @ weight.T` over the targets that are not `IGNORE_INDEX`.

    For each chunk of C = `chunk_size` tokens with hidden states h (C, D) and targets y (C,), and the weight W (V, D):

        log p = log_softmax(h W^T)        loss -= log p[y] / n, summed over tokens
        G = p - onehot(y)                 dh    = s G W
                                          dW   += G^T (s h)

    where n counts the targets that are not ignored, and s is 1 / n, or zero for ignored tokens. What the gradients need
    of the logits is made beside the loss, the head being the last of forward and the first of backward: nothing is
    computed twice. Two ways, whichever holds less:

    * G is kept, (T, V) in the weight's dtype, and dW is one product in backward, straight to where the weight wants it.
      So whenever G is not larger than dW would be in fp32, or all tokens are one chunk.
    * dW is summed over chunks in forward, (V, D) in fp32, from products in the weight's dtype.

    Beside that this holds a chunk's logits, its probabilities in fp32, and dh.

    Softmax is taken in fp32. The factor s, times the gradient of the loss in the first way, is multiplied in fp32 and
    rounded once: into h for dW, into the product for dh. The loss without any counted target is not a number, as that
    of `F.cross_entropy`.

    Args:
        hidden: (T, D).
        weight: (V, D).
        targets: (T,), integers below V or `IGNORE_INDEX`.
        chunk_size: tokens per chunk.

    Returns:
        an fp32 scalar.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, chunk_size)
    return _by_chunks(hidden, weight, _Labels.of(targets), chunk_size, None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        labels = _Labels.of(targets)
        parts = _Parts.made_for(hidden, weight, chunk_size, *ctx.needs_input_grad[:2])
        loss = _by_chunks(hidden, weight, labels, chunk_size, parts)
        ctx.sink = sink_of(weight) if ctx.needs_input_grad[1] else None
        ctx.weight_dtype = weight.dtype
        kept = None if parts.grad_logits is None else hidden
        ctx.save_for_backward(labels.scale, kept, parts.grad_logits, parts.grad_hidden, parts.grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        scale, hidden, grad_logits, grad_hidden, grad_weight = ctx.saved_tensors
        sink, factor = ctx.sink, scale * grad_loss  # (T, 1)
        if sink is not None:
            taken = takes_gradient(ctx.next_functions[1][0])
            if taken is False:
                grad_logits = grad_weight = None
            sink = sink if taken else None
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, factor)
        if grad_logits is not None:
            grad_weight = _product(sink, grad_logits, _scaled(hidden, factor))
        elif grad_weight is not None:
            grad_weight = _handed_over(sink, grad_weight, grad_loss, ctx.weight_dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.weight_dtype), None, None


@dataclass(frozen=True)
class _Labels:
    index: Tensor  # (T, 1) int64, 0 for ignored targets
    counted: Tensor  # (T, 1) bool
    num_counted: Tensor  # ()
    scale: Tensor  # (T, 1) fp32, s

    @classmethod
    def of(cls, targets: Tensor) -> "_Labels":
        counted = (targets != IGNORE_INDEX).unsqueeze(1)
        num_counted = counted.sum()
        return cls(targets.unsqueeze(1).where(counted, 0), counted, num_counted, counted / num_counted)


@dataclass(frozen=True)
class _Parts:
    """What the gradients need of the logits, filled chunk by chunk; None for what is not needed."""

    grad_logits: Tensor | None  # (T, V), G in the weight's dtype
    grad_hidden: Tensor | None  # (T, D), G W
    grad_weight: Tensor | None  # (V, D) fp32, G^T (s h) over the chunks so far

    @classmethod
    def made_for(
        cls, hidden: Tensor, weight: Tensor, chunk_size: int, needs_hidden: bool, needs_weight: bool
    ) -> "_Parts":
        num_tokens, dim = hidden.shape
        keep = num_tokens <= chunk_size or num_tokens * hidden.itemsize <= dim * torch.float32.itemsize
        return cls(
            hidden.new_empty(num_tokens, len(weight)) if needs_weight and keep else None,
            torch.empty_like(hidden) if needs_hidden else None,
            hidden.new_zeros(weight.shape, dtype=torch.float32) if needs_weight and not keep else None,
        )

    def add(self, rows: slice, grad_logits: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor) -> None:
        """One chunk: its tokens, and for them G (C, V) in fp32, h (C, D) and s (C, 1)."""
        if self.grad_logits is not None:
            self.grad_logits[rows] = grad_logits
            grad_logits = self.grad_logits[rows]
        else:
            grad_logits = grad_logits.to(hidden.dtype)
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = grad_logits @ weight
        if self.grad_weight is not None:
            _add_product(self.grad_weight, grad_logits, _scaled(hidden, scale))


def _by_chunks(hidden: Tensor, weight: Tensor, labels: _Labels, chunk_size: int, parts: _Parts | None) -> Tensor:
    """The loss; fills ``parts``."""
    loss_sum = torch.zeros((), device=hidden.device, dtype=torch.float32)
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = F.linear(hidden[rows], weight)  # (C, V)
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        index = labels.index[rows]
        loss_sum -= log_probs.gather(1, index).where(labels.counted[rows], 0).sum()
        if parts is not None:
            parts.add(rows, _minus_onehot_(log_probs.exp_(), index), hidden[rows], weight, labels.scale[rows])
    return loss_sum / labels.num_counted


def _minus_onehot_(probs: Tensor, index: Tensor) -> Tensor:
    """`probs` (C, V) with 1 taken from each row's label (C, 1), in place."""
    return probs.scatter_(1, index, probs.gather(1, index) - 1)


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """(T, D) times an fp32 factor (T, 1), in the rows' own dtype."""
    return (rows * factor).to(rows.dtype)


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Adds `grad_logits.T @ hidden`, of (C, V) and (C, D), to `total` (V, D)."""
    if hidden.dtype == total.dtype:
        total.addmm_(grad_logits.T, hidden)
        return
    for low in range(0, len(total), _ROWS_PER_PRODUCT):
        rows = slice(low, low + _ROWS_PER_PRODUCT)
        total[rows] += grad_logits[:, rows].T @ hidden


def _product(sink: Sink | None, grad_logits: Tensor, hidden: Tensor) -> Tensor | None:
    """`grad_logits.T @ hidden`, or None when it went to the sink."""
    return grad_logits.T @ hidden if sink is None else write_product(sink, grad_logits, hidden)


def _handed_over(sink: Sink | None, grad_weight: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`grad_weight * grad_loss` in `dtype`, or None when it went to the sink."""
    opened = sink.open() if sink is not None else None
    if opened is None:
        return (grad_weight * grad_loss).to(dtype)
    view, holds_gradient = opened
    if holds_gradient:
        view.add_(grad_weight * grad_loss)
    else:
        torch.mul(grad_weight, grad_loss, out=view)
    return None
