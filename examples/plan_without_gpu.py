"""Plan the memory of one rank of 64 for an 8B model, in one process, without a GPU and without its weights.

    python examples/plan_without_gpu.py

A fake process group stands for the other ranks. The plan holds what the runtime allocates; activations, optimizer
states and the communication library's buffers come on top.
"""

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.models import PRESETS, Decoder

NUM_RANKS = 64

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
with torch.device("meta"):
    model = Decoder(PRESETS["8b"])
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in model.layers:
    fully_shard(layer, mp_policy=policy)
fully_shard(model, mp_policy=policy)

print(model.memory_plan())
dist.destroy_process_group()
