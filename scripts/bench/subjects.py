"""The models that are trained, by the name that `--model` takes: this package's decoders, and some of `transformers`.

Either is asked for a model, a batch and what a step computes; runtimes shard its `layers` and then the whole.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yafsdp_like.models import PRESETS, Decoder, DecoderConfig

Batch = tuple[Tensor, Tensor]


class TransformersModel(nn.Module):
    """A model of `transformers`, called as the decoder is: inputs and targets to the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def layers(self) -> nn.ModuleList:
        """Return its blocks: the outermost list of modules."""
        return next(module for module in self.model.modules() if isinstance(module, nn.ModuleList))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy, in fp32, of logits (..., classes) for `targets` (...)."""
        logits = self.model(inputs).logits
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


Model = Decoder | TransformersModel


@dataclass(frozen=True)
class DecoderSubject:
    """A decoder of this package."""

    config: DecoderConfig

    def with_num_layers(self, num_layers: int) -> "DecoderSubject":
        """Return the same with another number of blocks."""
        return DecoderSubject(replace(self.config, num_layers=num_layers))

    def model(self, device: torch.device) -> Decoder:
        """Return the model without bytes: it is filled when it is sharded."""
        with torch.device("meta"):
            return Decoder(self.config)

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """Return tokens (B, T) and the tokens that follow them."""
        return random_tokens(self.config.vocab_size, batch_size, seq_len, generator)

    def train_flops(self, batch_size: int, seq_len: int) -> int | None:
        """Return the operations of a forward and backward."""
        return self.config.train_flops(batch_size, seq_len)

    @property
    def description(self) -> dict[str, Any]:
        """Return its shape and size, for the report."""
        return {**asdict(self.config), "num_params": self.config.num_params}


@dataclass(frozen=True)
class TransformersSubject:
    """A model of `transformers` with random weights, of a configuration's class and fields."""

    kind: str  # the class is `{kind}Config`
    fields: Mapping[str, Any] = field(hash=False)

    def with_num_layers(self, num_layers: int) -> "TransformersSubject":
        """Return the same with another number of blocks."""
        return replace(self, fields={**self.fields, "num_hidden_layers": num_layers})

    @property
    def sees_pictures(self) -> bool:
        """Whether its inputs are pictures, and not tokens."""
        return self.kind == "ViT"

    @cached_property
    def _config(self) -> Any:
        import transformers  # which takes seconds, and only these models need

        config = getattr(transformers, f"{self.kind}Config")(**self.fields)
        config.use_cache = False
        return config

    def model(self, device: torch.device) -> TransformersModel:
        """Return the model on the device with its initial values: its buffers cannot be filled later."""
        import transformers

        auto = transformers.AutoModelForImageClassification if self.sees_pictures else transformers.AutoModelForCausalLM
        torch.manual_seed(0)  # the same values on every rank and in every implementation
        with device:
            return TransformersModel(auto.from_config(self._config, attn_implementation="sdpa"))

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
        """Return tokens (B, T) and what follows them, or pictures (B, 3, 224, 224) and their classes (B)."""
        if not self.sees_pictures:
            return random_tokens(self._config.vocab_size, batch_size, seq_len, generator)
        pictures = torch.randn(batch_size, 3, self._config.image_size, self._config.image_size, generator=generator)
        return pictures, torch.randint(self._config.num_labels, (batch_size,), generator=generator)

    def train_flops(self, batch_size: int, seq_len: int) -> int | None:
        """Return None: nobody counts the operations of these."""
        return None

    @property
    def description(self) -> dict[str, Any]:
        """Return its configuration and size, for the report."""
        num_params = sum(param.numel() for param in self.model(torch.device("meta")).parameters())
        return {"transformers": f"{self.kind}Config", **self.fields, "num_params": num_params}


Subject = DecoderSubject | TransformersSubject


def random_tokens(vocab_size: int, batch_size: int, seq_len: int, generator: torch.Generator) -> Batch:
    """Return tokens (B, T) and the tokens that follow them."""
    tokens = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def new_subject(name: str) -> Subject:
    """Return what a name stands for."""
    return DecoderSubject(PRESETS[name]) if name in PRESETS else OF_TRANSFORMERS[name]


OF_TRANSFORMERS = {
    "qwen2.5-3b": TransformersSubject(
        "Qwen2",
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "moe-7b": TransformersSubject(
        "Mixtral",
        {
            "vocab_size": 32_000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "vit-l": TransformersSubject(
        "ViT",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_labels": 1000,
        },
    ),
}
NAMES = (*PRESETS, *OF_TRANSFORMERS)
