"""Steps that decode with LoRA adapters, beside the same model without slots for any."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench import serve_decode
from bench.report import Row
from bench.serve_engine import Bench, Requests, model_of, use_further_engine
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.plan.adapter_layout import A, B, adapted_fields
from yafsdp_like.inference.plan.packed_weights import pack_units
from yafsdp_like.inference.weights.adapter_files import CONFIG_NAME, FILE_NAME
from yafsdp_like.models.decoder import DecoderConfig

RANK = 16
NAMES = tuple(f"adapter-{index}" for index in range(8))
COUNTS = (0, 1, len(NAMES))  # of different adapters among a batch's requests


def measure(bench: Bench) -> Iterator[Row]:
    """A row per batch and number of adapters; those without slots are of the engine that all else is measured on."""
    without = {}
    for batch in bench.options.batches:
        row = without[batch] = serve_decode.measured(bench, batch)
        yield {"slots": 0, "adapters": 0, **row, "of_no_slots": 1.0}
    for row in with_slots(bench):
        yield {**row, "of_no_slots": row["tokens_per_second"] / without[row["batch"]]["tokens_per_second"]}


def with_slots(bench: Bench) -> list[Row]:
    """The same of an engine whose slots hold all adapters.

    They are one on disk: each has a slot of its own, and it is slots that steps read.
    """
    model = model_of(bench.options)
    with tempfile.TemporaryDirectory() as directory:
        write_adapter(Path(directory), model.config, RANK)
        adapters = dict.fromkeys(NAMES, Path(directory))
        return use_further_engine(bench, model, lambda engine: list(rows_of(bench, engine)), adapters=adapters)


def rows_of(bench: Bench, engine: Engine) -> Iterator[Row]:
    """A row per batch and number of adapters."""
    served, vocab_size = replace(bench.served, engine=engine), bench.requests.vocab_size
    for batch in bench.options.batches:
        for count in sorted({min(count, batch) for count in COUNTS}):
            requests = Requests(vocab_size, adapters=NAMES[:count])
            row = serve_decode.measured(replace(bench, served=served, requests=requests), batch)
            yield {"slots": len(NAMES), "adapters": count, **row}


def write_adapter(directory: Path, config: DecoderConfig, rank: int) -> None:
    """Write a random adapter of all projections of the attention and of dense MLPs, as peft does."""
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    tensors, modules = {}, set()
    fields = [field for unit in pack_units(config, torch.float32) for field in adapted_fields(unit)]
    for parameter in (parameter for field in fields for parameter in field.parameters):
        module, (rows, columns) = parameter.name.removesuffix(".weight"), parameter.shape
        modules.add(module.rpartition(".")[2])
        tensors[f"base_model.model.model.{module}.{A}.weight"] = drawn(rank, columns)
        tensors[f"base_model.model.model.{module}.{B}.weight"] = drawn(rows, rank)
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(modules), "bias": "none"}
    (directory / CONFIG_NAME).write_text(json.dumps(said))
    save_file(tensors, directory / FILE_NAME)
