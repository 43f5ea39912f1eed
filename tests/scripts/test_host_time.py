"""What a sharded unit costs the CPU in a step: counts of calls, which are the same in every run, have bounds."""

import dataclasses

import torch
import torch.distributed as dist

from bench.host_time import HostCosts, unit_costs
from launch.world import World
from tests.ranks import run_ranks
from tests.training import world_mesh

# Of one block of a decoder, nine parameters, beside what the model itself costs. A change that needs more should be
# worth it to every small step: lower the bounds when they fall.
BOUNDS = {
    "forward": HostCosts(package_calls=201, python_calls=235, c_calls=232, torch_ops=1, device_calls=6),
    "backward": HostCosts(package_calls=227, python_calls=290, c_calls=230, torch_ops=-19, device_calls=12),
}


def counts() -> dict[str, HostCosts]:
    world = World(dist.get_rank(), torch.device("cpu"), world_mesh())
    return unit_costs(world, num_timed=0)["unit"]


def test_a_unit_costs_no_more_calls_than_it_did() -> None:
    found = run_ranks(counts)
    for phase, most in BOUNDS.items():
        for costs in found:
            pairs = zip(dataclasses.asdict(costs[phase]).items(), dataclasses.astuple(most), strict=True)
            more = {name: (count, bound) for (name, count), bound in pairs if count > bound}
            assert not more, f"{phase}: counts and their bounds: {more}"


def test_differences_are_of_each_field() -> None:
    difference = (HostCosts(us=8.0, c_calls=6.0) - HostCosts(us=2.0, torch_ops=2.0)).per(2)
    assert difference == HostCosts(us=3.0, c_calls=3.0, torch_ops=-1.0)
