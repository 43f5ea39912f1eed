"""Models of many shapes, and how each is cut into units.

Owns the specimens (builder, inputs, units). A batch depends on (specimen, step, rank) alone, so that two
implementations, or a model that is not sharded, see the same data. Knows nothing of how `fully_shard` works.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

Unit = nn.Module | list[nn.Module]


class Batch(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


def square_loss(output: Any) -> torch.Tensor:
    """A loss for any nest of tensors: the sum of their mean squares, each weighted differently."""
    return sum(
        ((1 + 0.25 * index) * leaf.float().square().mean() for index, leaf in enumerate(tensors_of(output))),
        start=torch.zeros(()),
    )


def tensors_of(nest: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of nested containers, in order, except under keys like "unused..."."""
    if isinstance(nest, torch.Tensor):
        if nest.is_floating_point():
            yield nest
    elif isinstance(nest, Mapping):
        for key, value in nest.items():
            if not key.startswith("unused"):
                yield from tensors_of(value)
    elif isinstance(nest, Sequence) and not isinstance(nest, str):
        for value in nest:
            yield from tensors_of(value)


@dataclass(frozen=True)
class Specimen:
    """One model of the zoo: how it is built, called, and cut into units.

    Units come bottom-up, without the root, which is sharded last in any case.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, int], Batch]  # (randomness, step)
    units: Callable[[Any], list[Unit]]
    loss: Callable[[Any], torch.Tensor] = square_loss

    def fresh(self) -> nn.Module:
        """The model, with the same numbers on every rank and at every call."""
        torch.manual_seed(7)
        return self.build()

    def wrap(self, model: nn.Module, fully_shard: Callable[..., Any], **options: Any) -> nn.Module:
        """Shard `model` unit by unit; `options` go to every call."""
        for unit in self.units(model):
            fully_shard(unit, **options)
        fully_shard(model, **options)
        return model

    def loss_of(self, model: nn.Module, step: int, rank: int, device: str = "cpu") -> torch.Tensor:
        """Forward on the batch of (step, rank); dropout draws the same numbers in every implementation."""
        batch = self.batch(torch.Generator().manual_seed(1000 * step + rank), step)
        torch.manual_seed(1000 * step + rank)
        return self.loss(model(*to_device(batch.args, device), **to_device(batch.kwargs, device)))


def to_device(nest: Any, device: str) -> Any:
    """The arguments of a batch with the tensors in plain dicts and tuples on `device`."""
    if isinstance(nest, torch.Tensor):
        return nest.to(device)
    if isinstance(nest, Mapping):
        return {key: to_device(value, device) for key, value in nest.items()}
    if type(nest) is tuple:
        return tuple(to_device(value, device) for value in nest)
    return nest


# --- specimens ---

BATCH = 3  # rows of a batch
FEATURES = 6


def vectors(width: int) -> Callable[[torch.Generator, int], Batch]:
    """Batches of one `(BATCH, width)` tensor."""
    return lambda generator, step: Batch((torch.randn(BATCH, width, generator=generator),))


def layers_of(model: Any) -> list[Unit]:
    """One unit for each of `model.layers`."""
    return list(model.layers)


class Chain(nn.Module):
    """Layers one after the other, with GELU between."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(F.gelu(x))
        return x


def odd_chain() -> Chain:
    """First dimensions 7, 5, 3 and 1: none divides by 2 or 4, some are smaller than the world."""
    widths = [5, 7, 5, 3, 1]
    return Chain([nn.Linear(before, after) for before, after in pairwise(widths)])


class Block(nn.Module):
    """Residual two-layer block."""

    def __init__(self, width: int = FEATURES, hidden: int = 10) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, hidden)
        self.fall = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fall(F.gelu(self.rise(self.norm(x))))


class DecoderBlock(nn.Module):
    """Pre-norm causal attention and feed-forward, with dropout."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = Block(width, hidden)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = (
            self.qkv(self.attention_norm(x))
            .view(rows, length, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(rows, length, width)))
        return self.feed_forward(x)


class Decoder(nn.Module):
    """A small language model that returns its loss; it may recompute whole blocks in backward."""

    def __init__(
        self,
        *,
        tied: bool = False,
        recompute: bool = False,
        vocabulary: int = 19,
        width: int = 12,
        num_blocks: int = 3,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([DecoderBlock(width, heads=3, hidden=20) for _ in range(num_blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def tokens(generator: torch.Generator, step: int) -> Batch:
    """`(2, 9)` token ids."""
    return Batch((torch.randint(0, 19, (2, 9), generator=generator),))


class Parent(nn.Module):
    """Own parameters around sharded children, before and after them, and a child that owns none."""

    def __init__(self, children: Sequence[nn.Module]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.inner = nn.ModuleList(children)
        self.silent = nn.Identity()
        self.bias = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        for child in self.inner:
            x = self.silent(child(x))
        return x + self.bias


def nested() -> Parent:
    """Units three deep."""
    return Parent([Parent([Block(), Block()]), Block(), Parent([Block()])])


def nested_units(model: Any) -> list[Unit]:
    """Every block and every inner parent; children before parents."""
    units: list[Unit] = []
    for child in model.inner:
        if isinstance(child, Parent):
            units.extend(nested_units(child))
        units.append(child)
    return [*units, model.silent]


class Reuser(Chain):
    """Calls its first layer again at the end, and its second twice in a row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.layers
        return first(third(second(second(first(x)))))


class Skipper(Chain):
    """Runs a different part of its layers at each step, the same on all ranks."""

    def forward(self, x: torch.Tensor, step: int = 0) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if (step + index) % 3:
                x = layer(x)
        return x


def skipper_batch(generator: torch.Generator, step: int) -> Batch:
    """A vector batch and the step that decides which layers run."""
    return Batch((torch.randn(BATCH, FEATURES, generator=generator),), {"step": step})


def partly_frozen() -> Chain:
    """The first layer is frozen in parts, the second as a whole, the last but for a bias."""
    model = Chain([Block() for _ in range(4)])
    frozen = ["layers.0.norm.weight", "layers.0.rise.weight", "layers.3.norm.weight", "layers.3.rise.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    model.layers[1].requires_grad_(False)
    return model


class Tailed(Chain):
    """Layers, then a norm and a head that form one group."""

    def __init__(self, layers: Sequence[nn.Module], width: int, classes: int) -> None:
        super().__init__(layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(super().forward(x)))


class ConvNet(nn.Module):
    """Convolutions with norms that keep buffers: running statistics and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
                nn.Sequential(nn.Conv2d(5, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU()),
            ]
        )
        self.head = nn.Linear(8, 3)
        self.register_buffer("temperature", torch.tensor(1.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            images = layer(images)
        return self.head(images.mean((2, 3))) / self.temperature


def images(generator: torch.Generator, step: int) -> Batch:
    """`(2, 3, 7, 7)` images."""
    return Batch((torch.randn(2, 3, 7, 7, generator=generator),))


class Waster(Chain):
    """Has a parameter inside a unit, a parameter of its own and a whole unit that no forward uses."""

    def __init__(self) -> None:
        super().__init__([Block(), Block()])
        self.layers[0].idle = nn.Parameter(torch.ones(5))
        self.idle = nn.Parameter(torch.ones(3))
        self.gain = nn.Parameter(torch.ones(FEATURES))
        self.spare = nn.Linear(FEATURES, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


class DictBlock(Block):
    """Nested containers in and out; one of its outputs is used by nobody."""

    def forward(  # type: ignore[override]
        self, state: dict[str, Any], *, shift: tuple[torch.Tensor, int]
    ) -> dict[str, Any]:
        x = super().forward(state["x"] + shift[0] * shift[1])
        return {"x": x, "history": (*state["history"], x.mean(0)), "unused": self.rise(x), "note": "plain"}


class DictModel(nn.Module):
    """Blocks that speak in dicts; several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DictBlock() for _ in range(2)])
        self.heads = nn.ModuleDict({"mean": nn.Linear(FEATURES, 2), "unused_scale": nn.Linear(FEATURES, 1)})

    def forward(self, state: dict[str, Any], shift: torch.Tensor) -> dict[str, Any]:
        for index, layer in enumerate(self.layers):
            state = layer(state, shift=(shift, index))
        return state | {name: head(state["x"]) for name, head in self.heads.items()}


def dict_batch(generator: torch.Generator, step: int) -> Batch:
    """A dict with a tensor and an empty tuple, and a tensor that every row is shifted by."""
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return Batch(({"x": x, "history": ()},), {"shift": torch.randn(FEATURES, generator=generator)})


class Recurrent(nn.Module):
    """An LSTM, which keeps references to its parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        hidden, state = self.lstm(x)
        return self.head(hidden), state


def sequences(generator: torch.Generator, step: int) -> Batch:
    """`(2, 4, FEATURES)` sequences."""
    return Batch((torch.randn(2, 4, FEATURES, generator=generator),))


def encoder() -> nn.Sequential:
    """Torch's own encoder layers, whose evaluation takes another path and reads weights of their submodules."""
    return nn.Sequential(*(nn.TransformerEncoderLayer(FEATURES, 2, 10, batch_first=True) for _ in range(2)))


def blocks(num: int) -> list[Block]:
    """`num` residual blocks."""
    return [Block() for _ in range(num)]


# Chunks of whole pages on two ranks, some on three, beside others that are less than a page.
WIDE = Specimen(lambda: Chain([Block(128, 96) for _ in range(3)]), vectors(128), layers_of)

SPECIMENS: dict[str, Specimen] = {
    "odd": Specimen(odd_chain, vectors(5), lambda model: list(model.layers[:3])),
    "decoder": Specimen(Decoder, tokens, layers_of),
    "recomputed": Specimen(lambda: Decoder(recompute=True), tokens, layers_of),
    "tied": Specimen(
        lambda: Decoder(tied=True),
        tokens,
        lambda model: [*model.layers, [model.embedding, model.norm, model.head]],
    ),
    "nested": Specimen(nested, vectors(FEATURES), nested_units),
    "reused": Specimen(lambda: Reuser(blocks(3)), vectors(FEATURES), layers_of),
    "skipped": Specimen(lambda: Skipper(blocks(3)), skipper_batch, layers_of),
    "frozen": Specimen(partly_frozen, vectors(FEATURES), layers_of),
    "group": Specimen(
        lambda: Tailed(blocks(2), FEATURES, 5),
        vectors(FEATURES),
        lambda model: [*model.layers, [model.norm, model.head]],
    ),
    "convnet": Specimen(ConvNet, images, layers_of),
    "waster": Specimen(Waster, vectors(FEATURES), lambda model: [*model.layers, model.spare]),
    "dicts": Specimen(DictModel, dict_batch, lambda model: [*model.layers, *model.heads.values()]),
    "encoder": Specimen(encoder, sequences, list),
    "lstm": Specimen(Recurrent, sequences, lambda model: [model.lstm]),
}
