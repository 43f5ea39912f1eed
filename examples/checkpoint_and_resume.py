"""Save a sharded model and its optimizer, load them into new ones, and go on to the same losses, bit for bit.

    torchrun --nproc-per-node 2 examples/checkpoint_and_resume.py

Uses PyTorch's distributed checkpoint: every rank writes and reads its own rows, and a checkpoint may be loaded on any
other number of ranks.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from yafsdp_like import fully_shard
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.optim import AdamW


def make() -> tuple[Decoder, AdamW]:
    """A sharded decoder with its first values, and its optimizer."""
    with torch.device("meta"):
        model = Decoder(PRESETS["tiny"])
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    model.init_weights()
    return model, AdamW(model.parameters(), lr=1e-3)


def train(model: Decoder, optimizer: AdamW, steps: range) -> list[float]:
    """The losses of these steps; the data are a function of the step and the rank."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        tokens = torch.randint(64, (4, 33), generator=generator)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


model, optimizer = make()
train(model, optimizer, range(5))

directories = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
dist.broadcast_object_list(directories, src=0)
weights, moments = get_state_dict(model, optimizer)
dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=directories[0])
expected = train(model, optimizer, range(5, 10))

resumed, its_optimizer = make()
weights, moments = get_state_dict(resumed, its_optimizer)  # what to read, and where to put it
state = {"model": weights, "optimizer": moments}
dcp.load(state, checkpoint_id=directories[0])
set_state_dict(resumed, its_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
found = train(resumed, its_optimizer, range(5, 10))

assert found == expected, (found, expected)
if dist.get_rank() == 0:
    print("resumed at step 5:", ", ".join(f"{loss:.4f}" for loss in found))
dist.destroy_process_group()
