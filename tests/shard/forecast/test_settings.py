"""Forecasts under settings: the same as of a model that is cut and traced for them alone, and traced seldom."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from yafsdp_like.hardware import H200_MACHINE
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.shard.forecast import fit, settings
from yafsdp_like.shard.forecast.fit import Search, Settings
from yafsdp_like.shard.forecast.settings import SettingsForecaster, token_batch
from yafsdp_like.shard.forecast.traced_units import Cluster
from yafsdp_like.shard.spec.unit_spec import UnitPolicy

BASE = Settings(global_batch_size=16, seq_len=64, micro_batch_size=4, num_ranks=2)
POLICY = UnitPolicy(MixedPrecisionPolicy(torch.bfloat16, torch.float32), None)


def make() -> tuple[nn.Module, list[nn.Module]]:
    with torch.device("meta"):
        model = Decoder(PRESETS["tiny"])
    return model, list(model.layers)


def forecaster() -> SettingsForecaster:
    return SettingsForecaster(make, token_batch, POLICY, Cluster(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"moments": "int8"},
        {"offload_moments": True},
        {"offload_moments": "and_remainder", "split_master": True},
        {"split_master": True},
        {"checkpointing": True},
        {"offload_activations": True, "seq_len": 4096},
        {"update_in_backward": True},
        {"offload_parameters": True},
        {"num_ranks": 4, "micro_batch_size": 2},
    ],
    ids=str,
)
def test_a_forecaster_that_was_asked_before_says_what_a_new_one_says(changes: dict[str, Any]) -> None:
    used = forecaster()
    before = used(BASE)
    changed = replace(BASE, **changes)
    assert used(changed).as_dict() == forecaster()(changed).as_dict() != before.as_dict()
    assert used(BASE).as_dict() == before.as_dict()


def test_a_change_of_the_optimizer_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    used, traced = forecaster(), settings.trace_step
    calls: list[Any] = []
    monkeypatch.setattr(settings, "trace_step", lambda *args: calls.append(args) or traced(*args))
    for moments in ("fp32", "bf16", "int8"):
        used(replace(BASE, moments=moments))
    used(replace(BASE, offload_moments=True))
    assert len(calls) == 1
    used(replace(BASE, seq_len=128))
    assert len(calls) == 2


def test_more_ranks_trace_nothing_where_they_move_bytes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    used, traced = forecaster(), settings.trace_step
    calls: list[Any] = []
    monkeypatch.setattr(settings, "trace_step", lambda *args: calls.append(args) or traced(*args))
    found = [used(replace(BASE, num_ranks=n, micro_batch_size=2)) for n in (2, 4, 8)]
    assert len(calls) == 2  # one with several backwards a step, and one with one
    shards = [phase.nbytes["gradient shards"] for f in found for phase in f.phases if phase.phase == "update"]
    assert shards[0] > shards[1] > shards[2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moments": "int8"},
        {"offload_moments": True},
        {"offload_moments": "and_remainder", "split_master": True},
        {"update_in_backward": True},
        {"offload_parameters": True},
        {"split_master": True, "checkpointing": True},
    ],
    ids=str,
)
def test_what_settings_take_at_least_is_what_an_update_finds_beside_activations(changes: dict[str, Any]) -> None:
    used, asked = forecaster(), replace(BASE, **changes)
    least, found = used.least_nbytes(asked), used(asked)
    update = next(phase for phase in found.phases if phase.phase == "update")
    others = ("activations", "logits and loss", "allocator")
    assert least == update.total_nbytes - sum(update.nbytes.get(name, 0) for name in others)
    assert least <= found.peak.total_nbytes


def test_checkpointing_keeps_less_and_computes_more() -> None:
    used = forecaster()
    plain, again = used(BASE), used(replace(BASE, checkpointing=True))
    assert again.peak.total_nbytes < plain.peak.total_nbytes and again.flops > plain.flops


def test_the_tail_of_a_roots_reduction_is_its_embedding() -> None:
    small = forecaster()
    assert small(BASE).root_tail == 1.0  # nothing is reduced early
    with torch.device("meta"):
        wide = Decoder(replace(PRESETS["tiny"], vocab_size=1 << 17, dim=128))
    found = SettingsForecaster(lambda: (wide, list(wide.layers)), token_batch, POLICY, Cluster(2))(BASE).root_tail
    assert found == pytest.approx(0.5, abs=0.01)


def test_offloaded_activations_leave_the_device_and_cross_the_link_in_both_directions() -> None:
    with torch.device("meta"):
        deep = [Decoder(replace(PRESETS["tiny"], num_layers=4)) for _ in range(2)]
    used = SettingsForecaster(lambda: ((model := deep.pop()), list(model.layers)), token_batch, POLICY, Cluster(2))
    long = replace(BASE, seq_len=4096)
    plain, offloaded = used(long), used(replace(long, offload_activations=True))
    assert used(long).as_dict() == plain.as_dict()  # each has a model of its own
    kept = plain.phases[1].nbytes["activations"], offloaded.phases[1].nbytes["activations"]
    assert offloaded.peak.total_nbytes < plain.peak.total_nbytes and kept[1] < 0.6 * kept[0]
    on_host = {phase.phase: phase.host_nbytes.get("activations", 0) for phase in offloaded.phases}
    assert on_host["start"] == 0 < on_host["forward"] == on_host["update"] and not plain.link_nbytes().get("host")
    moved = [t for t in offloaded.transfers if t.operation.startswith("activations")]
    assert {t.unit for t in moved if t.phase == "forward"} == {f"layers.{n}" for n in range(4)}
    assert (
        len({t.nbytes for t in moved}) == 1 and sum(t.phase == "backward" for t in moved) == 3
    )  # the last one is there
    assert sum(t.nbytes for t in moved if t.phase == "forward") == on_host["forward"]


def test_offloaded_remainders_leave_the_device_and_cross_the_link_with_the_moments() -> None:
    used = forecaster()
    kept = used(replace(BASE, split_master=True, offload_moments=True))
    offloaded = used(replace(BASE, split_master=True, offload_moments="and_remainder"))
    nbytes = kept.plan.nbytes_of("main_shard")
    assert kept.plan.nbytes - offloaded.plan.nbytes == nbytes == offloaded.plan.host_nbytes > 0
    for before, after in zip(kept.phases, offloaded.phases, strict=True):
        assert after.nbytes.get("main shards", 0) == 0 and before.nbytes["main shards"] == nbytes
        assert after.host_nbytes["shards and gradients"] == nbytes
    moved = {t.operation: t.nbytes for t in offloaded.transfers if t.link == "host"}
    assert moved["moments in"] == moved["moments out"] >= 4 * moved["remainders in"]  # each tensor of theirs is aligned
    assert moved["remainders in"] == moved["remainders out"] == 2 * PRESETS["tiny"].num_params // BASE.num_ranks


def test_a_search_over_a_real_model_finds_what_fits() -> None:
    used = forecaster()
    roomy = Search(used, 1 << 40, H200_MACHINE)
    assert fit.what_fits(roomy, BASE)[0].settings.micro_batch_size == 8
    most = used(BASE).peak.total_nbytes
    tight = Search(used, int(most / (1 - fit.SLACK)) - 1000, H200_MACHINE)
    found = fit.smallest_changes(tight, BASE)
    assert {len(one.changes) for one in found} == {1} and all(one.nbytes < most for one in found)
