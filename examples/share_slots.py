"""Tune a policy by its rewards, with a frozen reference and a critic: three models whose slots take one model's memory.

    torchrun --nproc-per-node 2 examples/share_slots.py

The policy learns to follow each token by the next one. Before it is sampled from, the reference says what the policy
was, and the critic what reward it expects.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from yafsdp_like import fully_shard, share_slots
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.optim import AdamW

VOCAB, SEQ_LEN, BATCH_SIZE, KL_WEIGHT = 8, 16, 16, 0.01


def decoder() -> Decoder:
    """A sharded decoder, with the same values at every call."""
    with torch.device("meta"):
        model = Decoder(PRESETS["tiny"])
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    return model


policy, reference = decoder(), decoder().requires_grad_(False)
critic = nn.Sequential(nn.Embedding(VOCAB, 32), nn.GELU(), nn.Linear(32, 1))
fully_shard(critic)
slots = share_slots(policy=policy, reference=reference, critic=critic)  # before the first forward of any
if dist.get_rank() == 0:
    print(slots.memory_plan())

optimizers = [AdamW(policy.parameters(), lr=3e-3), AdamW(critic.parameters(), lr=1e-2)]
generator = torch.Generator().manual_seed(1 + dist.get_rank())
for step in range(40):
    tokens = torch.randint(VOCAB, (BATCH_SIZE, SEQ_LEN), generator=generator)
    logits = policy(tokens)[..., :VOCAB]  # (B, T, V)
    with torch.no_grad():
        before = reference(tokens)[..., :VOCAB].log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    drawn = torch.multinomial(log_probs.detach().exp().flatten(0, 1), 1, generator=generator).view_as(tokens)
    rewards = (drawn == (tokens + 1) % VOCAB).float()
    with torch.no_grad():
        advantages = rewards - critic(tokens).squeeze(-1)
    gain = (log_probs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) * advantages).mean()
    divergence = F.kl_div(before, log_probs, log_target=True, reduction="none").sum(-1).mean()
    (KL_WEIGHT * divergence - gain).backward()

    F.mse_loss(critic(tokens).squeeze(-1), rewards).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0 and step % 10 == 9:
        print(f"step {step + 1}: reward {rewards.mean().item():.2f}, divergence {divergence.item():.2f} nats")

assert slots.arena_nbytes == slots.memory_plan().nbytes
dist.destroy_process_group()
