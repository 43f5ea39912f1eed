"""DeepSpeed's ZeRO stage 3: an engine with tuned settings that starts from the values all others start from.

Its step contains two things that the others' does not: it always computes the norm of the gradients, and it copies
parameters and gradients between its fp32 and bf16 buffers. It does not import DeepSpeed until one is built.
"""

import importlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.options import Options
from bench.subjects import DecoderSubject
from bench.trainee import Trainee, recompute_blocks
from launch.world import World
from yafsdp_like.models import Decoder

TUNING: dict[str, Any] = {  # elements; large buckets, since DeepSpeed's own defaults leave more gaps between calls
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 500_000_000,
    "stage3_param_persistence_threshold": 100_000,  # norms stay gathered
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}

_linear = F.linear  # DeepSpeed replaces it for the whole process


@dataclass
class Zero3Trainee(Trainee):
    """A model driven through DeepSpeed's engine."""

    engine: Any

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the loss by DeepSpeed's engine."""
        loss: Tensor = self.engine(tokens, targets)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Compute gradients by DeepSpeed's engine."""
        self.engine.backward(loss)

    def clip(self, max_norm: float) -> None:
        """Do nothing: the engine's step clips."""

    def update(self) -> None:
        """Apply and clear the gradients."""
        self.engine.step()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model and its own `linear` out of torch, and free all memory.

        DeepSpeed keeps references to an engine for ever, so that the bytes are taken from under its tensors.
        """
        held = [self.engine.optimizer, self.engine.optimizer.optimizer, *self.model.parameters()]
        self.engine.destroy()
        F.linear = _linear
        for tensor in tensors_in([*self.model.parameters(), *map(vars, held)]):
            tensor.untyped_storage().resize_(0)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, and its gradient."""
    if isinstance(value, Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)


def imported(world: World) -> Any:
    """Import the package for the device in use, which it looks for once, when it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def obstacle(world: World) -> str | None:
    """Why it cannot be built here: the package, or one that it needs, is not installed."""
    try:
        imported(world)
    except ImportError as error:
        return f"package deepspeed cannot be imported ({error})"
    return None


def build(options: Options, world: World, whole_blocks: bool = False) -> Trainee:
    """The decoder under ZeRO-3; `whole_blocks` gathers a block at once, not each of its modules.

    Compiled blocks are always gathered whole: DeepSpeed's hooks on the modules inside would cut the graph into pieces.
    """
    deepspeed = imported(world)
    settings = engine_settings(options)
    subject = options.subject
    assert isinstance(subject, DecoderSubject)  # the command line refuses others
    try:
        with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16):
            model = Decoder(subject.config)
        if options.recomputes:
            recompute_blocks(model)
        fill_bf16(model, deepspeed)
        if whole_blocks or options.compile:
            deepspeed.utils.set_z3_leaf_modules(model, [type(model.layers[0])])
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
        engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        fill_fp32(model, world, deepspeed)
        if options.compile:
            compile_blocks(model)
    except torch.OutOfMemoryError:
        F.linear = _linear
        raise
    return Zero3Trainee(model, optimizer, engine)


def engine_settings(options: Options) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with the settings that `--zero3` overrides."""
    overrides = dict(setting.split("=", 1) for setting in options.zero3)
    return {
        "train_micro_batch_size_per_gpu": options.batch_sizes[0],
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "communication_data_type": options.reduce_dtype,  # gradients are summed between ranks in it
        "data_types": {"grad_accum_dtype": options.reduce_dtype},  # and kept in it
        "zero_optimization": {"stage": 3, **TUNING, **overrides},
        "gradient_clipping": options.clip,  # in its step; at 1.0 by default
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would have to be compiled
        "steps_per_print": 1_000_000_000,
    }


def units_of(model: Decoder) -> list[nn.Module]:
    """Modules that are filled one after the other, since no rank can hold all of the model in fp32."""
    return [model.embed_tokens, *model.layers, model.norm, model.lm_head]


def fill_bf16(model: Decoder, deepspeed: Any) -> None:
    """Give the partitioned bf16 parameters their initial values.

    `init_weights` fills what is whole at the moment; the other parameters have no elements then.
    """
    for unit in units_of(model):
        with deepspeed.zero.GatheredParameters(list(unit.parameters()), modifier_rank=0):
            model.init_weights()


def fill_fp32(model: Decoder, world: World, deepspeed: Any) -> None:
    """Give the optimizer's fp32 copies the initial values unrounded; DeepSpeed makes them from the bf16 parameters."""
    for unit in units_of(model):
        params: list[Any] = list(unit.parameters())  # that DeepSpeed gave attributes, ds_...
        placeholders = [param.data for param in params]
        for param in params:
            param.data = torch.empty(param.ds_shape, dtype=torch.float32, device=world.device)
        model.init_weights()
        for param, placeholder in zip(params, placeholders, strict=True):
            values, param.data = param.data, placeholder
            deepspeed.utils.safe_set_local_fp32_param(param, partition(values, param.ds_tensor.numel(), world.rank))


def partition(values: Tensor, numel: int, rank: int) -> Tensor:  # any shape -> (numel,)
    """This rank's elements of a parameter under ZeRO-3: equal runs of the flat tensor, the last filled with zeros."""
    mine = values.flatten()[rank * numel : (rank + 1) * numel]
    return F.pad(mine, (0, numel - mine.numel()))


def compile_blocks(model: Decoder) -> None:
    """Compile what is between DeepSpeed's hooks on a block."""
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
