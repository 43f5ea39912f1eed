"""Train three steps with DeepSpeed on CPUs, save, and train three more: for `test_deepspeed.py`.

torchrun --nproc-per-node 2 tests/checkpoint/write_with_deepspeed.py STAGE DIRECTORY
"""

import importlib
import json
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

LR = 1e-2


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 3))


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    matrices = [value for value in model.parameters() if value.dim() > 1]
    rest = [value for value in model.parameters() if value.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def train(steps: range, model: Callable[[Tensor], Tensor], update: Callable[[Tensor], None]) -> list[float]:
    """This rank's losses."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = model(torch.randn(4, 7, generator=generator)).square().mean()
        update(loss)
        losses.append(loss.item())
    return losses


def main(stage: int, directory: str) -> None:
    deepspeed = importlib.import_module("deepspeed")
    # It compiles collectives over shared memory, to be faster.
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    dist.init_process_group("gloo")
    model = make_model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "sub_group_size": 40},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups_of(model), lr=LR), config=config)

    def update(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    train(range(3), engine, update)
    engine.save_checkpoint(directory, tag="step3")
    after = train(range(3, 6), engine, update)
    with open(f"{directory}/losses{dist.get_rank()}.json", "w") as file:
        json.dump(after, file)
    if dist.get_rank() == 0:
        tool = importlib.import_module("deepspeed.utils.zero_to_fp32")
        weights = tool.get_fp32_state_dict_from_zero_checkpoint(directory, tag="step3")
        torch.save({name: value.clone() for name, value in weights.items()}, f"{directory}/fp32.pt")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
