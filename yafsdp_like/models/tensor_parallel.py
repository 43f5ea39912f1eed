"""How ranks that compute a decoder together cut its layers: who has which heads, and which part of the feed-forward.

Owns one plan of PyTorch's parallel styles. ``parallelize`` applies it to a module; ``cuts_of`` says what it would do to
each parameter, in integers, without a process group, for those who lay parameters out themselves.

A rank has ``num_heads / W`` heads of queries, the ``num_kv_heads / W`` that they read, and ``ffn_dim / W`` of the
feed-forward: rows of the projections into them, columns of those out of them, so that two sums over ranks a layer make
the hidden states whole again (Shoeybi et al., "Megatron-LM", 2019). All else is whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from yafsdp_like.models.decoder import Block, Decoder, DecoderConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_HEADS_DIM = 1  # of what norms of heads are given, (B, N, T, H)


@dataclass(frozen=True)
class Cut:
    """Each of ``num_ranks`` ranks has an equal range of a parameter's ``dim``, in order of rank."""

    dim: int
    num_ranks: int

    def part(self, shape: Sequence[int]) -> tuple[int, ...]:
        """One rank's of a parameter of ``shape``."""
        return tuple(size // self.num_ranks if dim == self.dim else size for dim, size in enumerate(shape))

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """That of which a rank's part has ``shape``."""
        return tuple(size * self.num_ranks if dim == self.dim else size for dim, size in enumerate(shape))


def block_plan(config: DecoderConfig) -> dict[str, ParallelStyle]:
    """The style of each of a block's modules that is not just the same on all ranks."""
    into = [f"self_attn.{x}_proj" for x in "qkv"] + [f"mlp.{x}_proj" for x in ("gate", "up")]
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in into}
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    if config.qk_norm:  # whole on all ranks, but each norms its own heads, so that gradients are to be summed
        plan |= {f"self_attn.{x}_norm": SequenceParallel(sequence_dim=_HEADS_DIM, use_local_output=True) for x in "qk"}
    return plan


def parallelize(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Cuts the layers of ``model`` over the one dimension of ``mesh``, in place; what it computes stays the same.

    Raises ValueError as ``share_of`` does.
    """
    share_of(model.config, mesh.size())
    for block in model.layers:
        assert isinstance(block, Block)
        parallelize_module(block, mesh, block_plan(model.config))
    return model


def share_of(config: DecoderConfig, num_ranks: int) -> DecoderConfig:
    """The decoder of fewer heads and a narrower feed-forward that one of ``num_ranks`` computes.

    Raises ValueError where heads or the feed-forward cannot be cut evenly, and for experts.
    """
    if config.experts is not None:
        raise ValueError(f"a decoder with experts cannot be tensor parallel yet, found {config.experts}")
    for name in ("num_heads", "num_kv_heads", "ffn_dim"):
        if getattr(config, name) % num_ranks:
            raise ValueError(
                f"tensor_parallel over {num_ranks} ranks needs num_heads, num_kv_heads and ffn_dim that are multiples "
                f"of {num_ranks}, found {name} {getattr(config, name)}; use fewer ranks, or another mode"
            )
    return replace(
        config,
        num_heads=config.num_heads // num_ranks,
        num_kv_heads=config.num_kv_heads // num_ranks,
        ffn_dim=config.ffn_dim // num_ranks,
        custom_head_dim=config.head_dim,
    )


@cache
def cuts_of(config: DecoderConfig, num_ranks: int) -> Mapping[str, Cut]:
    """The parameters of a block that ``parallelize`` cuts, by their names there; the others are whole.

    Raises ValueError as ``share_of`` does.
    """
    share_of(config, num_ranks)
    with torch.device("meta"):
        block = Block(config)
    # A mesh of numbers only: nothing is sent, and there need be no process group. Its device is one that no other mesh
    # has, since DTensor remembers operations by meshes that are equal, and would take this one for one that can send.
    mesh = DeviceMesh("meta", list(range(num_ranks)), _init_backend=False, _rank=0)
    parallelize_module(block, mesh, block_plan(config), src_data_rank=None)
    return {name: cut for name, param in block.named_parameters() if (cut := _cut(param)) is not None}


def _cut(param: torch.Tensor) -> Cut | None:
    if not isinstance(param, DTensor):
        return None
    (placement,) = param.placements
    if not isinstance(placement, Shard):
        return None
    cut = Cut(placement.dim, param.device_mesh.size())
    assert tuple(param.to_local().shape) == cut.part(param.shape), "share_of refuses what cannot be cut evenly"
    return cut
