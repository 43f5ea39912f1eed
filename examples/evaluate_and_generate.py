"""Train a small decoder, evaluate it on held-out sequences, and continue a prompt with the model in memory.

    torchrun --nproc-per-node 2 examples/evaluate_and_generate.py

Every rank makes every forward, since each of them all-gathers parameters; all ranks draw the same tokens. For
throughput save a checkpoint and serve it: ``examples/serve_from_python.py``.
"""

import torch
import torch.distributed as dist

from yafsdp_like import fully_shard
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.optim import AdamW

VOCAB, SEQ_LEN, BATCH_SIZE = 16, 32, 8


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that count upwards modulo ``VOCAB`` from a random start, and their targets; both (B, T)."""
    start = torch.randint(VOCAB, (BATCH_SIZE, 1), generator=generator)
    tokens = (start + torch.arange(SEQ_LEN + 1)) % VOCAB
    return tokens[:, :-1], tokens[:, 1:]


with torch.device("meta"):
    model = Decoder(PRESETS["tiny"])
for layer in model.layers:
    fully_shard(layer)
fully_shard(model)
model.to_empty(device="cpu")
model.init_weights()

optimizer = AdamW(model.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(1 + dist.get_rank())
for _ in range(30):
    model(*batch(generator)).backward()
    optimizer.step()
    optimizer.zero_grad()

model.eval()
with torch.no_grad():
    held_out = torch.Generator().manual_seed(0)  # the same sequences on every rank
    loss = model(*batch(held_out))
    tokens = torch.tensor([[3, 4, 5]])
    for _ in range(8):
        logits = model(tokens)  # (1, T, vocabulary)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(dim=-1)), dim=1)

if dist.get_rank() == 0:
    print(f"held-out loss {loss.item():.4f}")
    print("continued:", tokens[0].tolist())
dist.destroy_process_group()
