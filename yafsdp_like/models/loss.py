"""Cross entropy of a linear head, without the logits of a whole sequence.

Owns the loop over chunks of tokens and its gradients. It must not know which model calls it, nor that the weight may
be a slot of a sharded one: to autograd the weight is an input like any other.

Shapes: T tokens, C tokens of one chunk, D model, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # a target of this value takes no part in the loss

_ROWS_PER_PRODUCT = 16384  # of a weight gradient that is summed in fp32 over products of lower precision


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Mean cross entropy of the logits `hidden @ weight.T` over the targets that are not `IGNORE_INDEX`.

    For each chunk of C = `chunk_size` tokens with hidden states h (C, D) and targets y (C,), and the weight W (V, D):

        log p = log_softmax(h W^T)        loss -= log p[y] / n, summed over tokens
        G = p - onehot(y)                 dh    = G W / n
                                          dW   += G^T h / n

    where rows of G are zero for ignored targets and n counts the others. The gradients are made beside the loss, the
    head being the last of forward and the first of backward: nothing is computed twice, and backward only scales
    them. At its peak this holds a chunk's logits, its probabilities in fp32, and the two gradients, which backward
    needs in any case.

    Softmax is taken in fp32. The weight's gradient is one matrix product in the weight's dtype when all tokens fit
    one chunk; products of several chunks are added in fp32. The loss without any counted target is not a number, as
    that of `F.cross_entropy`.

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
    loss, _, _ = _by_chunks(hidden, weight, targets, chunk_size, (False, False))
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        loss, *grads = _by_chunks(hidden, weight, targets, chunk_size, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = (None if grad is None else grad * grad_loss for grad in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None


def _by_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, needs_grad: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the gradients of `hidden` and `weight` as far as they are needed."""
    needs_hidden, needs_weight = needs_grad
    counted = (targets != IGNORE_INDEX).unsqueeze(1)  # (T, 1)
    labels = targets.unsqueeze(1).where(counted, 0)  # (T, 1)
    num_counted = counted.sum()
    loss_sum = torch.zeros((), device=hidden.device, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = None
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = F.linear(hidden[rows], weight)  # (C, V)
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        loss_sum -= log_probs.gather(1, labels[rows]).where(counted[rows], 0).sum()
        if not (needs_hidden or needs_weight):
            continue
        grad_logits = _minus_onehot_(log_probs.exp_(), labels[rows]).to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = (grad_logits @ weight) * (counted[rows] / num_counted)
        if needs_weight:
            grad_weight = _plus_product(grad_weight, grad_logits, hidden[rows] * counted[rows], len(hidden))
    if grad_weight is not None:
        grad_weight = grad_weight.div_(num_counted).to(weight.dtype)
    return loss_sum / num_counted, grad_hidden, grad_weight


def _minus_onehot_(probs: Tensor, labels: Tensor) -> Tensor:
    """`probs` (C, V) with 1 taken from each row's label (C, 1), in place."""
    return probs.scatter_(1, labels, probs.gather(1, labels) - 1)


def _plus_product(total: Tensor | None, grad_logits: Tensor, hidden: Tensor, num_tokens: int) -> Tensor:
    """`total` (V, D) plus one chunk's `grad_logits.T @ hidden`, for (C, V) and (C, D); the first has no total yet."""
    if len(hidden) == num_tokens:  # the only chunk
        return grad_logits.T @ hidden
    if total is None:
        total = torch.zeros(grad_logits.shape[1], hidden.shape[1], device=hidden.device, dtype=torch.float32)
    if hidden.dtype == total.dtype:
        return total.addmm_(grad_logits.T, hidden)
    for low in range(0, len(total), _ROWS_PER_PRODUCT):
        rows = slice(low, low + _ROWS_PER_PRODUCT)
        total[rows] += grad_logits[:, rows].T @ hidden
    return total
