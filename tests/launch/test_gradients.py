"""What the launcher does to gradients, whichever optimizer gets them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launch.gradients import Gradients
from launch.world import World
from tests.ranks import on_ranks
from tests.training import world_mesh
from yafsdp_like.optim import AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_ranks()
def test_this_packages_adamw_clips_in_its_update_to_the_same_bits(dtype: torch.dtype) -> None:
    """Beside an optimizer for which gradients are scaled in place."""
    world, results = World(dist.get_rank(), torch.device("cpu"), world_mesh()), []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(7, 5)
        adamw = AdamW(model.parameters(), moments="bf16")
        gradients = Gradients(model, torch.optim.SGD(model.parameters()) if in_place else adamw, 0.25, world)
        norms = []
        for step in range(3):
            for p in model.parameters():
                p.grad_dtype = dtype
                p.grad = torch.randn(p.shape).to(dtype)
            before = [p.grad.clone() for p in model.parameters()]
            norms.append(gradients.finish(step, wishes_stop=False).norm)
            assert in_place != all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
            adamw.step()
        results.append([*norms, *model.parameters()])
    assert min(results[0][:3]) > 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
