"""What ``--serve --fit`` promises is what the engine's own plan then holds, and nothing larger fits."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from launch import plan
from launch.fit_serve import ServeFitReport, in_words
from launch.plan_serve import COMMAND, fit_report, forecast_serving
from yafsdp_like.hardware import MACHINE_VARIABLE
from yafsdp_like.inference.plan.serving_plan import ServingPlan
from yafsdp_like.models import PRESETS
from yafsdp_like.models.hf_config import config_to_hf

GIB = 1 << 30


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An H200's published figures, whatever was measured on this machine."""
    monkeypatch.delenv(MACHINE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def search(arguments: Sequence[str], gib: float) -> ServeFitReport:
    return searched(tuple(arguments), gib)


@cache
def searched(arguments: Sequence[str], gib: float) -> ServeFitReport:
    return fit_report(COMMAND.load([*arguments, f"--fit={int(gib * GIB)}"]), int(gib * GIB))


def planned(arguments: Sequence[str], gib: float, changes: Sequence[str] = ()) -> ServingPlan:
    """The plan of a command line on such a GPU."""
    return forecast_serving(COMMAND.load([*arguments, f"--gpu-memory={int(gib * GIB)}", *changes])).plan


def words_of(changes: dict[str, object]) -> list[str]:
    return [in_words(*change) for change in changes.items()]


@pytest.mark.parametrize(
    ("arguments", "gib"),
    [(["preset:8b", "--max-seq-len=8192"], 24), (["preset:8b"], 24), (["preset:3b", "--world-size=2"], 6)],
    ids=str,
)
def test_the_options_of_each_choice_give_the_plan_that_it_promises(arguments: list[str], gib: float) -> None:
    found = search(arguments, gib)
    assert found.fits and len(found.found) >= 2
    for one in found.found:
        plan = planned(arguments, gib, words_of(one.changes))
        assert (plan.mode, plan.max_seq_len, plan.num_context_tokens) == (
            one.mode, one.seq_len, one.num_context_tokens
        )  # fmt: skip
        assert plan.options.kv_dtype in (None, one.settings.kv_dtype)
        assert plan.num_context_tokens // plan.max_seq_len >= one.num_sequences == one.settings.max_batch_size


def test_one_sequence_more_than_a_choice_has_is_not_held() -> None:
    arguments = ["preset:8b", "--max-seq-len=8192"]
    for one in search(arguments, 24).found:
        more = [*words_of(one.changes), f"--max-batch-size={one.num_sequences + 1}", f"--mode={one.mode}"]
        plan = planned(arguments, 24, more)
        assert plan.num_context_tokens // plan.max_seq_len <= one.num_sequences


def test_pages_of_float8_are_no_choice_where_the_checkpoint_s_scales_are_not_served(tmp_path: Path) -> None:
    """Even where nothing fits, and the least is said."""
    said = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"strategy": "attn_head"}}
    raw = config_to_hf(PRESETS["3b"]) | {"quantization_config": said}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = search([str(tmp_path), "--max-seq-len=8192"], 24)
    assert found.fits and {one.settings.kv_dtype for one in found.found} == {"bfloat16"}
    text = search([str(tmp_path)], 0.1).text
    assert "the least is" in text and "float8" not in text


def test_a_choice_costs_time_or_holds_less_or_halves_the_cache() -> None:
    """Streaming is slower and holds more; narrow pages hold twice as many tokens."""
    rows = {(one.mode, one.settings.kv_dtype): one for one in search(["preset:8b", "--max-seq-len=8192"], 24).found}
    resident, streamed = rows["resident", "bfloat16"], rows["streamed", "bfloat16"]
    assert streamed.num_sequences > resident.num_sequences and streamed.seconds > 5 * resident.seconds
    narrow = rows["resident", "float8_e4m3fn"]
    assert narrow.num_sequences in (2 * resident.num_sequences, 2 * resident.num_sequences + 1)
    weights = 2 * 8.03e9 - 2 * 128_256 * 4096  # all but the embedding, read at the rate of a copy
    pages = resident.num_sequences * 8192 * (2 * 32 * 8 * 128 * 2)
    assert resident.seconds == pytest.approx((weights + pages) / 4.25e12, rel=0.01)
    assert [one.seconds for one in rows.values()] == sorted(one.seconds for one in rows.values())


@pytest.mark.parametrize(
    ("arguments", "gib", "names"),
    [
        (["preset:8b", "--mode=resident", "--max-seq-len=8192"], 12, ("mode",)),
        (["preset:8b", "--max-seq-len=131072"], 8, ("max_seq_len",)),
        (["preset:8b", "--mode=resident", "--max-seq-len=131072"], 8, ("mode", "max_seq_len")),
    ],
    ids=str,
)
def test_a_refusal_names_the_fewest_changes_and_no_more_of_each_than_is_needed(
    arguments: list[str], gib: float, names: tuple[str, ...]
) -> None:
    found = search(arguments, gib)
    assert not found.fits and "the smallest changes that would" in found.text
    with pytest.raises(ValueError, match="bytes"):
        planned(arguments, gib)
    one = next(one for one in found.found if set(one.changes) == set(names))
    assert {len(other.changes) for other in found.found} == {len(names)}
    assert planned(arguments, gib, words_of(one.changes)).max_seq_len == one.seq_len
    if "max_seq_len" in names:
        longer = [*words_of(one.changes), f"--max-seq-len={one.seq_len + 128}"]
        with pytest.raises(ValueError, match="bytes"):
            planned(arguments, gib, longer)


def test_where_nothing_helps_the_least_that_would_is_said_and_is_enough() -> None:
    arguments = ["preset:8b", "--mode=resident"]
    found = search(arguments, 2)
    assert not found.fits and found.found == () and "with all that may change; the least is" in found.text
    changes = found.text.rpartition("with ")[2].split()
    least = float(found.text.partition("the least is ")[2].split()[0])
    assert planned(arguments, least + 0.01, changes).mode == "streamed"
    with pytest.raises(ValueError, match=r"bytes are missing|hold a context"):
        planned(arguments, least - 0.1, changes)


def test_the_command_prints_writes_and_ends_by_what_was_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "fit.json"
    assert plan.main(["preset:8b", "--serve", "--fit=24GiB", "--max-seq-len=8192", f"--json={file}"]) == 0
    out, data = capsys.readouterr().out, json.loads(file.read_text())
    assert data["fits"] and len(data["settings"]) == len(out.splitlines()) - 1
    for row, line in zip(data["settings"], out.splitlines()[1:], strict=True):
        assert line.endswith(" ".join(row["changes"])) and f"{row['num_sequences']:,} of 8,192 tokens" in line
    assert plan.main(["preset:8b", "--serve", "--fit=2GiB", "--json=-"]) == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    for more in (["--device=cpu"], ["--memory-limit=3GiB"], ["--slot-map=map.html"]):
        assert plan.main(["preset:8b", "--serve", "--fit=24GiB", *more]) == 2
        assert "fit is of a GPU's whole memory" in capsys.readouterr().err


def test_settings_that_were_asked_for_are_changes_to_nobody() -> None:
    options = COMMAND.load(["preset:8b", "--fit=24GiB", "--kv-dtype=float8_e4m3fn", "--mode=streamed"])
    (found,) = fit_report(replace(options, fit_nbytes=24 * GIB), 24 * GIB).found
    assert set(found.changes) == {"max_batch_size", "max_seq_len"} and found.mode == "streamed"
