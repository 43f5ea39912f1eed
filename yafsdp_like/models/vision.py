"""An image encoder of the CLIP or SigLIP kind, and the projector from what it gives to a decoder's hidden states.

Owns the shape, the names of parameters and the forward of both, as functions of tensors by name: whoever serves them
keeps their weights where it likes. What the tower gives, the features of an image, depends on the tower alone, so that
models with one tower share them; the projector is each model's own.

Parameters have the names of Hugging Face's Llava checkpoints, below `vision_tower.` and `projector.`.

Shapes: S side of an image in pixels, P side of a patch, C channels, R rows of an image, E tower, F its feed-forward,
D decoder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOWER, PROJECTOR = "vision_tower", "projector"
NUM_CHANNELS = 3


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": _quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
}


@dataclass(frozen=True)
class VisionConfig:
    """The shape of an image encoder and of its projector; raises ValueError for one that cannot be.

    With `has_class` it is CLIP's: a row for the class before those of patches, and a norm before the layers; without,
    SigLIP's, whose patches have a bias. Only layers that are read from are counted.
    """

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    image_size: int
    patch_size: int
    image_token: int  # in a prompt, the place of one row of an image
    has_class: bool = True
    keeps_class: bool = False  # the decoder is given the class's row, too
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    projector_activation: str = "gelu"
    projector_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "ffn_dim", "image_size", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the vision tower must be at least 1, found {getattr(self, name)}")
        if self.num_layers < 0 or self.image_token < 0:
            raise ValueError(f"layers and the image's token must not be negative, found {self}")
        if self.dim % self.num_heads or self.image_size < self.patch_size:
            raise ValueError(f"the vision tower needs whole heads, and an image of at least one patch, found {self}")
        for kind in (self.activation, self.projector_activation):
            if kind not in ACTIVATIONS:
                raise ValueError(f"activations of a vision tower are one of {', '.join(ACTIVATIONS)}, found {kind!r}")

    @property
    def num_patches(self) -> int:
        """Patches of one image; what is beyond a multiple of the patch's size is not seen."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Rows that the tower's layers see."""
        return self.num_patches + self.has_class

    @property
    def num_rows(self) -> int:
        """R: tokens that one image takes in a prompt."""
        return self.num_patches + (self.has_class and self.keeps_class)

    def activation_nbytes(self, dim: int, itemsize: int) -> int:
        """Return a bound on the bytes that encoding and projecting one image allocates, for a decoder of `dim`.

        Counted are eight tensors of the tower's rows, two of its feed-forward and the decoder's hidden states, the
        scores of all heads twice in fp32, as attention has them where no fused kernel runs, and pixels twice.
        """
        rows = self.num_positions * (8 * self.dim + 2 * self.ffn_dim + 2 * dim) * itemsize
        scores = 2 * self.num_heads * self.num_positions**2 * 4
        return rows + scores + 2 * NUM_CHANNELS * self.image_size**2 * 4

    def tower_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of the tower."""
        dim, patch = self.dim, (self.dim, NUM_CHANNELS, self.patch_size, self.patch_size)
        shapes: dict[str, tuple[int, ...]] = {"embeddings.patch_embedding.weight": patch}
        shapes["embeddings.position_embedding.weight"] = (self.num_positions, dim)
        if self.has_class:
            shapes |= {"embeddings.class_embedding": (dim,), **_affine("pre_layrnorm", dim)}
        else:
            shapes["embeddings.patch_embedding.bias"] = (dim,)
        for index in range(self.num_layers):
            layer = f"encoder.layers.{index}"
            for name in ("q", "k", "v", "out"):
                shapes |= _affine(f"{layer}.self_attn.{name}_proj", dim, dim)
            shapes |= _affine(f"{layer}.layer_norm1", dim) | _affine(f"{layer}.layer_norm2", dim)
            shapes |= _affine(f"{layer}.mlp.fc1", self.ffn_dim, dim) | _affine(f"{layer}.mlp.fc2", dim, self.ffn_dim)
        return shapes

    def projector_shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of the projector to a decoder of `dim`."""
        shapes = _affine("linear_1", dim, self.dim) | _affine("linear_2", dim, dim)
        return {name: shape for name, shape in shapes.items() if self.projector_bias or not name.endswith("bias")}


def _affine(name: str, out_dim: int, *in_dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_dim, *in_dim), f"{name}.bias": (out_dim,)}


Weights = Mapping[str, Tensor]  # by the names of `tower_shapes`, or of `projector_shapes`


def encode(config: VisionConfig, weights: Weights, pixels: Tensor) -> Tensor:
    """Features (R, E) of an image's pixels (C, S, S), in the dtype of the weights."""
    x = _embed(config, weights, pixels)
    for index in range(config.num_layers):
        x = _layer(config, weights, f"encoder.layers.{index}", x)
    return x[1:] if config.has_class and not config.keeps_class else x


def project(config: VisionConfig, weights: Weights, features: Tensor) -> Tensor:
    """Hidden states (rows, D) for a decoder of features (rows, E)."""
    activate = ACTIVATIONS[config.projector_activation]
    return _linear(weights, "linear_2", activate(_linear(weights, "linear_1", features)))


def _embed(config: VisionConfig, weights: Weights, pixels: Tensor) -> Tensor:
    """Patches as rows, with their positions: a convolution whose windows do not meet is one product."""
    kernel = weights["embeddings.patch_embedding.weight"].flatten(1)  # (E, C P P)
    size, side = config.patch_size, config.image_size // config.patch_size
    seen = pixels[:, : side * size, : side * size].to(kernel.device, kernel.dtype)
    patches = seen.unflatten(2, (side, size)).unflatten(1, (side, size)).permute(1, 3, 0, 2, 4)
    x = F.linear(patches.reshape(config.num_patches, -1), kernel, weights.get("embeddings.patch_embedding.bias"))
    if config.has_class:
        x = torch.cat((weights["embeddings.class_embedding"][None], x))
    x = x + weights["embeddings.position_embedding.weight"]
    return _norm(config, weights, "pre_layrnorm", x) if config.has_class else x


def _layer(config: VisionConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    normed = _norm(config, weights, f"{name}.layer_norm1", x)
    q, k, v = (
        _linear(weights, f"{name}.self_attn.{kind}_proj", normed).unflatten(1, (config.num_heads, -1)).transpose(0, 1)
        for kind in ("q", "k", "v")
    )
    attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
    x = x + _linear(weights, f"{name}.self_attn.out_proj", attended)
    normed = _norm(config, weights, f"{name}.layer_norm2", x)
    activate = ACTIVATIONS[config.activation]
    return x + _linear(weights, f"{name}.mlp.fc2", activate(_linear(weights, f"{name}.mlp.fc1", normed)))


def _norm(config: VisionConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (config.dim,), weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
