"""Lightning on this runtime: its own strategy for models that shard themselves, and `fully_shard` from here.

    torchrun --nproc-per-node 2 examples/ecosystem/lightning_fabric.py

Fabric's strategy takes such a function; with the Trainer's, a LightningModule does the same in `configure_model`. Saves
on the way and goes on from there to the same losses. Needs lightning: pip install 'yafsdp_like[ecosystem]'. Runs on
GPUs where there are some.
"""

import tempfile

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh

from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.models import PRESETS, Decoder


def shard(model: Decoder, mesh: DeviceMesh) -> Decoder:
    """Called by the strategy with a mesh of (data parallel, tensor parallel) ranks."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=policy)
    fully_shard(model, mesh=mesh["data_parallel"], mp_policy=policy)
    return model


strategy = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
fabric = Fabric(accelerator="gpu" if torch.cuda.is_available() else "cpu", devices=2, strategy=strategy)
fabric.launch()
torch.manual_seed(0)
model = fabric.setup_module(Decoder(PRESETS["tiny"]))
optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))


def train(steps: range) -> list[float]:
    """The losses of these steps, each the mean of all ranks; two micro-batches are accumulated in each."""
    losses = []
    for step in steps:
        for micro in range(2):
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + fabric.global_rank)
            tokens = torch.randint(64, (2, 33), generator=generator).to(fabric.device)
            with fabric.no_backward_sync(model, enabled=micro == 0):
                loss = model(tokens[:, :-1], tokens[:, 1:])
                fabric.backward(loss / 2)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = fabric.all_reduce(loss.detach(), reduce_op="mean")
        assert isinstance(mean, torch.Tensor)
        losses.append(mean.item())
    return losses


directory = fabric.broadcast(tempfile.mkdtemp() if fabric.is_global_zero else "")
first = train(range(6))
fabric.save(directory, {"model": model, "optimizer": optimizer})
second = train(range(6, 12))
fabric.load(directory, {"model": model, "optimizer": optimizer})
again = train(range(6, 12))

fabric.print("wrapped by", type(model.module).__mro__[1].__module__)
fabric.print("losses:", *first, *second)
assert again == second, (again, second)
