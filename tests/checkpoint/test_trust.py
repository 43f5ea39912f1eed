"""Directories that were made to harm: nothing that comes with a model is run, and nobody is asked whether it may be."""

import builtins
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from launch.config import ModelOptions
from launch.recipe import recipe_of
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.checkpoint import reading, steps
from yafsdp_like.data import Tokenizer
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.weights.loading import open_model
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.models.hf import load_hf_weights, save_hf

transformers = pytest.importorskip("transformers")

CONFIG = DecoderConfig(32, 1, 2, 2, 64, vocab_size=320, max_seq_len=64)


class Touch:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file that is there if anything has run."""
    return tmp_path / "ran"


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever asks is told yes, and that is a failure, also where the error is caught."""
    asked: list[str] = []

    def yes(question: object = "") -> str:
        asked.append(str(question))
        return "y"

    monkeypatch.setattr(builtins, "input", yes)
    yield
    assert not asked


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A good Hugging Face directory."""
    directory = tmp_path / "model"
    write_tokenizer(directory)
    decoder = Decoder(CONFIG)
    decoder.init_weights(0)
    save_hf(decoder, directory)
    return directory


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def plant_checkpoint(directory: Path, trace: Path) -> None:
    """A complete checkpoint by its files' names, whose metadata are a trap."""
    (directory / steps.SHARDS).mkdir(parents=True)
    (directory / steps.METADATA).write_text(json.dumps({"step": 1, "shapes": {}}))
    (directory / steps.SHARDS / ".metadata").write_bytes(pickle.dumps(Touch(trace)))


def read(source: Any, config: DecoderConfig = CONFIG) -> None:
    """All values of an opened model."""
    opened = source.source(torch.device("cpu"))
    for name, parameter in Decoder(config).named_parameters():
        opened.read_into(name, 0, torch.empty(parameter.numel()))


# --- directories ---


@pytest.mark.parametrize("place", ["step-1", "."])
def test_a_directory_with_a_config_is_a_hugging_face_directory_whatever_else_is_there(
    place: str, model: Path, trace: Path
) -> None:
    plant_checkpoint(model / place, trace)
    read(open_model(str(model)))
    assert open_model(str(model)).directory == model
    assert not trace.exists()


def test_weights_that_are_pickles_are_not_read(model: Path, trace: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.bin"):
        torch.save(Touch(trace), model / name)
    read(open_model(str(model)))
    load_hf_weights(Decoder(CONFIG), model)
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors.*pytorch_model\.bin.*not read"):
        open_model(str(model))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_hf_weights(Decoder(CONFIG), model)
    assert not trace.exists()


def test_training_from_a_directory_runs_nothing_of_it(model: Path, trace: Path) -> None:
    plant_code(model, trace)
    plant_checkpoint(model / "step-1", trace)
    recipe = recipe_of(ModelOptions(preset=None, hf_dir=str(model)), seed=0)
    module, _ = recipe.make()
    recipe.fill(module, torch.device("cpu"), from_checkpoint=False)
    Tokenizer.load(model)
    assert not trace.exists()


# --- tokenizers ---


def plant_code(directory: Path, trace: Path, reference: str = "evil.Evil") -> None:
    code = (
        f"open({str(trace)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast, PretrainedConfig\n"
        "class Evil(PreTrainedTokenizerFast): pass\nclass EvilConfig(PretrainedConfig): model_type = 'evil'\n"
    )
    (directory / "evil.py").write_text(code)
    change(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": [reference, reference]})
    change(
        directory / "config.json",
        auto_map=dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.EvilConfig"),
    )


@pytest.mark.parametrize(
    ("tokenizer_config", "config"),
    [
        ({}, {}),
        ({"tokenizer_class": "Evil"}, {}),
        ({"tokenizer_class": "AutoTokenizer"}, {}),
        ({"tokenizer_class": "AutoModel"}, {}),
        ({"tokenizer_class": "AutoConfig"}, {}),
        ({"tokenizer_class": "AutoModelForCausalLMFast"}, {}),
        ({"tokenizer_class": "pipeline"}, {}),
        ({"tokenizer_class": None}, {"model_type": "evil"}),
        ({"tokenizer_class": None}, {"model_type": "evil", "tokenizer_class": "AutoModel"}),
        ({"auto_map": ["evil.Evil", "evil.Evil"], "tokenizer_class": None}, {"model_type": "evil"}),
        ({"auto_map": {"AutoTokenizer": ["other/place--evil.Evil"] * 2}, "tokenizer_class": "Evil"}, {}),
    ],
)
def test_code_beside_a_tokenizer_is_never_run(
    tokenizer_config: dict[str, object], config: dict[str, object], model: Path, trace: Path
) -> None:
    plant_code(model, trace)
    change(model / "tokenizer_config.json", **tokenizer_config)
    change(model / "config.json", **config)
    try:
        codec = Codec.load(model)
    except ValueError as error:
        assert str(model) in str(error)  # noqa: PT017 (not every damage is found)
    else:
        assert codec.decode(codec.encode("fox")) == "fox"
    assert not trace.exists()


def test_a_chat_template_reaches_nothing_outside_itself(model: Path, trace: Path) -> None:
    for escape in (
        "''.__class__.__mro__[1].__subclasses__()",
        "cycler.__init__.__globals__.os.system",
        "raise_exception.__globals__",
        "messages.append(1)",
        "lipsum.__globals__['os']",
    ):
        template = f"{{% set found = {escape} %}}{{{{ found }}}}{{{{ found('touch {trace}') }}}}"
        (model / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match="chat template refuses"):
            Codec.load(model).encode_chat([{"role": "user", "content": "x"}])
    assert not trace.exists()


# --- checkpoints ---


def write_checkpoint(directory: Path, extra: dict[str, Any] | None = None) -> Path:
    """A checkpoint of one process."""
    checkpoint = directory / "step-1"
    state = {
        "model": {"x": torch.arange(6.0)},
        "values": {"lr": 0.1, "betas": (0.9, 0.95), "names": ["a"], **(extra or {})},
    }
    with warnings.catch_warnings(action="ignore"):  # that it is alone
        save(state, storage_writer=FileSystemWriter(checkpoint / steps.SHARDS), no_dist=True)
    (checkpoint / steps.METADATA).write_text('{"step": 1}')
    return checkpoint


def loaded(checkpoint: Path, names: tuple[str, ...] = ("lr", "betas", "names")) -> dict[str, Any]:
    state: dict[str, Any] = {"model": {"x": torch.zeros(6)}, "values": dict.fromkeys(names, 0)}
    steps.load_whole(checkpoint, state)
    return state


def test_what_training_writes_is_read(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    state = loaded(checkpoint)
    assert torch.equal(state["model"]["x"], torch.arange(6.0))
    assert state["values"] == {"lr": 0.1, "betas": (0.9, 0.95), "names": ["a"]}


def test_metadata_that_name_anything_else_are_refused(tmp_path: Path, trace: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    metadata = checkpoint / steps.SHARDS / ".metadata"
    good = FileSystemReader(checkpoint / steps.SHARDS).read_metadata()

    def hidden(**changes: object) -> Any:
        vars(good).update(changes)
        return good

    traps: list[Callable[[], Any]] = [
        lambda: Touch(trace),
        lambda: hidden(planner_data={"x": Touch(trace)}),
        lambda: hidden(planner_data=None, version=Touch(trace)),
        lambda: hidden(version=None, state_dict_metadata={Touch(trace): BytesStorageMetadata()}),
    ]
    for trap in traps:
        metadata.write_bytes(pickle.dumps(trap()))
        whole = {"model": {"x": torch.zeros(6)}}
        with pytest.raises(ValueError, match=r"\.metadata is not the metadata.*names posix\.system"):
            steps.load_whole(checkpoint, whole)
    assert not trace.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"ctorch\nhub.load\n(S'x'\ntR.",
        b"cpickle\nloads\n(S'x'\ntR.",
        b"ctorch.distributed.checkpoint.metadata\nos.system\n(S'true'\ntR.",
        b"cbuiltins\ngetattr\n(S'x'\nS'y'\ntR.",
        b"(dp0\n.",
        b"I1\n.",
        b"",
        b"garbage",
        b"\x80\x04",
    ],
)
def test_other_pickles_are_no_metadata(pickled: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickled)
    with pytest.raises(ValueError, match=r"\.metadata is not the metadata of a distributed checkpoint"):
        reading.read_metadata(tmp_path)


def test_values_beside_tensors_are_plain_ones(tmp_path: Path, trace: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, {"trap": Touch(trace)})
    with pytest.raises(ValueError, match=r"step-1 cannot be read: \w*: Weights only load failed \(rank 0\)"):
        loaded(checkpoint, ("trap",))
    assert not trace.exists()


@pytest.mark.parametrize("elsewhere", ["/etc/hostname", "../../secret.distcp", "a/../../b"])
def test_a_checkpoint_refers_to_no_file_outside_it(elsewhere: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    metadata = FileSystemReader(checkpoint / steps.SHARDS).read_metadata()
    metadata.storage_data[MetadataIndex("model.x", (0,), 0)].relative_path = elsewhere
    (checkpoint / steps.SHARDS / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="which is not in the checkpoint's directory"):
        steps.load_whole(checkpoint, {"model": {"x": torch.zeros(6)}})


def test_metadata_that_lost_where_a_tensors_bytes_are_are_refused(tmp_path: Path) -> None:
    """Prevents: an AttributeError of torch's reader, after a bit of the attribute's name has flipped."""
    checkpoint = write_checkpoint(tmp_path)
    metadata = checkpoint / steps.SHARDS / ".metadata"
    content = metadata.read_bytes()
    assert b"offset" in content
    metadata.write_bytes(content.replace(b"offset", b"offsdt"))
    with pytest.raises(ValueError, match=r"does not say which bytes of '.*' are a tensor's"):
        reading.read_metadata(checkpoint / steps.SHARDS)


def test_a_checkpoint_that_lacks_its_shards_says_so(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path)
    for shard in (checkpoint / steps.SHARDS).glob("*.distcp"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"step-1 cannot be read: .*distcp"):
        steps.load_whole(checkpoint, {"model": {"x": torch.zeros(6)}})


def test_a_model_that_is_served_from_a_checkpoint_runs_nothing_of_it(model: Path, tmp_path: Path, trace: Path) -> None:
    checkpoint = tmp_path / "run" / "step-1"
    plant_checkpoint(checkpoint, trace)
    shutil.copytree(model, checkpoint / "hf")
    shapes = {name: list(parameter.shape) for name, parameter in Decoder(CONFIG).named_parameters()}
    (checkpoint / steps.METADATA).write_text(json.dumps({"step": 1, "shapes": shapes}))
    with pytest.raises(ValueError, match=r"names posix\.system"):
        read(open_model(str(tmp_path / "run")))
    for metadata in ("[1]", "{", '{"shapes": 1}', "{}", "[" * 100_000):
        (checkpoint / steps.METADATA).write_text(metadata)
        with pytest.raises(ValueError, match=r"metadata\.json"):
            open_model(str(checkpoint))
    assert not trace.exists()
