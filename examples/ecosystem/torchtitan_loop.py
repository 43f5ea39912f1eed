"""A loop in torchtitan's shape: a mesh, parallelize the meta model, materialize, train, checkpoint by DCP.

    torchrun --nproc-per-node 2 examples/ecosystem/torchtitan_loop.py

All that differs from torchtitan's is where `fully_shard` comes from. Runs on GPUs where there are some.
"""

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from yafsdp_like import MixedPrecisionPolicy, fully_shard
from yafsdp_like.models import PRESETS, Decoder

WARMUP, NUM_STEPS, SAVED = 4, 12, 6

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")


def parallelize(model: Decoder, mesh: DeviceMesh) -> None:
    """Checkpoint activations of each block, then shard block by block, the last one without releasing it."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
    for index, layer in enumerate(model.layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=index < len(model.layers) - 1)
    fully_shard(model, mesh=mesh, mp_policy=policy)


class Training(Stateful):
    """What a checkpoint holds: weights, moments, and where the schedule is."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.model = Decoder(PRESETS["tiny"])
        parallelize(self.model, init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",)))
        self.model.to_empty(device=device)
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                whole = torch.ones(value.shape)
                if value.dim() > 1:
                    whole.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(len(name)))
                assert isinstance(value, DTensor)
                value.copy_(torch.distributed.tensor.distribute_tensor(whole, value.device_mesh, value.placements))
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / WARMUP))

    def state_dict(self) -> dict[str, Any]:
        """Called by DCP on every rank, to save and to know where to load to."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": moments, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by DCP with what it has read."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        self.schedule.load_state_dict(state_dict["schedule"])

    def run(self, steps: range) -> list[float]:
        """The losses of these steps, each the mean of all ranks."""
        losses = []
        for step in steps:
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            tokens = torch.randint(64, (4, 33), generator=generator).to(device)
            loss = self.model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
            assert not isinstance(norm, DTensor) or norm.full_tensor().isfinite()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            losses.append(mean.item())
        return losses


training = Training()
directories = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
dist.broadcast_object_list(directories, src=0)
first = training.run(range(SAVED))
dcp.save({"training": training}, checkpoint_id=directories[0])
second = training.run(range(SAVED, NUM_STEPS))

resumed = Training()
dcp.load({"training": resumed}, checkpoint_id=directories[0])
again = resumed.run(range(SAVED, NUM_STEPS))
if dist.get_rank() == 0:
    print("wrapped by", type(training.model).__mro__[1].__module__)
    print("losses:", *first, *second)
assert again == second, (again, second)
dist.destroy_process_group()
