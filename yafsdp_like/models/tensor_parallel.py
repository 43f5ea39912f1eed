"""How ranks that compute a decoder together cut its layers: who has which heads, and which part of the feed-forward.

Owns one plan of PyTorch's parallel styles. ``parallelize`` applies it to a module; ``cuts_of`` says what it would do to
each parameter, in integers, without a process group, for those who lay parameters out themselves.

A rank has ``num_heads / W`` heads of queries, the ``num_kv_heads / W`` that they read, and ``ffn_dim / W`` of the
feed-forward, or of every expert's: rows of the projections into them, columns of those out of them, so that two sums
over ranks a layer make the hidden states whole again (Shoeybi et al., "Megatron-LM", 2019). All else is whole on every
rank, the router too, so that all choose the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
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
    plan: dict[str, ParallelStyle] = {f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"}
    plan["self_attn.o_proj"] = RowwiseParallel()
    if config.experts is None:
        plan |= {f"mlp.{x}_proj": ColwiseParallel() for x in ("gate", "up")}
        plan["mlp.down_proj"] = RowwiseParallel()
    else:
        plan["mlp.experts"] = _ExpertsParallel()
    if config.qk_norm:  # whole on all ranks, but each norms its own heads, so that gradients are to be summed
        plan |= {f"self_attn.{x}_norm": SequenceParallel(sequence_dim=_HEADS_DIM, use_local_output=True) for x in "qk"}
    return plan


def parallelize(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Cuts the layers of ``model`` over the one dimension of ``mesh``, in place; what it computes stays the same.

    Raises ValueError as ``share_of`` does.
    """
    share_of(model.config, mesh.size())
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        parallelize_module(block, mesh, block_plan(model.config.of_layer(index)))
    return model


class _ExpertsParallel(ParallelStyle):
    """Rows of every expert's gate and up, and columns of its down; what is given and returned is whole."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        hooks: Any = (self._partition, self._to_all_ranks, self._sum)  # typed as if they returned nothing
        return distribute_module(module, device_mesh, *hooks)

    def _partition(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for own_name, param in list(module.named_parameters(recurse=False)):
            placements = [Shard(2 if own_name == "down_proj" else 1)]
            cut = distribute_tensor(param, mesh, placements, src_data_rank=self.src_data_rank)
            module.register_parameter(own_name, nn.Parameter(cut))

    @staticmethod
    def _to_all_ranks(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
        rows, counts = inputs
        return DTensor.from_local(rows, mesh, [Replicate()], run_check=False), counts

    @staticmethod
    def _sum(module: nn.Module, outputs: DTensor, mesh: DeviceMesh) -> torch.Tensor:
        return outputs.redistribute(placements=[Replicate()]).to_local()


def share_of(config: DecoderConfig, num_ranks: int) -> DecoderConfig:
    """The decoder of fewer heads and a narrower feed-forward that one of ``num_ranks`` computes.

    Raises ValueError where heads or the feed-forward cannot be cut evenly.
    """
    for name in ("num_heads", "num_kv_heads", "ffn_dim", "dense_ffn_dim"):
        if (getattr(config, name) or 0) % num_ranks:
            raise ValueError(
                f"tensor_parallel over {num_ranks} ranks needs num_heads, num_kv_heads and ffn_dim that are multiples "
                f"of {num_ranks}, found {name} {getattr(config, name)}; use fewer ranks, or another mode"
            )
    return replace(
        config,
        num_heads=config.num_heads // num_ranks,
        num_kv_heads=config.num_kv_heads // num_ranks,
        ffn_dim=config.ffn_dim // num_ranks,
        dense_ffn_dim=None if config.dense_ffn_dim is None else config.dense_ffn_dim // num_ranks,
        custom_head_dim=config.head_dim,
    )


@cache
def cuts_of(config: DecoderConfig, num_ranks: int) -> Mapping[str, Cut]:
    """The parameters of blocks that ``parallelize`` cuts, by their names there; the others are whole.

    Raises ValueError as ``share_of`` does.
    """
    share_of(config, num_ranks)
    own_configs = dict.fromkeys(config.of_layer(index) for index in range(config.num_layers))
    return {name: cut for own in own_configs for name, cut in _cuts_of_block(own, num_ranks).items()}


def _cuts_of_block(config: DecoderConfig, num_ranks: int) -> dict[str, Cut]:
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
