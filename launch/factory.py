"""Any module that a function of the user's returns: how it is made, what it is called with, and what of it is the loss.

Knows nothing of sharding or training, and of transformers only how its models are called.

[Note: whose loss]
A module is called with tokens (B, T), and for training with targets (B, T) that are the tokens one ahead.

* A forward with a parameter `targets` (or `target`, `y`), or with a second one that has no default, is given both.
* A forward with a parameter `labels` is called as transformers' models are, which shift labels themselves: the T + 1
  tokens of a sequence are input and labels, so that the T targets are those that the loss is over.
* Any other is given tokens alone.

What it returns is its loss if it is a scalar, has one as `loss`, or is a tuple with one in it. Otherwise it is logits
(B, T, V), has them as `logits`, or is a tuple that begins with them, and the loss is the mean cross entropy.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Exporter = Callable[[dict[str, Tensor], Path, Mapping[str, int | None]], None]  # writes weights for others

TARGETS = ("targets", "target", "y")
LABELS = "labels"
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class FactoryRecipe:
    """`factory` is "package.module:function"; what it returns is made whole on every rank, on the CPU, and then cut."""

    factory: str
    arguments: Mapping[str, Any]
    blocks: str  # dotted name of the container of its blocks; "": the whole module is one unit
    seed: int

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding that tokens go into: the one that is named, else the one as large as an output."""
        named = getattr(self._module, "get_input_embeddings", lambda: None)()
        if isinstance(named, nn.Embedding):
            return named.num_embeddings
        modules = list(self._module.modules())
        sizes = [child.num_embeddings for child in modules if isinstance(child, nn.Embedding)]
        if not sizes:
            raise ValueError(f"the module of model.factory '{self.factory}' has no nn.Embedding to put tokens into")
        outputs = {child.out_features for child in modules if isinstance(child, nn.Linear)}
        return max([size for size in sizes if size in outputs] or sizes)

    @property
    def identity(self) -> dict[str, Any]:
        """Return nothing: a factory may return any module."""
        return {}

    def make(self) -> tuple[nn.Module, list[nn.Module]]:
        """Return the module with its loss, and its blocks."""
        module = self._module
        try:
            blocks = list(module.get_submodule(self.blocks).children()) if self.blocks else []
        except AttributeError as error:
            raise ValueError(f"model.blocks '{self.blocks}' is not in the module of model.factory: {error}") from error
        return WithLoss(module), blocks

    def fill(self, model: Any, device: torch.device, from_checkpoint: bool) -> None:
        """Move the parameters, which the factory has filled, to ``device``."""
        model.to(device)

    def exporter(self) -> Exporter:
        """For modules of transformers, which have a configuration of their own: token ids are not changed."""
        if not hasattr(self._module, "save_pretrained"):
            raise ValueError(f"{type(self._module).__name__} has no save_pretrained (checkpoint.export)")
        blank: Any = without_weights(self._module)

        def write(weights: dict[str, Tensor], directory: Path, token_ids: Mapping[str, int | None]) -> None:
            inner = {name.removeprefix("module."): value for name, value in weights.items()}  # of WithLoss
            blank.save_pretrained(directory, state_dict=inner)

        return write

    @cached_property
    def _module(self) -> nn.Module:
        """What the function returns, called once.

        What goes wrong inside it is the user's to read, as it is; a ``ValueError``, told in one line, says where.
        """
        function = self._function()
        torch.manual_seed(self.seed)
        try:
            module = function(**self.arguments)
        except ValueError as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = f": {error}" if str(error) else ""
            raise ValueError(
                f"model.factory '{self.factory}' raised {type(error).__name__}{words} ({where.filename}:{where.lineno})"
            ) from error
        if not isinstance(module, nn.Module):
            raise ValueError(f"model.factory '{self.factory}' returned {type(module).__name__}, expected an nn.Module")
        return module

    def _function(self) -> Callable[..., Any]:
        module_name, _, name = self.factory.partition(":")
        if not (module_name and name):
            raise ValueError(f"model.factory '{self.factory}' is not a package.module:function")
        try:
            function = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"model.factory '{self.factory}' is not a package.module:function: {error}") from error
        if not callable(function):
            raise ValueError(f"model.factory '{self.factory}' is not a package.module:function: it is {function!r}")
        signature = inspect.signature(function)
        try:
            signature.bind(**self.arguments)
        except TypeError as error:
            near = [difflib.get_close_matches(key, signature.parameters, 1) for key in self.arguments]
            hint = next(
                (f"; did you mean '{found[0]}'?" for found in near if found and found[0] not in self.arguments), ""
            )
            raise ValueError(
                f"model.factory_args {dict(self.arguments)} do not fit {self.factory}{signature}: {error}{hint}"
            ) from error
        return function


def without_weights(module: nn.Module) -> nn.Module:
    """A copy whose tensors have no memory."""
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    for param in module.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
    return copy.deepcopy(module, memo)


class WithLoss(nn.Module):
    """A language model, and a loss beside its logits: its own where it has one. See [Note: whose loss]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        parameters = inspect.signature(module.forward).parameters
        second = next(iter([p for p in parameters.values() if p.kind in POSITIONAL][1:]), None)
        is_required = second is not None and second.default is inspect.Parameter.empty
        named = next((name for name in (*TARGETS, LABELS) if name in parameters), None)
        self.target_name = second.name if second is not None and is_required and named is None else named
        self.gives_logits = not is_required  # of tokens alone
        self.options = {"use_cache": False} if "use_cache" in parameters else {}
        self.num_positions = _num_positions(module)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); with targets (B, T), the loss instead, an fp32 scalar."""
        if targets is None:
            return _logits_of(self.module(tokens, **self.options))
        output = self._output(tokens, targets)
        loss = _loss_in(output)
        if loss is not None:
            return loss.float()
        logits = _logits_of(output)[:, : targets.shape[1]]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _output(self, tokens: Tensor, targets: Tensor) -> Any:
        if self.target_name is None:
            return self.module(tokens, **self.options)
        if self.target_name != LABELS:
            return self.module(tokens, **{self.target_name: targets}, **self.options)
        if self.num_positions is not None and tokens.shape[1] >= self.num_positions:
            raise ValueError(
                f"seq_len {tokens.shape[1]} is too long for {type(self.module).__name__}: its own loss takes one token "
                f"more, and it has {self.num_positions} positions; set seq_len to at most {self.num_positions - 1}"
            )
        sequence = torch.cat((tokens, targets[:, -1:]), dim=1)  # (B, T + 1)
        return self.module(sequence, labels=sequence, **self.options)


def _num_positions(module: nn.Module) -> int | None:
    """How many tokens a module has learned positions for, by its configuration; None if it turns them, say."""
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    tables = [child.num_embeddings for child in module.modules() if isinstance(child, nn.Embedding)]
    return limit if limit in tables[1:] else None  # the first is the tokens'


def _loss_in(output: Any) -> Tensor | None:
    """A scalar, as a tensor ()."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    candidates = [output, found, *(output if isinstance(output, (tuple, list)) else ())]
    scalars = [value for value in candidates if isinstance(value, Tensor) and value.numel() == 1 and value.dim() < 2]
    return scalars[0].reshape(()) if scalars and scalars[0].is_floating_point() else None


def _logits_of(output: Any) -> Tensor:
    """ValueError where there are none."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    candidates = [output, found, *(output if isinstance(output, (tuple, list)) else ())]
    for value in candidates:
        if isinstance(value, Tensor) and value.dim() == 3:
            return value
    found_words = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"the module of model.factory returned {found_words}: expected logits (B, T, V), a scalar loss, an object with "
        "`logits` or `loss`, or a tuple that holds them"
    )
