"""Forecasts of shapes that were measured on H200s: the phases' peaks by category, as the committed reports have them.

A report's "activations" are all blocks that PyTorch's allocator held and nobody else claims; its categories count the
same bytes as a forecast's, but for a few MiB of tables and workspaces, which a report has under activations.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy

from yafsdp_like.hardware import published_rates
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.shard.forecast.activations import ExampleBatch
from yafsdp_like.shard.forecast.fit import Search, Settings, largest_seq_len
from yafsdp_like.shard.forecast.quantities import TrainingForecast
from yafsdp_like.shard.forecast.settings import SettingsForecaster, token_batch
from yafsdp_like.shard.forecast.traced_units import Cluster, cut
from yafsdp_like.shard.forecast.training_forecast import ForecastOptions, forecast_training
from yafsdp_like.shard.spec.unit_spec import UnitPolicy

RESULTS = Path(__file__).parents[3] / "scripts" / "results"
GIB = 1 << 30
SLACK_GIB = 0.012
MEASURED = {  # categories of a report: those of a forecast
    "main shards": ("main shards",),
    "compute shards": ("compute shards",),
    "moments": ("optimizer states",),
    "gradients": ("gradient shards",),
    "slots": ("gather slots", "gradient slots", "granule ends"),
    "staging": ("staging",),
    "activations": ("activations", "logits and loss"),
}
CASES = [
    ("2026-11-29-h200x2-8b-split.json", 2, 1024),
    ("2026-11-29-h200x2-8b-split.json", 2, 8192),
    ("2026-11-29-h200x2-8b-checkpointing.json", 2, 4096),
    ("2026-11-29-h200-3b-checkpointing.json", 1, 4096),
    ("2026-11-29-h200-3b-split.json", 1, 4096),
]


def rows(file: str, seq_len: int, impl: str = "ours:split_master=True") -> list[dict[str, Any]]:
    report = json.loads((RESULTS / file).read_text())
    return [row for row in report["rows"] if row["impl"] == impl and row["seq_len"] == seq_len]


@cache
def forecast(
    preset: str, num_ranks: int, seq_len: int, checkpointing: str, is_recorded: bool = False
) -> TrainingForecast:
    with torch.device("meta"):
        model = Decoder(PRESETS[preset])
    if checkpointing == "block":
        for index, layer in enumerate(model.layers):
            model.layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
    policy = UnitPolicy(MixedPrecisionPolicy(torch.bfloat16, torch.float32), None, split_master=True)
    tokens = torch.empty(1, seq_len, dtype=torch.int64, device="meta")
    planned = cut(model, list(model.layers), policy, Cluster(num_ranks))
    return forecast_training(model, planned, ExampleBatch((tokens, tokens)), ForecastOptions(is_recorded=is_recorded))


@pytest.mark.parametrize(("file", "num_ranks", "seq_len"), CASES)
def test_peaks_are_those_that_were_measured(file: str, num_ranks: int, seq_len: int) -> None:
    (row,) = rows(file, seq_len)
    found = forecast("8b" if "8b" in file else "3b", num_ranks, seq_len, row["checkpointing"])
    for measured in row["peaks"]:
        (phase,) = (p for p in found.phases if p.phase == measured["phase"])
        for category, parts in MEASURED.items():
            planned = sum(phase.nbytes.get(part, 0) for part in parts) / GIB
            assert planned == pytest.approx(measured[category], abs=SLACK_GIB), (measured["phase"], category)


@pytest.mark.parametrize(("file", "num_ranks", "seq_len"), CASES)
def test_the_device_is_as_full_as_it_was(file: str, num_ranks: int, seq_len: int) -> None:
    (row,) = rows(file, seq_len)
    found = forecast("8b" if "8b" in file else "3b", num_ranks, seq_len, row["checkpointing"])
    assert found.peak.total_nbytes / GIB == pytest.approx(row["device_used_gib"], rel=0.015)
    (update,) = (phase for phase in found.phases if phase.phase == "update")
    reserved = row["peak_reserved_gib"] - row["peak_allocated_gib"]
    assert found.peak.total_nbytes - found.peak.tensors_nbytes > update.nbytes["context"]
    assert found.peak.nbytes["allocator"] / GIB == pytest.approx(reserved, abs=0.8)


def test_what_fit_promises_held_in_each_measured_run_but_a_convolution_s() -> None:
    """On a device of the size that the promise takes at least, also where moments are offloaded, or in backward."""
    report = json.loads((RESULTS / "2026-11-30-forecasts.json").read_text())
    runs = [row for row in report["rows"] if "device" in row and row["model"] != "vit-l"]
    kinds = set()
    for row in runs:
        settings = Settings(
            update_in_backward="in_backward=True" in row["impl"], offload_moments="offload_moments=True" in row["impl"]
        )
        kinds.add(settings)
        planned, measured = (round(row["device"][which] * GIB) for which in ("planned", "measured"))
        assert measured <= settings.with_slack(planned) <= measured * 1.05, row["impl"]
    assert len(runs) >= 40 and len(kinds) == 3


@pytest.mark.parametrize("seq_len", [1024, 4096])
def test_a_recorded_step_fills_the_device_as_far_as_it_did(seq_len: int) -> None:
    (row,) = rows("2026-11-29-h200x2-8b-graph-gradients.json", seq_len, "ours-graph:split_master=True")
    found = forecast("8b", 2, seq_len, "none", is_recorded=True)
    assert found.peak.total_nbytes / GIB == pytest.approx(row["device_used_gib"], rel=0.02)
    (update,) = (phase for phase in found.phases if phase.phase == "update")
    assert update.total_nbytes == found.peak.total_nbytes, "the pool stays"


@pytest.mark.slow
@pytest.mark.parametrize("row", json.loads((RESULTS / "2026-11-29-h200-3b-largest.json").read_text())["rows"][:2])
def test_the_longest_sequence_that_is_promised_trains_and_a_tenth_more_does_not(row: dict[str, Any]) -> None:
    def make() -> tuple[Decoder, list[Any]]:
        with torch.device("meta"):
            model = Decoder(PRESETS["3b"])
        return model, list(model.layers)

    moments = "bf16" if "moments=bf16" in row["impl"] else "fp32"
    settings = Settings(seq_len=8192, split_master=True, moments=moments)  # type: ignore[arg-type]
    policy = UnitPolicy(MixedPrecisionPolicy(torch.bfloat16, torch.float32), None)
    forecast = SettingsForecaster(make, token_batch, policy, Cluster())
    search = Search(forecast, int(row["limit_gib"] * GIB), published_rates("NVIDIA H200"))
    promised = largest_seq_len(search, settings)
    assert promised is not None and promised <= row["largest_seq_len"] < 1.1 * promised
