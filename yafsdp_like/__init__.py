"""A sharded training and inference runtime for PyTorch whose long-lived memory is planned before the first step.

Names are fetched when they are first asked for, so that a command line is checked without waiting for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
    from torch.distributed.fsdp import DataParallelMeshDims as DataParallelMeshDims  # not in every torch

    from yafsdp_like.memory.plan import MemoryPlan
    from yafsdp_like.shard.api import fully_shard
    from yafsdp_like.shard.drop_in import register_fsdp_forward_method, share_comm_ctx
    from yafsdp_like.shard.forecast.activations import ExampleBatch
    from yafsdp_like.shard.forecast.quantities import TrainingForecast
    from yafsdp_like.shard.forecast.training_forecast import ForecastOptions
    from yafsdp_like.shard.fsdp_module import FSDPModule, GradientReductionHandle, UnshardHandle
    from yafsdp_like.shard.graph import GraphedStep
    from yafsdp_like.shard.oom_letter import explain_out_of_memory
    from yafsdp_like.shard.optimizer_step import update_in_backward
    from yafsdp_like.shard.runtime.activation_offload import offload_activations
    from yafsdp_like.shard.runtime.allocated_memory import SpillWarning
    from yafsdp_like.shard.sharing import SharedSlots, share_slots
    from yafsdp_like.shard.spec.unit_spec import RemainderOffloadPolicy
    from yafsdp_like.shard.stand_in import in_place_of_fsdp2
else:
    _HOMES = {
        "CPUOffloadPolicy": "torch.distributed.fsdp",
        "DataParallelMeshDims": "torch.distributed.fsdp",
        "ExampleBatch": "yafsdp_like.shard.forecast.activations",
        "FSDPModule": "yafsdp_like.shard.fsdp_module",
        "ForecastOptions": "yafsdp_like.shard.forecast.training_forecast",
        "GradientReductionHandle": "yafsdp_like.shard.fsdp_module",
        "GraphedStep": "yafsdp_like.shard.graph",
        "MemoryPlan": "yafsdp_like.memory.plan",
        "MixedPrecisionPolicy": "torch.distributed.fsdp",
        "OffloadPolicy": "torch.distributed.fsdp",
        "RemainderOffloadPolicy": "yafsdp_like.shard.spec.unit_spec",
        "SharedSlots": "yafsdp_like.shard.sharing",
        "SpillWarning": "yafsdp_like.shard.runtime.allocated_memory",
        "TrainingForecast": "yafsdp_like.shard.forecast.quantities",
        "UnshardHandle": "yafsdp_like.shard.fsdp_module",
        "explain_out_of_memory": "yafsdp_like.shard.oom_letter",
        "fully_shard": "yafsdp_like.shard.api",
        "in_place_of_fsdp2": "yafsdp_like.shard.stand_in",
        "offload_activations": "yafsdp_like.shard.runtime.activation_offload",
        "register_fsdp_forward_method": "yafsdp_like.shard.drop_in",
        "share_comm_ctx": "yafsdp_like.shard.drop_in",
        "share_slots": "yafsdp_like.shard.sharing",
        "update_in_backward": "yafsdp_like.shard.optimizer_step",
    }

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})


__version__ = "0.1.0"

__all__ = [
    "CPUOffloadPolicy",
    "ExampleBatch",
    "FSDPModule",
    "ForecastOptions",
    "GradientReductionHandle",
    "GraphedStep",
    "MemoryPlan",
    "MixedPrecisionPolicy",
    "OffloadPolicy",
    "RemainderOffloadPolicy",
    "SharedSlots",
    "SpillWarning",
    "TrainingForecast",
    "UnshardHandle",
    "explain_out_of_memory",
    "fully_shard",
    "in_place_of_fsdp2",
    "offload_activations",
    "register_fsdp_forward_method",
    "share_comm_ctx",
    "share_slots",
    "update_in_backward",
]
