"""What CUDA graphs take is planned, and no more is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from yafsdp_like import hardware
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.plan.recordings import SLACK, RecordingBudget, recordings_nbytes
from yafsdp_like.inference.plan.serving_plan import Site, plan_serving
from yafsdp_like.models import PRESETS

MIB = 1 << 20
CONFIG = PRESETS["1b"]
OPTIONS = EngineOptions(memory_limit_nbytes=8 << 30, max_batch_size=8, max_batch_tokens=128, max_seq_len=512)
H200 = Site(hardware=hardware.H200)


class Device:
    """Of which every recording takes `nbytes`, in granules, and the first one more."""

    def __init__(self, nbytes: int, first_nbytes: int) -> None:
        self.nbytes, self.taken, self.count = nbytes, first_nbytes - nbytes, 0

    def record(self) -> None:
        self.count += 1
        self.taken += self.nbytes

    def free_nbytes(self) -> int:
        return 100 * MIB - (-(-self.taken // (2 * MIB)) * 2 * MIB if self.count else 0)


@pytest.mark.parametrize("nbytes", [MIB // 2, MIB, 3 * MIB, 5 * MIB])
@pytest.mark.parametrize("planned", [0, MIB, 40 * MIB, 41 * MIB, 63 * MIB])
def test_recordings_take_no_more_than_is_planned_and_all_of_it_but_one(nbytes: int, planned: int) -> None:
    device = Device(nbytes, first_nbytes=32 * MIB)
    budget = RecordingBudget(planned, device.free_nbytes)
    while budget.record(device.record):
        pass
    assert budget.taken_nbytes == 100 * MIB - device.free_nbytes()
    if (1 + SLACK) * planned < 2 * MIB:
        assert device.count == 0
    else:
        assert planned - 40 * MIB <= budget.taken_nbytes <= max((1 + SLACK) * planned, 32 * MIB)


def test_what_recordings_take_is_left_of_the_limit_and_told() -> None:
    plan = plan_serving(CONFIG, OPTIONS, H200)
    without = plan_serving(CONFIG, replace(OPTIONS, graphs=False), H200)
    assert without.recordings_nbytes == 0
    assert plan.recordings_nbytes == recordings_nbytes(CONFIG, OPTIONS) > 32 * MIB
    missing = without.grid.region_nbytes - plan.grid.region_nbytes
    assert abs(missing - plan.recordings_nbytes) <= plan.grid.slab_nbytes
    assert plan.memory.nbytes + plan.recordings_nbytes <= 8 << 30
    assert "for CUDA graphs of steps" in str(plan) and "CUDA graphs" not in str(without)


@pytest.mark.parametrize(
    ("num_layers", "batch_size", "tokens", "measured"), [(32, 128, 2048, 180), (28, 64, 2048, 154), (2, 96, 1024, 54)]
)
def test_the_planned_bytes_are_what_was_measured(num_layers: int, batch_size: int, tokens: int, measured: int) -> None:
    config, options = replace(CONFIG, num_layers=num_layers), replace(OPTIONS, max_batch_size=batch_size)
    planned = recordings_nbytes(config, replace(options, max_batch_tokens=tokens)) / MIB
    assert measured - 2 <= planned <= 1.05 * measured + 12  # of which 10 for code that those had loaded before


def test_recordings_of_steps_that_bring_weights_are_planned_larger() -> None:
    streamed = plan_serving(CONFIG, replace(OPTIONS, memory_limit_nbytes=3 << 30, host_kv_nbytes=0), H200, "streamed")
    assert streamed.recordings_nbytes == recordings_nbytes(CONFIG, OPTIONS, "streamed")
    assert streamed.recordings_nbytes > plan_serving(CONFIG, OPTIONS, H200).recordings_nbytes
    assert (3 << 30) - streamed.memory.nbytes - streamed.recordings_nbytes >= 0


def test_a_recording_that_brings_the_workspace_does_not_speak_for_the_others() -> None:
    """Engines of a pool served most steps without their graphs: the fourth recording brings 32 MiB, others nothing."""
    taken = iter([2, 2, 2, *[34] * 7])
    free = 100
    budget = RecordingBudget(36 * MIB, lambda: free * MIB)

    def record() -> None:
        nonlocal free
        free = 100 - next(taken)

    assert [budget.record(record) for _ in range(10)] == [True] * 10
    assert budget.taken_nbytes == 34 * MIB


def test_on_a_cpu_nothing_is_recorded() -> None:
    assert plan_serving(CONFIG, OPTIONS).recordings_nbytes == 0


def test_a_model_that_would_fit_without_recordings_is_refused_with_that_remedy() -> None:
    full = plan_serving(CONFIG, replace(OPTIONS, graphs=False, memory_limit_nbytes=None, kv_nbytes=32 * MIB), H200)
    tight = replace(OPTIONS, memory_limit_nbytes=full.memory.nbytes + MIB, kv_nbytes=32 * MIB)
    assert plan_serving(CONFIG, replace(tight, graphs=False), H200, "resident").mode == "resident"
    with pytest.raises(ValueError, match="or with graphs=False, since CUDA graphs take"):
        plan_serving(CONFIG, tight, H200, "resident")
