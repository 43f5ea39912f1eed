"""Modules of the user's: made with arguments, called as they want to be, and trained on the loss that is theirs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch import config, metrics
from launch.config import ModelOptions
from launch.factory import FactoryRecipe, WithLoss
from launch.recipe import exporter_of, recipe_of
from launch.sample import is_possible
from tests.launch.test_train import OPTIONS, run_here
from tests.ranks import run_ranks

VOCAB = 300
TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
TARGETS = torch.tensor([[2, 3, 7], [5, 6, 8]])


class Bigram(nn.Module):
    """Logits of the next token by this one; `width` is there to be told."""

    def __init__(self, width: int = 8, vocab_size: int = VOCAB) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))

    def doubled(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """A loss that is not the cross entropy alone."""
        return 2 * F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor | None


class Scalar(Bigram):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.logits(tokens) if targets is None else self.doubled(tokens, targets)


class LossOnly(Bigram):
    """Can do nothing without targets, whatever they are called."""

    def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
        return self.doubled(x, wanted).reshape(1)


class KeywordOnly(Bigram):
    def forward(self, idx: Tensor, mask: Tensor | None = None, *, y: Tensor | None = None) -> Output:
        assert mask is None
        return Output(None if y is None else self.doubled(idx, y), self.logits(idx))


class Pair(Bigram):
    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.logits(idx), None if targets is None else self.doubled(idx, targets)


class Mapped(Bigram):
    def forward(self, tokens: Tensor, target: Tensor | None = None) -> dict[str, Any]:
        return {"logits": self.logits(tokens), "loss": None if target is None else self.doubled(tokens, target)}


class Labelled(Bigram):
    """As transformers' models: labels are the input, and shifted here."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.logits(input_ids)
        loss = None if labels is None else self.doubled(input_ids[:, :-1], labels[:, 1:])
        return Output(loss, logits)


class LogitsAnyway(Bigram):
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.logits(tokens)


class Masked(Bigram):
    """Its second parameter has nothing to do with targets."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None
        return self.logits(tokens)


@pytest.mark.parametrize("kind", [Scalar, LossOnly, KeywordOnly, Pair, Mapped, Labelled])
def test_a_loss_that_the_module_returns_is_the_loss(kind: type[Bigram]) -> None:
    module = kind()
    loss = WithLoss(module)(TOKENS, TARGETS)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, module.doubled(TOKENS, TARGETS))


@pytest.mark.parametrize("kind", [Bigram, LogitsAnyway, Masked])
def test_of_logits_alone_the_loss_is_the_mean_cross_entropy(kind: type[Bigram]) -> None:
    module = kind()
    torch.testing.assert_close(WithLoss(module)(TOKENS, TARGETS), module.doubled(TOKENS, TARGETS) / 2)


@pytest.mark.parametrize("kind", [Bigram, Scalar, KeywordOnly, Pair, Mapped, Labelled, Masked])
def test_tokens_alone_give_logits(kind: type[Bigram]) -> None:
    module = kind()
    model = WithLoss(module)
    assert is_possible(model)
    torch.testing.assert_close(model(TOKENS), module.logits(TOKENS))


def test_a_module_that_wants_targets_gives_no_sample() -> None:
    assert not is_possible(WithLoss(LossOnly()))


class Odd(Bigram):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens).flatten(0, 1)


def test_what_is_neither_loss_nor_logits_is_named() -> None:
    with pytest.raises(ValueError, match=r"returned a tensor \(6, 300\): expected logits \(B, T, V\), a scalar loss"):
        WithLoss(Odd())(TOKENS, TARGETS)


# --- transformers ---


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=3, **sizes))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "router_aux_loss_coef": 3.0}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, output_router_logits=True, **sizes, **experts))


def gpt2(num_positions: int = 4) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": num_positions}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_model_of_transformers_has_the_loss_of_its_logits(make: Callable[[], Any]) -> None:
    """Prevents: labels that are shifted twice, once here and once there."""
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():
        expected = F.cross_entropy(module(TOKENS).logits.flatten(0, 1), TARGETS.flatten())
        torch.testing.assert_close(WithLoss(module)(TOKENS, TARGETS), expected, rtol=1e-5, atol=1e-6)


def test_the_balance_of_experts_is_part_of_the_loss() -> None:
    torch.manual_seed(0)
    module: Any = mixtral().eval()
    with torch.no_grad():
        logits = module(TOKENS).logits
        loss = WithLoss(module)(TOKENS, TARGETS)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    assert loss - cross_entropy > 3.0  # the auxiliary loss is at least 1 where experts are used alike, times 3


def test_learned_positions_leave_room_for_the_loss_or_say_so() -> None:
    WithLoss(gpt2(4))(TOKENS, TARGETS)
    with pytest.raises(ValueError, match=r"seq_len 3 is too long for GPT2LMHeadModel.*set seq_len to at most 2"):
        WithLoss(gpt2(3))(TOKENS, TARGETS)


# --- how it is made ---


def recipe(name: str, **arguments: Any) -> FactoryRecipe:
    return FactoryRecipe(f"tests.launch.test_factory:{name}", arguments, "", 0)


def test_arguments_reach_the_function() -> None:
    module, blocks = recipe("Bigram", width=16, vocab_size=40).make()
    assert module.module.embed.weight.shape == (40, 16) and blocks == []
    assert recipe("Bigram", vocab_size=40).vocab_size == 40


def test_the_same_seed_makes_the_same_module() -> None:
    first, second = recipe("Bigram").make()[0], recipe("Bigram").make()[0]
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Bigram", {"widht": 3}, r"do not fit tests\.\w+\.test_factory:Bigram\(width.*'widht'; did you mean 'width'\?"),
        ("gpt2", {"depth": 3}, r"do not fit tests\.launch\.test_factory:gpt2\(num_positions.*'depth'"),
        ("Bigrams", {}, r"'tests\.launch\.test_factory:Bigrams' is not a package\.module:function: .*Bigrams"),
        ("VOCAB", {}, r"is not a package\.module:function: it is 300"),
        ("number", {}, r"returned int, expected an nn\.Module"),
    ],
)
def test_what_cannot_be_called_so_is_one_clear_line(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        recipe(name, **arguments).make()
    assert "\n" not in str(caught.value)


def number() -> int:
    return 3


def test_a_factorys_own_error_is_not_taken_for_a_wrong_name() -> None:
    with pytest.raises(AttributeError, match="of the user's"):
        recipe("broken").make()


def broken() -> nn.Module:
    raise AttributeError("of the user's")


class Positions(Bigram):
    """More positions than tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(5_000, 8)


@pytest.mark.parametrize(("name", "size"), [("Positions", VOCAB), ("llama", VOCAB), ("gpt2", VOCAB), ("Bigram", VOCAB)])
def test_the_vocabulary_is_that_of_tokens_not_of_positions(name: str, size: int) -> None:
    assert recipe(name).vocab_size == size


def test_a_factory_or_a_directory_takes_the_place_of_the_default_preset() -> None:
    options = config.load(["--model.factory=tests.launch.test_factory:Bigram", "--model.factory_args.width=4"])
    assert options.model.preset is None and options.model.factory_args == {"width": 4}
    assert config.load(["--model.hf_dir=somewhere"]).model.preset is None
    with pytest.raises(ValueError, match="exactly one of"):
        config.load(["--model.preset=tiny", "--model.factory=a:b"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.factory_args.width=4"], "of a model.factory, and none is given"),
        (["--model.blocks=layers"], "of a model.factory, and none is given"),
        (["--model.factory=a:b", "--model.overrides.dim=4"], "a factory takes model.factory_args"),
    ],
)
def test_options_of_another_kind_of_model_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.load(arguments)


def test_what_cannot_be_written_for_others_is_said_unless_it_was_asked_for() -> None:
    words = "checkpoints have no directory for transformers: Bigram has no save_pretrained (checkpoint.export)"
    assert exporter_of(recipe("Bigram"), None) == (None, words)
    assert exporter_of(recipe("Bigram"), False) == (None, "")
    with pytest.raises(ValueError, match="Bigram has no save_pretrained"):
        exporter_of(recipe("Bigram"), True)
    exporter, words = exporter_of(recipe("llama"), None)
    assert exporter is not None and words == ""


def test_a_preset_in_capitals_is_recognised() -> None:
    with pytest.raises(ValueError, match=r"unknown model\.preset '8B'; did you mean '8b'\?"):
        recipe_of(ModelOptions(preset="8B"), 0)


# --- a whole run ---


def loaded(directory: str) -> nn.Module:
    """A model read from a directory, which cannot be done on the meta device."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("LossOnly", ["--model.factory_args.width=16"]),
        ("loaded", ["--model.blocks=model.layers", "--model.factory_args.directory={directory}"]),
    ],
)
def test_a_module_with_a_loss_of_its_own_trains(tmp_path: Path, name: str, extra: list[str]) -> None:
    if name == "loaded":
        llama().save_pretrained(tmp_path / "llama")
        extra = [word.format(directory=tmp_path / "llama") for word in extra]
    (tmp_path / "text.txt").write_text("the old whale saw a ship sail over the sea\n" * 200)
    rest = {key: value for key, value in OPTIONS.items() if key != "model"}
    arguments = [f"--{key}={value}" for key, value in rest.items() if not isinstance(value, dict)]
    sections = [(key, value) for key, value in rest.items() if isinstance(value, dict)]
    arguments += [f"--{key}.{name}={value}".lower() for key, section in sections for name, value in section.items()]
    arguments += [f"--output_dir={tmp_path / 'run'}", f"--data.paths={tmp_path / 'text.txt'}"]
    arguments += [f"--data.cache={tmp_path / 'cache'}", f"--model.factory=tests.launch.test_factory:{name}"]
    run_ranks(run_here, [*arguments, "--num_steps=12", "--checkpoint.every=0", "--checkpoint.export=null", *extra])
    records = metrics.read_records(tmp_path / "run")
    assert len(records) == 12 and records[-1]["loss"] < records[0]["loss"] - 0.1
    assert records[0]["loss"] == pytest.approx((2 if name == "LossOnly" else 1) * 5.7, abs=1.0)
    assert (tmp_path / "run" / "step-12" / "hf" / "config.json").exists() == (name == "loaded")
