"""What the launcher says: sizes in units that people read, and commands that explain themselves."""

from typing import Any

import pytest
import torch

from launch.build import describe_plan
from launch.world import World


class Planned(torch.nn.Module):
    """A stand-in for a sharded model of so many parameters, which has a plan already."""

    def __init__(self, num_params: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_params, device="meta"))

    def memory_plan(self) -> str:
        return "the plan"


class Mesh:
    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("num_params", "moments"), [(100, "400 B"), (870_208, "3.32 MiB"), (16_060_522_496, "59.83 GiB")]
)
def test_moments_are_told_in_units_that_people_read(num_params: int, moments: str) -> None:
    mesh: Any = Mesh()
    words = describe_plan(Planned(num_params), World(0, torch.device("cpu"), mesh))
    assert words == f"the plan\n  AdamW's moments, {moments}, and activations come on top"
