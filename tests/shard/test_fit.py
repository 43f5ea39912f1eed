"""What fits is found without trying everything, and is what trying everything finds."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from yafsdp_like.hardware import H200_MACHINE
from yafsdp_like.memory.plan import MemoryPlan, Region
from yafsdp_like.shard.forecast import fit
from yafsdp_like.shard.forecast.fit import CHANGES, Fitting, Search, Settings
from yafsdp_like.shard.forecast.quantities import ModuleCost, PhaseMemory, TrainingForecast, Transfer

GIB = 1 << 30
NUMEL = 1 << 30
BASE = Settings(global_batch_size=8, seq_len=4096, micro_batch_size=8)


class Model:
    """A model whose memory is a sum that can be read off its settings; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[Settings] = []

    def __call__(self, s: Settings) -> TrainingForecast:
        assert s not in self.asked, "the same forecast was drawn twice"
        self.asked.append(s)
        tokens = s.seq_len * s.micro_batch_size
        each = {"fp32": 8, "bf16": 4, "int8": 2}[s.moments]
        on_host = s.offload_moments or s.offload_parameters
        main = 2 if s.offload_moments == "and_remainder" else 4 if s.split_master else 6
        nbytes = {
            "main shards": 0 if s.offload_parameters else main * NUMEL // s.num_ranks,
            "optimizer states": GIB // 4 if on_host else each * NUMEL // s.num_ranks,
            "gradient shards": 0 if s.update_in_backward or s.offload_parameters else 4 * NUMEL // s.num_ranks,
            "gather slots": 2 * NUMEL if s.reshard_after_forward is False else NUMEL // 4,
            "activations": tokens * (1 << 17 if s.checkpointing or s.offload_activations else 1 << 20),
        }
        recomputing = 4 / 3 if s.checkpointing else 1.0
        costs = [
            ModuleCost("a", phase, "matrix products", int(n * 2 * NUMEL * tokens * recomputing), 0, 0, 100)
            for phase, n in (("forward", 1), ("backward", 2))
        ]
        moved = []
        if s.offload_activations:
            moved = [Transfer("a", "forward", "activations out", "host", tokens << 20)]
        if on_host:
            moved += [
                Transfer("", "update", f"moments {way}", "host", each * NUMEL // s.num_ranks) for way in ("in", "out")
            ]
        plan = MemoryPlan(s.num_ranks, (Region("a.main_shard", "main_shard", 4 * NUMEL // s.num_ranks),))
        return TrainingForecast(plan, (PhaseMemory("forward", nbytes),), tuple(costs), tuple(moved))


def in_words(name: str, value: Any) -> str:
    return f"{name}={value}"


def search_of(gib: float, may_change: Sequence[str] = tuple(CHANGES)) -> tuple[Search, Model]:
    model = Model()
    return Search(model, int(gib * GIB), H200_MACHINE, may_change), model


def peak(settings: Settings) -> int:
    return Model()(settings).peak.total_nbytes


def everything(search: Search, base: Settings) -> list[Settings]:
    """All settings that fit, by trying each."""
    micro_batches = [replace(base, micro_batch_size=n) for n in (1, 2, 4, 8)]
    return [s for b in micro_batches for s in fit.switched(b, search.may_change) if search.fits(s)]


@pytest.mark.parametrize("gib", [16.0, 24.0, 40.0, 64.0, 100.0])
def test_the_fastest_settings_are_as_fast_as_those_that_trying_all_of_them_finds(gib: float) -> None:
    """But for the few per cent by which narrow moments, or no clipping, make an update shorter."""
    search, model = search_of(gib)
    found = fit.what_fits(search, BASE)
    num_asked = len(model.asked)
    best = min((search.seconds(s) for s in everything(search, BASE)), default=None)
    assert bool(found) == (best is not None) and (best is None or best <= found[0].seconds <= 1.05 * best)
    assert num_asked < len(model.asked) or not found  # trying all asks for more
    for one in found:
        assert one.nbytes == peak(one.settings) <= gib * GIB * (1 - fit.SLACK)


def test_no_set_that_fits_changes_more_than_another_and_is_slower() -> None:
    search, _ = search_of(24)
    found = fit.what_fits(search, BASE)
    assert len(found) > 2
    for one, other in itertools.combinations(found, 2):
        assert not set(one.changes.items()) <= set(other.changes.items())
    assert [f.seconds for f in found] == sorted(f.seconds for f in found)


def test_settings_that_fit_as_they_are_need_no_change() -> None:
    search, _ = search_of(1000)
    found = fit.what_fits(search, BASE)
    assert any(one.changes == {} for one in found)
    found = fit.report(search, BASE, in_words)
    fits, words = found.fits, found.text
    assert fits and "as it is" in words


@pytest.mark.parametrize("gib", [2.0, 10.0, 20.0, 30.0, 60.0])
def test_the_smallest_changes_are_the_fewest_that_fit(gib: float) -> None:
    search, _ = search_of(gib)
    found = fit.smallest_changes(search, BASE)
    count = {len(one.changes) for one in found}
    assert len(count) == 1 and len(found) <= 3
    (fewest,) = count
    for one in found:
        assert search.fits(one.settings) and one.changes == fit.changed(one.settings, BASE)
    fewer = [s for s in everything(search, BASE) if len(fit.changed(s, BASE)) < fewest]
    assert fewer == []


def names(found: Sequence[Fitting]) -> set[str]:
    return {name for one in found for name in one.changes}


def test_where_no_switch_is_enough_shorter_sequences_and_more_ranks_are_found() -> None:
    search, _ = search_of(20, may_change=())
    found = fit.smallest_changes(search, BASE)
    assert names(found) == {"seq_len", "num_ranks"} or names(found) <= {"seq_len", "num_ranks", "micro_batch_size"}
    for one in found:
        if "seq_len" in one.changes:
            longer = replace(one.settings, seq_len=one.settings.seq_len + fit.TOKENS_STEP)
            assert not search.fits(longer)
        if "num_ranks" in one.changes:
            halved = one.settings.num_ranks // 2
            assert not search.fits(replace(BASE, num_ranks=halved, global_batch_size=8 * halved))


def test_nothing_is_promised_where_nothing_helps() -> None:
    search, _ = search_of(0.01, may_change=())
    found = fit.report(search, BASE, in_words)
    fits, words = found.fits, found.text
    assert not fits and "nothing fits" in words and f"{fit.MAX_RANKS} ranks" in words


def bound_of(settings: Settings) -> int:
    """What `Model` takes without activations."""
    found = Model()(settings).phases[0].nbytes
    return sum(found.values()) - found["activations"]


@pytest.mark.parametrize("gib", [0.4, 1.0, 3.0, 10.0])
def test_a_bound_that_needs_no_forecast_changes_no_answer_and_saves_forecasts(gib: float) -> None:
    search, plain = search_of(gib)
    model = Model()
    bounded = replace(search, forecast=model, least_nbytes=bound_of, _known={})
    assert fit.report(bounded, BASE, in_words).text == fit.report(search, BASE, in_words).text
    assert len(model.asked) < len(plain.asked)


def test_a_refusal_names_the_least_that_any_settings_take() -> None:
    search, _ = search_of(0.4)
    model = Model()
    bounded = replace(search, forecast=model, least_nbytes=bound_of, _known={})
    found = fit.report(bounded, BASE, in_words)
    short = [replace(BASE, micro_batch_size=1, seq_len=fit.TOKENS_STEP)]
    short.append(replace(short[0], num_ranks=fit.MAX_RANKS, global_batch_size=8 * fit.MAX_RANKS))
    smallest = fit.least(bounded, BASE)
    candidates = [s for there in short for s in fit.switched(there, search.may_change)]
    assert needed(smallest.settings) == min(map(needed, candidates))
    assert not found.fits and found.found == () and fit.readable(smallest.nbytes) in found.text.splitlines()[-1]
    assert len(model.asked) < len(candidates)


def needed(settings: Settings) -> int:
    """Bytes of the smallest device that they fit."""
    return settings.with_slack(peak(settings))


def test_what_is_forecast_too_low_leaves_more_of_the_device_free() -> None:
    """Prevents: nothing fits, where what takes least leaves too little free, and another takes more and fits."""
    on_device, offloaded = (replace(BASE, offload_moments=on_host) for on_host in (False, True))
    assert (on_device.slack, offloaded.slack) == (fit.SLACK, fit.WIDER_SLACK["offload_moments"])
    assert replace(BASE, update_in_backward=True).slack == fit.WIDER_SLACK["update_in_backward"]
    for settings in (on_device, offloaded):
        for nbytes, fits in ((needed(settings), True), (needed(settings) - 2, False)):
            assert search_of(nbytes / GIB)[0].fits(settings) == fits
    most = replace(BASE, num_ranks=fit.MAX_RANKS, global_batch_size=8 * fit.MAX_RANKS, seq_len=fit.TOKENS_STEP)
    candidates = list(fit.switched(replace(most, micro_batch_size=1), tuple(CHANGES)))
    takes_least, fits_first = (min(candidates, key=by) for by in (peak, needed))
    assert takes_least.slack > fits_first.slack
    search, _ = search_of(needed(fits_first) / GIB)
    assert not search.fits(takes_least) and search.fits(fit.least(search, BASE).settings)


def test_where_two_changes_are_too_few_more_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "MAX_RANKS", 1)
    search, _ = search_of(8, may_change=("split_master", "moments", "update_in_backward"))
    (found,) = fit.smallest_changes(search, replace(BASE, seq_len=512, micro_batch_size=1))
    assert found.changes == {"split_master": True, "moments": "int8", "update_in_backward": True}


def test_the_refusal_names_the_smallest_changes_and_what_they_cost() -> None:
    search, _ = search_of(11, may_change=("split_master", "moments"))
    found = fit.report(search, BASE, in_words)
    fits, words = found.fits, found.text
    assert not fits and "the smallest changes that would" in words
    assert "ms a step, " in words and "micro_batch_size=1, num_ranks=4" in words


@pytest.mark.parametrize(("start", "most"), [(128, None), (4096, None), (1 << 20, None), (4096, 30_000)])
def test_the_longest_sequence_is_the_last_that_fits(start: int, most: int | None) -> None:
    search, model = search_of(64)
    settings = Settings(seq_len=start)
    found = fit.largest_seq_len(search, settings, most)
    assert found is not None and search.fits(replace(settings, seq_len=found))
    longer = found + fit.TOKENS_STEP
    assert (most is not None and longer >= most) or not search.fits(replace(settings, seq_len=longer))
    assert len(model.asked) < 40


@pytest.mark.parametrize("threshold", range(-1, 9))
def test_bisection_finds_the_last_value_that_fits(threshold: int) -> None:
    asked: list[int] = []

    def fits(value: int) -> bool:
        asked.append(value)
        return value <= threshold

    assert fit.largest(range(8), fits) == (None if threshold < 0 else min(threshold, 7))
    assert len(asked) <= 4


@pytest.mark.parametrize(
    ("changes", "is_valid"),
    [
        ({}, True),
        ({"num_ranks": 3}, False),
        ({"micro_batch_size": 3}, False),
        ({"update_in_backward": True, "offload_moments": True}, False),
        ({"offload_moments": True, "moments": "int8"}, True),
        ({"offload_moments": "and_remainder", "moments": "int8"}, False),
        ({"offload_moments": "and_remainder", "split_master": True, "moments": "int8"}, True),
        ({"offload_moments": "and_remainder", "split_master": True, "update_in_backward": True}, False),
        ({"checkpointing": True, "offload_activations": True}, False),
        ({"offload_parameters": True, "split_master": True}, False),
    ],
)
def test_settings_that_cannot_be_combined_are_never_tried(changes: dict[str, Any], is_valid: bool) -> None:
    assert replace(BASE, **changes).is_valid == is_valid
