"""The text of a run: a vocabulary that fits the model by default, its size and passes told, and its making shown."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from launch import config, corpus, metrics
from launch.config import Config, ModelOptions
from launch.corpus import describe_text, open_text, text_of
from launch.recipe import recipe_of
from tests.launch.test_train import run_here
from tests.ranks import run_ranks
from yafsdp_like.data import DataConfig, Progress, Tokenizer
from yafsdp_like.models import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text(tmp_path: Path) -> DataConfig:
    """One file of 40 documents."""
    rows = [{"text": f"Paragraph {i} says that twice {i} is {2 * i}."} for i in range(40)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(str(tmp_path / "docs.jsonl"), vocab_size=300, cache=str(tmp_path / "cache"))


# --- defaults ---


@pytest.mark.parametrize("preset", PRESETS)
def test_a_vocabulary_trained_by_default_is_one_that_the_model_has_room_for(preset: str) -> None:
    options = Config(model=ModelOptions(preset=preset))
    vocab_size = recipe_of(options.model, options.seed).vocab_size
    assert text_of(options, vocab_size) == DataConfig(vocab_size=min(4096, vocab_size))


def test_weights_from_a_directory_are_met_by_their_own_tokenizer(tmp_path: Path) -> None:
    """Prevents: fine-tuning on token ids that mean something else to the weights."""
    options = Config(model=ModelOptions(preset=None, hf_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"has no tokenizer\.json: set data\.tokenizer to"):
        text_of(options, 512)
    Tokenizer.train(["a b c"], 260).save(tmp_path)
    assert text_of(options, 512) == DataConfig(tokenizer=str(tmp_path))


@pytest.mark.parametrize("said", [DataConfig(vocab_size=300), DataConfig(tokenizer="elsewhere")])
def test_what_is_said_of_the_tokenizer_holds(said: DataConfig) -> None:
    for model in (ModelOptions(), ModelOptions(preset=None, hf_dir="somewhere")):
        assert text_of(Config(model=model, data=said), 512) == said


@pytest.mark.slow
def test_an_empty_configuration_trains_on_the_carried_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"output_dir: {tmp_path / 'run'}\n")
    fewer = ["--num_steps=2", "--evaluation.num_batches=1", "--sample.num_tokens=2", f"--data.cache={tmp_path}"]
    run_ranks(run_here, [str(tmp_path / "config.yaml"), *fewer])
    records = metrics.read_records(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["loss"] == pytest.approx(6.24, abs=0.05)  # ln 512
    assert (tmp_path / "run" / "step-2" / "hf" / "tokenizer.json").exists()


# --- words ---


def test_the_size_of_the_text_and_its_passes_are_told(text: DataConfig) -> None:
    options = Config(data=text, num_steps=25, global_batch_size=4, seq_len=8)
    packed = open_text(options, 300, speaks=False)
    assert describe_text(packed, options) == (
        "text: 1.46 KiB in 40 documents, 442 tokens to train on and 22 held out (documents by hash), of a vocabulary "
        "of 300; 25 steps see 800 tokens, 1.8 passes over the text"
    )
    once = Config(data=text, num_steps=1, global_batch_size=1, seq_len=8)
    assert describe_text(packed, once).endswith("1 steps see 8 tokens, 1.8% of the text")


def test_without_a_terminal_each_thing_has_a_line_and_then_one_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 4.9, 5.0, 5.0, 6.0, 6.0])
    monkeypatch.setattr(corpus.time, "monotonic", lambda: next(clock))
    with corpus.show_progress(speaks=True) as show:
        for what, done in (("reading", 0), ("reading", 10), ("reading", 20), ("reading", 30), ("packing", 0)):
            show(Progress(what, done, 2048))
    assert capsys.readouterr().out == "reading: 2.00 KiB\nreading: 1%\npacking: 2.00 KiB\n"
    with corpus.show_progress(speaks=False) as show:
        show(Progress("reading", 0, 2048))
    assert capsys.readouterr().out == ""


ON_A_TERMINAL = """
from launch.corpus import show_progress
from yafsdp_like.data import Progress
with show_progress(True) as show:
    for done in (0, 500, 1000):
        show(Progress("tokenizing book.txt", done, 1000))
"""


def test_on_a_terminal_a_bar_shows_how_far_it_is() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    run = subprocess.run([sys.executable, "-c", ON_A_TERMINAL], stdout=theirs, env=environment, timeout=60, check=False)
    os.close(theirs)
    words = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert run.returncode == 0
    assert "tokenizing book.txt" in words and "1,000/1,000 bytes" in words


def test_an_own_text_needs_no_more_than_its_name(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Once upon a time there was a text. " * 50)
    options = config.load([f"--data.paths={tmp_path / 'book.txt'}", f"--data.cache={tmp_path / 'cache'}"])
    packed = open_text(options, 512, speaks=False)
    assert packed.header.num_documents == 1 and packed.header.split == "last fraction"


def test_a_tokenizer_larger_than_the_model_is_refused(text: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer has 300 tokens, the model's vocabulary only 299: set"):
        open_text(Config(data=text), 299, speaks=False)


def test_the_making_is_shown_to_who_asks(text: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("launch.corpus.is_terminal", return_value=False):
        open_text(Config(data=text), 300, speaks=True)
        first, second = capsys.readouterr().out.splitlines()[:2]
        assert first == "training a tokenizer of 300 tokens: 2.00 KiB" or first.startswith(
            "training a tokenizer of 300"
        )
        assert second.startswith("tokenizing ") and "docs.jsonl" in second
        open_text(Config(data=text), 300, speaks=True)  # it is there already
    assert capsys.readouterr().out == ""
