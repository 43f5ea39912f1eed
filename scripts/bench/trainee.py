"""What is compared: a model that can be trained, and the function that builds it.

Knows no runtime. What differs between runtimes is in `implementations.py` and `zero3.py`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bench.options import Options
from bench.subjects import Model
from launch.host_cost import apply_and_clear
from launch.world import World
from yafsdp_like.models import Decoder
from yafsdp_like.optim import AdamW

NUM_EAGER = 2  # calls before one is recorded


@dataclass
class Trainee:
    """A model ready to train; override a method where a runtime brings its own."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    may_clip_in_update: bool = field(default=True, kw_only=True)  # which this package's AdamW can

    @property
    def clips_in_update(self) -> bool:
        """Whether the next update takes the norm and clips."""
        return isinstance(self.optimizer, AdamW) and self.optimizer.max_norm is not None

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of (B, T) tokens and targets, from which `backward` starts."""
        loss: Tensor = self.model(tokens, targets)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Compute gradients from what `forward` returned."""
        loss.backward()

    def forward_backward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Run both on (B, T) tokens and targets, and return the loss."""
        loss = self.forward(tokens, targets)
        self.backward(loss)
        return loss.detach()

    def clip(self, max_norm: float) -> None:
        """Scale gradients to a norm of at most `max_norm`, here or in the update; not at all for 0."""
        if isinstance(self.optimizer, AdamW) and self.may_clip_in_update:
            self.optimizer.max_norm = max_norm or None
        elif max_norm and self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def update(self) -> None:
        """Apply and clear the gradients; without an optimizer, zero them in place."""
        apply_and_clear(self.model, self.optimizer)

    def close(self) -> None:
        """Undo what a runtime did outside its own objects; nothing, for most."""


@dataclass
class Graphed(Trainee):
    """One whose forward and backward are replayed."""

    step: Callable[[Tensor, Tensor], Tensor]

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Replay both as one CUDA graph."""
        return self.step(tokens, targets)

    def backward(self, loss: Tensor) -> None:
        """Do nothing: it has been replayed."""


class PlainGraph:
    """`function` of two tensors as CUDA graphs, one for each shape, without sharding; run as it is elsewhere."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._function = function
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self._calls: Counter[torch.Size] = Counter()

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Call the function, or replay its graph for tensors of these shapes."""
        shape = tokens.shape
        self._calls[shape] += 1
        if not tokens.is_cuda or self._calls[shape] <= NUM_EAGER:
            return self._function(tokens, targets)
        if shape not in self._graphs:
            graph, own = torch.cuda.CUDAGraph(), (tokens.clone(), targets.clone())
            with torch.cuda.graph(graph):
                loss = self._function(*own)
            self._graphs[shape] = graph, *own, loss
        graph, own_tokens, own_targets, loss = self._graphs[shape]
        own_tokens.copy_(tokens)
        own_targets.copy_(targets)
        graph.replay()
        return loss.clone()


Builder = Callable[[Options, World], Trainee]


def nothing(world: World) -> str | None:
    """No obstacle."""


@dataclass(frozen=True)
class Implementation:
    """How a runtime's trainee is built, and a question: what stands in its way on this rank, in one line, or None."""

    build: Builder
    obstacle: Callable[[World], str | None] = nothing
    expandable: bool = False  # how PyTorch's allocator grows while it is there


def new_model(options: Options, world: World) -> Model:
    """The model, a decoder without bytes, its blocks compiled or recomputed where that is asked for."""
    model = options.subject.model(world.device)
    if options.compile:
        for layer in model.layers:
            layer.compile(dynamic=False)
    if options.recomputes:
        recompute_blocks(model)
    return model


def recompute_blocks(model: Model) -> None:
    """Keep each block's input alone for backward; nothing in a block is random, so no generator's state is kept."""
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)


def materialized(model: Model, world: World) -> Model:
    """The same model with memory and initial values, which are the same under any sharding."""
    if isinstance(model, Decoder):
        model.to_empty(device=world.device)
        model.init_weights()
    return model
