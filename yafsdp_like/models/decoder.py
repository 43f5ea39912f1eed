"""A Llama- or Qwen-shaped decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Owns the shapes, the forward pass and the initial weights of a decoder. It must not know how it is sharded: weights
are ordinary parameters, and the only place that sees a DTensor is `_fill_normal_`, which writes the rows this rank
has.

Parameters carry the names of Hugging Face's Llama and Qwen checkpoints (less their `model.` prefix).

Shapes: B batch, T tokens, D model, N heads, K kv heads, H head dim, V vocabulary.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from yafsdp_like.models.moe import ExpertsConfig, MixtureOfExperts
from yafsdp_like.models.quantization import Quantization
from yafsdp_like.models.rope import Rope, RopeScaling, apply_rope
from yafsdp_like.models.vision import VisionConfig
from yafsdp_like.ops.loss import linear_cross_entropy

_INIT_STD = 0.02
_ROWS_PER_DRAW = 1024
_INTO_THE_RESIDUAL = ("o_proj.weight", "down_proj.weight", "experts.down_proj")  # ends of names


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; what is derived from it are integers, known before anything is allocated.

    `num_kv_heads` of `num_heads` is multi-head attention, 1 is multi-query, anything between is grouped-query.
    Raises ValueError for a shape that cannot be.
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    custom_head_dim: int | None = None  # None: dim / num_heads
    qkv_bias: bool = False
    o_bias: bool = False  # of attention's output
    ffn_bias: bool = False  # of a feed-forward's three products; experts have none
    qk_norm: bool = False  # an RMSNorm over each head of queries and of keys, before they are turned
    sliding_window: int | None = None  # keys that a query sees, its own included; None: all before it
    windowed_layers: tuple[int, ...] | None = None  # where the window holds; None: in every layer
    max_seq_len: int = 131_072
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    experts: ExpertsConfig | None = None  # instead of one feed-forward; ffn_dim is then each expert's
    dense_layers: tuple[int, ...] = ()  # that have one feed-forward where others have experts
    dense_ffn_dim: int | None = None  # of those
    quantization: Quantization | None = None  # how layers' matrices are stored, and multiplied when they are served
    kv_scales: tuple[tuple[float, float], ...] | None = None  # of each layer's keys, and values, in pages of float8
    kv_scales_problem: str = ""  # why a checkpoint's keys and values cannot be kept in pages of float8; "": they can
    loss_chunk_size: int = 2048  # tokens whose logits exist at once while the loss is computed
    vision: VisionConfig | None = None  # what images in prompts are seen with, in serving

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.custom_head_dim is None and self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim must be a multiple of 2 * num_heads (rotary positions turn pairs of elements), "
                f"got dim {self.dim} and num_heads {self.num_heads}; or set custom_head_dim"
            )
        if self.custom_head_dim is not None and self.custom_head_dim % 2:
            raise ValueError(
                f"custom_head_dim must be even, since rotary positions turn pairs of elements, "
                f"got {self.custom_head_dim}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        self._check_windowed_layers()
        self._check_dense_layers()
        if self.kv_scales is not None and len(self.kv_scales) < self.num_layers:
            raise ValueError(f"kv_scales must be of {self.num_layers} layers, found those of {len(self.kv_scales)}")

    def _check_sizes(self) -> None:
        """Every number is there for a positive amount of something."""
        for name in (
            "dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "ffn_dim",
            "vocab_size",
            "custom_head_dim",
            "dense_ffn_dim",
            "sliding_window",
            "max_seq_len",
            "rope_theta",
            "norm_eps",
            "loss_chunk_size",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def _check_windowed_layers(self) -> None:
        if self.windowed_layers is None:
            return
        if self.sliding_window is None:
            raise ValueError(f"windowed_layers {self.windowed_layers} need a sliding_window")
        if not set(self.windowed_layers) <= set(range(self.num_layers)):
            raise ValueError(f"windowed_layers must be below num_layers {self.num_layers}, got {self.windowed_layers}")

    def _check_dense_layers(self) -> None:
        if bool(self.dense_layers) != (self.dense_ffn_dim is not None) or (self.dense_layers and self.experts is None):
            raise ValueError(
                f"dense_layers are layers without experts, and need experts in others and a dense_ffn_dim, got "
                f"dense_layers {self.dense_layers}, dense_ffn_dim {self.dense_ffn_dim} and experts {self.experts}"
            )
        if not set(self.dense_layers) <= set(range(self.num_layers)):
            raise ValueError(f"dense_layers must be below num_layers {self.num_layers}, got {self.dense_layers}")

    def of_layer(self, layer_index: int) -> "DecoderConfig":
        """Return the configuration of a layer's block: without experts where the layer has none."""
        if layer_index not in self.dense_layers:
            return self
        assert self.dense_ffn_dim is not None
        return replace(self, ffn_dim=self.dense_ffn_dim, experts=None, dense_layers=(), dense_ffn_dim=None)

    @property
    def head_dim(self) -> int:
        """H."""
        return self.dim // self.num_heads if self.custom_head_dim is None else self.custom_head_dim

    @property
    def rope(self) -> Rope:
        """Rotary positions of all layers."""
        return Rope(self.head_dim, self.rope_theta, self.rope_scaling)

    def window_of(self, layer_index: int) -> int | None:
        """Keys that a query of this layer sees at most, or None."""
        if self.windowed_layers is None or layer_index in self.windowed_layers:
            return self.sliding_window
        return None

    @property
    def block_num_weights(self) -> int:
        """Elements of one block's matrices: attention's four and the feed-forward's three, or all experts'."""
        return self._block_num_weights(1 if self.experts is None else self.experts.num_experts)

    @property
    def block_num_active_weights(self) -> int:
        """Elements of those of one block's matrices that one token meets."""
        return self._block_num_weights(1 if self.experts is None else self.experts.experts_per_token)

    def _block_num_weights(self, num_ffns: int) -> int:
        attention = 2 * self.dim * (self.num_heads + self.num_kv_heads) * self.head_dim
        router = 0 if self.experts is None else self.dim * self.experts.num_experts
        return attention + router + num_ffns * 3 * self.dim * self.ffn_dim

    @property
    def block_num_params(self) -> int:
        """Elements of one block: its matrices, its biases, and its two norms or four."""
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.qkv_bias else 0
        biases += self.dim if self.o_bias else 0
        biases += self.dim + 2 * self.ffn_dim if self.ffn_bias and self.experts is None else 0
        head_norms = 2 * self.head_dim if self.qk_norm else 0
        return self.block_num_weights + biases + 2 * self.dim + head_norms

    @property
    def num_params(self) -> int:
        """Elements of the whole model: blocks, last norm, embedding, and the head unless it is tied."""
        num_vocab_matrices = 1 if self.tie_embeddings else 2
        blocks = sum(self.of_layer(index).block_num_params for index in range(self.num_layers))
        return blocks + self.dim + num_vocab_matrices * self.vocab_size * self.dim

    def train_flops(self, batch_size: int, seq_len: int) -> int:
        """Floating-point operations of one forward and backward over (B, T) tokens, without recomputation.

        Chowdhery et al., "PaLM", 2022, appendix B: 6 per weight and token, plus 12 * layers * heads * head dim * T
        per token for attention. Refinements: only weights that a token meets in a matrix product count (the embedding
        is a lookup, norms are negligible, of the experts it visits few), and of the T x T pairs of attention only
        those that causality and the window leave, T^2 / 2 or W T - W^2 / 2.
        """
        num_matmul_weights, twice_num_pairs = self.vocab_size * self.dim, 0
        for layer_index in range(self.num_layers):
            num_matmul_weights += self.of_layer(layer_index).block_num_active_weights
            window = min(self.window_of(layer_index) or seq_len, seq_len)
            twice_num_pairs += 2 * window * seq_len - window * window
        attention = 6 * self.num_heads * self.head_dim * twice_num_pairs
        return batch_size * (6 * seq_len * num_matmul_weights + attention)


def _qwen3(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_dim: int, **more: Any) -> DecoderConfig:
    """What all of Qwen3 have in common."""
    shape = DecoderConfig(dim, num_layers, num_heads, num_kv_heads, ffn_dim, vocab_size=151_936, custom_head_dim=128)
    return replace(shape, qk_norm=True, max_seq_len=40_960, rope_theta=1_000_000.0, norm_eps=1e-6, **more)


# In order: dim, num_layers, num_heads, num_kv_heads, ffn_dim. `tiny` and `small` are for a laptop. The others have the
# shapes of SmolLM2 135M, Qwen3 0.6B and 30B-A3B, Llama 3.2 1B and 3B, Llama 3.1 8B and 70B; those of Llama without the
# scaling of their rotary positions, which no size depends on.
PRESETS = {
    "tiny": DecoderConfig(64, 2, 4, 2, 176, vocab_size=512),
    "small": DecoderConfig(256, 6, 8, 4, 704, vocab_size=4096, rope_theta=10_000.0, tie_embeddings=True),
    "135m": DecoderConfig(
        576, 30, 9, 3, 1536, vocab_size=49_152, max_seq_len=8192, rope_theta=100_000.0, tie_embeddings=True
    ),
    "0.6b": _qwen3(1024, 28, 16, 8, 3072, tie_embeddings=True),
    "30b-a3b": _qwen3(2048, 48, 32, 4, 768, experts=ExpertsConfig(num_experts=128, experts_per_token=8)),
    "1b": DecoderConfig(2048, 16, 32, 8, 8192, vocab_size=128_256, tie_embeddings=True),
    "3b": DecoderConfig(3072, 28, 24, 8, 8192, vocab_size=128_256, tie_embeddings=True),
    "8b": DecoderConfig(4096, 32, 32, 8, 14336, vocab_size=128_256),
    "70b": DecoderConfig(8192, 80, 64, 8, 28672, vocab_size=128_256),
}


class Attention(nn.Module):
    """Causal self-attention in which `num_heads // num_kv_heads` query heads share one key and value head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=config.o_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states x (B, T, D), rotary tables (T, H) and which keys a query sees (T, T) to (B, T, D).

        Without a mask a query sees every key up to its own.
        """
        q, k, v = self.qkv(x, cos, sin)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, T, H), keys and values (B, K, T, H) of hidden states (B, T, D): what a cache would keep."""
        q = apply_rope(self.q_norm(self._heads(self.q_proj(x))), cos, sin)
        k = apply_rope(self.k_norm(self._heads(self.k_proj(x))), cos, sin)
        return q, k, self._heads(self.v_proj(x))

    def _heads(self, x: Tensor) -> Tensor:  # (B, T, heads * H) -> (B, heads, T, H)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries (B, N, T, H) over keys and values (B, K, T, H), causal or by `mask` (T, T).

    With a mask the kv heads are repeated, since the only fused kernel that takes one knows no groups.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, N, T, H)
    num_groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(num_groups, dim=1), v.repeat_interleave(num_groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, N, T, H)


def window_mask(positions: Tensor, window: int) -> Tensor:
    """Whether the query at position i sees the key at position j: 0 <= i - j < window. (T,) -> (T, T)."""
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance < window)


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.ffn_bias)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.ffn_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer block: the natural unit of sharding."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = (
            FeedForward(config)
            if config.experts is None
            else MixtureOfExperts(config.dim, config.ffn_dim, config.experts)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states x (B, T, D), rotary tables (T, H) and an optional mask (T, T) to (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Linear):
    """The last projection, to logits or, chunk by chunk, to the loss.

    The loss is computed in here because this is where the weight is sure to be whole, also when the head is sharded
    as a unit of its own.
    """

    def forward(self, x: Tensor, targets: Tensor | None = None, chunk_size: int = 0) -> Tensor:
        """Hidden states x (B, T, D) to logits (B, T, V); with targets (B, T), to the mean loss, an fp32 scalar."""
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x.flatten(0, 1), self.weight, targets.flatten(), chunk_size)


class Decoder(nn.Module):
    """Token embedding, blocks, last norm, head.

    Built on the meta device it holds no bytes: shard it, call `to_empty(device=...)`, then `init_weights()`.
    Built anywhere else it is initialised at once.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if config.quantization is not None:
            raise ValueError("quantized weights are served, not trained: load the checkpoint that they were made from")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config.of_layer(index)) for index in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = Head(config.dim, config.vocab_size, bias=False)
        self.tie_head()
        if not self.embed_tokens.weight.is_meta:
            self.init_weights()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); with targets (B, T), the mean loss instead, an fp32 scalar.

        The loss is over the targets that are not `IGNORE_INDEX`, and no more than `loss_chunk_size` tokens' logits
        exist at once. Raises ValueError for more than `max_seq_len` tokens.
        """
        if tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(f"{tokens.shape[1]} tokens are more than max_seq_len {self.config.max_seq_len}")
        x = self.embed_tokens(tokens)  # (B, T, D)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = self.config.rope.tables(positions, x.dtype)
        mask = self._window_mask(positions)
        for layer_index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask if self.config.window_of(layer_index) else None)
        return self.lm_head(self.norm(x), targets, self.config.loss_chunk_size)

    def _window_mask(self, positions: Tensor) -> Tensor | None:  # (T,) -> (T, T)
        """None where the window is as long as the text: then causal attention is the same, and faster."""
        window = self.config.sliding_window
        return None if window is None or window >= len(positions) else window_mask(positions, window)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill every parameter: norms with 1, biases with 0, matrices from a normal distribution.

        Its standard deviation is 0.02; that of matrices that write into the residual stream is scaled by
        1 / sqrt(2 * layers) (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section
        2.3). The values depend on `seed` and the device type alone, not on the sharding, the world size or torch's
        global generators: a sharded model starts from the bits of an unsharded one. Raises RuntimeError while a
        parameter is on the meta device.
        """
        self.tie_head()  # to_empty gives each of two names a tensor of its own
        for param_index, (name, param) in enumerate(self.named_parameters()):
            if param.is_meta:
                raise RuntimeError(f"'{name}' is on the meta device: call to_empty(device=...) before init_weights()")
            fill_first_values(param, name, self.config, f"{seed}.{param_index}")

    def tie_head(self) -> None:
        """Make the head's weight the embedding's again, where the configuration says so; `to_empty` parts them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight


def fill_first_values(param: Tensor, name: str, config: DecoderConfig, key: str) -> None:
    """What `init_weights` gives the parameter `name`; `key` is "seed.i" for the i-th of `named_parameters`."""
    if param.dim() == 1:
        param.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    residual_std = _INIT_STD * (2 * config.num_layers) ** -0.5
    _fill_normal_(param, residual_std if name.endswith(_INTO_THE_RESIDUAL) else _INIT_STD, key)


def _fill_normal_(param: Tensor, std: float, key: str) -> None:
    """Fill this rank's rows of `param` (rows, cols) or (rows, cols, depth).

    Equal keys give equal values under any sharding.
    Rows are drawn in groups, each from its own generator, so that a rank draws little more than its own rows
    and never holds a full matrix. A row of three dimensions, one expert's matrix, is a group of its own.
    """
    local, (row_start, *starts) = _local_part(param)
    rows_per_draw = _ROWS_PER_DRAW if param.dim() == 2 else 1
    num_rows, *row_shape = param.shape
    row_end = row_start + local.shape[0]
    for start in range(row_start - row_start % rows_per_draw, row_end, rows_per_draw):
        generator = torch.Generator(local.device).manual_seed(zlib.crc32(f"{key}.{start}".encode()))
        end = min(start + rows_per_draw, num_rows)
        draw = torch.empty(end - start, *row_shape, device=local.device, dtype=torch.float32)
        draw.normal_(std=std, generator=generator)
        low, high = max(start, row_start), min(end, row_end)
        own = (slice(first, first + size) for first, size in zip(starts, local.shape[1:], strict=True))
        local[low - row_start : high - row_start].copy_(draw[(slice(low - start, high - start), *own)])


def _local_part(param: Tensor) -> tuple[Tensor, Sequence[int]]:
    """The part of `param` (rows, cols, ...) in this rank's memory, and the row, column and so on at which it starts."""
    if not isinstance(param, DTensor):
        return param, [0] * param.dim()
    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return param.to_local(), offset
