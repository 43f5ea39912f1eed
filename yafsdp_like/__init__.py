"""A sharded training and inference runtime for PyTorch whose long-lived memory is planned before the first step."""

from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

from yafsdp_like.memory.plan import MemoryPlan
from yafsdp_like.shard.api import FSDPModule, UnshardHandle, fully_shard
from yafsdp_like.shard.engine import SpillWarning
from yafsdp_like.shard.graph import GraphedStep

__version__ = "0.1.0"

__all__ = [
    "FSDPModule",
    "GraphedStep",
    "MemoryPlan",
    "MixedPrecisionPolicy",
    "OffloadPolicy",
    "SpillWarning",
    "UnshardHandle",
    "fully_shard",
]
