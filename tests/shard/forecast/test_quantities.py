"""The numbers of a forecast: the peak is the highest phase, every category is shown, and JSON has them all."""

import json

from yafsdp_like.memory.plan import KINDS, MemoryPlan, Region
from yafsdp_like.shard.forecast.quantities import (
    CATEGORIES,
    ENGINE,
    OF_KIND,
    ModuleCost,
    PhaseMemory,
    TrainingForecast,
    Transfer,
)

GIB = 1 << 30
PLAN = MemoryPlan(2, (Region("a.main_shard", "main_shard", GIB),))
FORWARD = PhaseMemory("forward", {"main shards": GIB, "activations": 3 * GIB}, "layers.1")
UPDATE = PhaseMemory("update", {"main shards": GIB, "optimizer states": 2 * GIB}, host_nbytes={"copies": GIB})
FORECAST = TrainingForecast(
    PLAN,
    (FORWARD, UPDATE),
    (ModuleCost("a", "forward", "matrix products", 12, 1, 2, 1), ModuleCost("a", "backward", "other", 0, 1, 2, 1)),
    (Transfer("a", "forward", "all-gather", "peers", 5), Transfer("a", "backward", "reduce-scatter", "peers", 7)),
)


def test_the_peak_is_the_phase_that_takes_most() -> None:
    assert FORECAST.peak is FORWARD and FORECAST.peak.total_nbytes == 4 * GIB
    assert FORWARD.engine_nbytes == GIB
    assert FORECAST.fits(4 * GIB) and not FORECAST.fits(4 * GIB - 1)


def test_the_table_and_the_json_say_the_same() -> None:
    text, data = str(FORECAST), json.loads(json.dumps(FORECAST.as_dict()))
    assert "peak: 4.00 GiB in forward, at layers.1" in text
    assert "optimizer states" in text and "staging" not in text and "host: copies" in text
    assert data["peak"] == {"phase": "forward", "at": "layers.1", "total_nbytes": 4 * GIB}
    assert data["phases"][0]["nbytes"] == dict(FORWARD.nbytes)
    assert data["link_nbytes"] == {"peers": 12} and data["flops"] == 12


def test_every_kind_of_region_of_a_training_plan_has_a_category() -> None:
    """Prevents: a new kind of region that no table shows."""
    of_serving = {
        name for name in KINDS if name.split()[0] in ("weights", "weight", "kv", "host", "workspace", "adapter")
    }
    of_serving |= {"logits", "tables", "slabs"}
    assert set(KINDS) - of_serving | {"host staging"} == set(OF_KIND)
    assert set(ENGINE) <= set(CATEGORIES)
