"""Ranks that are threads of one process, as torch's own tests have them: nothing of a rank is the process's."""

import subprocess
import sys

import pytest

PROGRAM = """
import threading, torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup, _install_threaded_pg
from yafsdp_like import fully_shard

STEPS, results = 4, {}
store = dist.HashStore()
torch.manual_seed(0)
initial = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).state_dict()

def fresh():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    model.load_state_dict(initial)
    return model

def train(rank):
    dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
    model = fresh()
    fully_shard(model[0], reshard_after_forward=True)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
    for step in range(STEPS):
        model(torch.full((2, 3), 0.5 + rank + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    results[rank] = [p.full_tensor().detach() for p in model.parameters()]
    dist.barrier()

torch._C._distributed_c10d._set_thread_isolation_mode(True)
_install_threaded_pg()
threads = [threading.Thread(target=train, args=(rank,), daemon=True) for rank in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(60)
plain = fresh()
optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
for step in range(STEPS):
    sum(plain(torch.full((2, 3), 0.5 + rank + step)).square().sum() / 2 for rank in range(2)).backward()
    optimizer.step()
    optimizer.zero_grad()
for found in (results[0], results[1]):
    for mine, p in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(mine, p.detach())
print("equal")
"""


@pytest.mark.slow
def test_two_threads_of_a_process_train_as_one_rank_does() -> None:
    """Prevents: waiting for ranks that share a process, and sums in place where that backend cannot."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "equal\n", done.stderr
