"""Shard a model and train it.

    torchrun --nproc-per-node 2 examples/train.py
    python examples/train.py

Uses one GPU a rank where there are GPUs, and CPUs otherwise.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.optim import AdamW

DIM, NUM_BLOCKS, NUM_STEPS = 64, 4, 30

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))

torch.manual_seed(0)  # every rank starts from the same values, of which each keeps its rows
blocks = [nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))]
blocks += [nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM)) for _ in range(NUM_BLOCKS - 1)]
model = nn.Sequential(*blocks).to(device)

policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for block in model:  # one unit per block: all-gathered and released together
    fully_shard(block, mp_policy=policy)
fully_shard(model, mp_policy=policy)  # the root last

if dist.get_rank() == 0:
    print(model.memory_plan())

optimizer = AdamW(model.parameters(), lr=1e-2)
generator = torch.Generator().manual_seed(dist.get_rank())  # each rank has its own data
for step in range(NUM_STEPS):
    x = torch.randn(32, DIM, generator=generator).to(device)
    loss = nn.functional.mse_loss(model(x).float(), x.roll(1, dims=1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.4f}")

dist.destroy_process_group()
