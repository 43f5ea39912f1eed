"""A Llama-shaped decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Owns the shapes, the forward pass and the initial weights of a dense decoder. It must not know how it is
sharded: weights are ordinary parameters, and the only place that meets a DTensor is `_fill_normal_`, which
writes the rows this rank has.

Parameters carry the names of Hugging Face's Llama checkpoints (less their `model.` prefix).

Shapes: B batch, T tokens, D model, N heads, K kv heads, H head dim, V vocabulary.
"""

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

IGNORE_INDEX = -100  # a target of this value takes no part in the loss

_INIT_STD = 0.02
_ROWS_PER_DRAW = 1024


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; what is derived from it are integers, known before anything is allocated."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim must be a multiple of 2 * num_heads (rotary positions turn pairs of elements), "
                f"got dim {self.dim} and num_heads {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def block_num_weights(self) -> int:
        """Elements of one block's matrices: attention's four and the feed-forward's three."""
        attention = 2 * self.dim * self.dim + 2 * self.dim * self.num_kv_heads * self.head_dim
        return attention + 3 * self.dim * self.ffn_dim

    @property
    def block_num_params(self) -> int:
        """Elements of one block: its matrices and its two norms."""
        return self.block_num_weights + 2 * self.dim

    @property
    def num_params(self) -> int:
        """Elements of the whole model: blocks, last norm, embedding, and the head unless it is tied."""
        num_vocab_matrices = 1 if self.tie_embeddings else 2
        blocks = self.num_layers * self.block_num_params
        return blocks + self.dim + num_vocab_matrices * self.vocab_size * self.dim

    def train_flops(self, batch_size: int, seq_len: int) -> int:
        """Floating-point operations of one forward and backward over (B, T) tokens, without recomputation.

        Chowdhery et al., "PaLM", 2022, appendix B: 6 per weight and token, plus 12 * layers * dim * T per
        token for attention. Two refinements: only weights that enter a matrix product count (the embedding is
        a lookup, norms are negligible), and attention is causal, which halves its term.
        """
        num_matmul_weights = self.num_layers * self.block_num_weights + self.vocab_size * self.dim
        attention_per_token = 6 * self.num_layers * self.dim * seq_len
        return batch_size * seq_len * (6 * num_matmul_weights + attention_per_token)


# Llama 3.1 8B, and Llama 3.2 3B and 1B, whose heads are tied; `tiny` is for tests.
PRESETS = {
    "tiny": DecoderConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=176, vocab_size=512),
    "1b": DecoderConfig(
        dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        ffn_dim=8192,
        vocab_size=128256,
        tie_embeddings=True,
    ),
    "3b": DecoderConfig(
        dim=3072,
        num_layers=28,
        num_heads=24,
        num_kv_heads=8,
        ffn_dim=8192,
        vocab_size=128256,
        tie_embeddings=True,
    ),
    "8b": DecoderConfig(dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14336, vocab_size=128256),
}


class Attention(nn.Module):
    """Causal self-attention in which `num_heads // num_kv_heads` query heads share one key and value head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states x (B, T, D) and rotary tables (T, H) to (B, T, D)."""
        q = apply_rope(self._heads(self.q_proj(x)), cos, sin)  # (B, N, T, H)
        k = apply_rope(self._heads(self.k_proj(x)), cos, sin)  # (B, K, T, H)
        v = self._heads(self.v_proj(x))  # (B, K, T, H)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, N, T, H)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:  # (B, T, heads * H) -> (B, heads, T, H)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer block: the natural unit of sharding."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states x (B, T, D) and rotary tables (T, H) to (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token embedding, blocks, last norm, head.

    Built on the meta device it holds no bytes: shard it, call `to_empty(device=...)`, then `init_weights()`.
    Built anywhere else it is initialised at once.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._tie_head()
        if not self.embed_tokens.weight.is_meta:
            self.init_weights()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); with targets (B, T), the mean loss instead, an fp32 scalar."""
        x = self.embed_tokens(tokens)  # (B, T, D)
        cos, sin = rope_tables(self.config, x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.lm_head(self.norm(x))
        return logits if targets is None else next_token_loss(logits, targets)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill every parameter: norms with 1, matrices from a normal distribution of standard deviation 0.02.

        Matrices that write into the residual stream are scaled by 1 / sqrt(2 * layers) (Radford et al.,
        "Language Models are Unsupervised Multitask Learners", 2019, section 2.3). The values depend on `seed`
        and the device type alone, not on the sharding, the world size or torch's global generators: a sharded
        model starts from the bits of an unsharded one. Raises RuntimeError while a parameter is on the meta
        device.
        """
        self._tie_head()  # to_empty gives each of two names a tensor of its own
        residual_std = _INIT_STD * (2 * self.config.num_layers) ** -0.5
        for param_index, (name, param) in enumerate(self.named_parameters()):
            if param.is_meta:
                raise RuntimeError(f"'{name}' is on the meta device: call to_empty(device=...) before init_weights()")
            if param.dim() == 1:
                param.fill_(1.0)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else _INIT_STD
                _fill_normal_(param, std, f"{seed}.{param_index}")

    def _tie_head(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, T, V) over the targets (B, T) that are not `IGNORE_INDEX`, in fp32.

    The logits keep their dtype, since an fp32 copy of them would be the largest activation of a step (softmax
    accumulates in fp32 inside its kernel in any case); only the mean over tokens is taken in fp32.
    """
    losses = F.cross_entropy(  # (B * T,)
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.float().sum() / (targets != IGNORE_INDEX).sum()


def rope_tables(config: DecoderConfig, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, H) for hidden states x (B, T, D), in their dtype and on their device.

    Su et al., "RoFormer", 2021, section 3.4.2. Computed in fp32 once a forward, a handful of small kernels: a
    table kept on the module would be lost by `to_empty`, and one cached at first use may be a fake tensor or
    one of inference mode.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=x.device, dtype=torch.float32) / config.head_dim
    positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    angles = torch.outer(positions, config.rope_theta**-exponents).repeat(1, 2)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, heads, T, H) by the angles of its positions; element i is paired with element i + H / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _fill_normal_(param: Tensor, std: float, key: str) -> None:
    """Fill this rank's rows of `param` (rows, cols); equal keys give equal values under any sharding.

    Rows are drawn in groups, each from its own generator, so that a rank draws little more than its own rows
    and never holds a full matrix.
    """
    local, row_start, col_start = _local_rows(param)
    num_rows, num_cols = param.shape
    row_end = row_start + local.shape[0]
    for start in range(row_start - row_start % _ROWS_PER_DRAW, row_end, _ROWS_PER_DRAW):
        generator = torch.Generator(local.device).manual_seed(zlib.crc32(f"{key}.{start}".encode()))
        end = min(start + _ROWS_PER_DRAW, num_rows)
        draw = torch.empty(end - start, num_cols, device=local.device, dtype=torch.float32)
        draw.normal_(std=std, generator=generator)
        low, high = max(start, row_start), min(end, row_end)
        cols = slice(col_start, col_start + local.shape[1])
        local[low - row_start : high - row_start].copy_(draw[low - start : high - start, cols])


def _local_rows(param: Tensor) -> tuple[Tensor, int, int]:
    """The part of `param` (rows, cols) in this rank's memory, and the row and column at which it starts."""
    if not isinstance(param, DTensor):
        return param, 0, 0
    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return param.to_local(), offset[0], offset[1]
