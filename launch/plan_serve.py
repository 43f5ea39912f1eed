"""Plan what serving a model takes, without a GPU: bytes in each phase, contexts that fit, the mode and why.

    python -m launch.plan preset:70b --serve --gpu-memory=80GiB --slot-map=map.html
    python -m launch.plan runs/smollm2/base --serve --max-batch-size=64 --json=-
    python -m launch.plan preset:70b --serve --fit=80GiB --max-seq-len=8192

Owns the options, which are the server's and those of a GPU that need not be here, and the tables. The plan is the one
that the engine allocates (``inference/plan/serving_plan.py``): activations are planned buffers there, so its part is
exact. What CUDA and its libraries take beside it is not planned, and is said apart. ``--fit`` finds settings that fit
such a GPU, see ``fit_serve.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from launch import fit_serve, slot_map
from launch.command_line import Command, check_directory, exit_status
from launch.config import load as load_training
from launch.fit_serve import ServeSearch, ServeSettings
from launch.options import ALIASES, ServeOptions, check_model
from launch.recipe import decoder_config
from yafsdp_like.hardware import H200_RATES, Hardware, MachineRates, Rates, machine_rates
from yafsdp_like.inference.options import AnyMode, EngineOptions
from yafsdp_like.inference.plan.buffers import WORKSPACE, StepShape, plan_buffers
from yafsdp_like.inference.plan.draft_plan import plan_with_draft
from yafsdp_like.inference.plan.placement import Mode
from yafsdp_like.inference.plan.serving_plan import ServingPlan, Site, plan_serving
from yafsdp_like.inference.plan.serving_plan import least_nbytes as least_limit_nbytes
from yafsdp_like.inference.weights.loading import CPU_KV_NBYTES, LIBRARIES_NBYTES, open_model
from yafsdp_like.memory.plan import MemoryPlan, readable
from yafsdp_like.models import DecoderConfig
from yafsdp_like.models.hf import CONFIG_NAME, load_hf_config
from yafsdp_like.models.vision import PROJECTOR, TOWER

PHASES = "load", "prefill", "decode"
NOTES = """
The options of the server are those of launch.serve, and mean the same. MODEL is what that serves, and also a
config.json or a run's configuration (.yaml), without weights.
"""
Nbytes = dict[str, int]


@dataclass(frozen=True)
class ServePlanOptions(ServeOptions):
    """A model, the server's options, and the GPUs that it is planned for."""

    world_size: int = 1  # GPUs of one host that may share weights
    gpu_memory_nbytes: int = 80 << 30  # of each GPU, of which the plan leaves a part to CUDA and its libraries
    fit_nbytes: int | None = None  # find modes, KV dtypes and sequences that fit a GPU of so many, and what each costs
    gpu_multiprocessors: int = 132  # of each GPU, as an H100 or H200; decides how attention is cut, and its workspace
    transport: Literal["peer", "process_group"] = "peer"  # whether ranks map each other's memory
    json: str | None = None  # write the forecast as data to this file; "-" is standard output
    slot_map: str | None = None  # draw it to this file, .html or .png

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("world_size", "gpu_memory_nbytes", "gpu_multiprocessors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.fit_nbytes is not None:
            if self.fit_nbytes < 1:
                raise ValueError(f"fit_nbytes must be at least 1, found {self.fit_nbytes}")
            if not self.on_gpu or self.engine.memory_limit_nbytes is not None or self.slot_map is not None:
                raise ValueError("fit is of a GPU's whole memory: leave out device=cpu, memory_limit and slot_map")
        if self.slot_map is not None:
            slot_map.check_path(Path(self.slot_map))
        if self.json is not None:
            check_directory(Path(self.json))

    @property
    def on_gpu(self) -> bool:
        """Whether the plan is for GPUs; a CPU must be asked for."""
        return self.load.device != "cpu"


COMMAND = Command(
    "usage: python -m launch.plan MODEL --serve [--option=value ...]",
    ServePlanOptions,
    NOTES,
    positionals=("model",),
    flat=True,
    aliases=ALIASES,
)


@dataclass(frozen=True)
class ServingForecast:
    """What one rank of a server takes in each phase, in bytes, and what it can hold."""

    options: ServePlanOptions
    plan: ServingPlan
    rates: MachineRates

    @property
    def num_contexts(self) -> int:
        """Contexts of the longest sequence that fit at once."""
        return self.plan.num_context_tokens // self.plan.max_seq_len

    @property
    def engine(self) -> Nbytes:
        """What the engine holds from loading on, by kind: exactly the plan."""
        kinds = dict.fromkeys(region.kind for region in self.plan.memory.regions)
        return {kind: self.plan.memory.nbytes_of(kind) for kind in kinds}

    @property
    def host(self) -> Nbytes:
        """What it holds in host memory, by kind."""
        kinds = dict.fromkeys(region.kind for region in self.plan.host.regions)
        return {kind: self.plan.host.nbytes_of(kind) for kind in kinds}

    @property
    def while_loading_nbytes(self) -> int:
        """Before steps are recorded, the bytes of the largest parameter that is read whole to keep some columns."""
        cut = [
            parameter
            for packed in self.plan.placement.packed_units
            for parameter, _ in packed.parameters()
            if parameter.cut is not None and parameter.cut.dim != 0
        ]
        itemsize = self.plan.site.dtype.itemsize
        return max((p.numel * p.cut.num_ranks * itemsize for p in cut if p.cut is not None), default=0)

    @property
    def phases(self) -> dict[str, Nbytes]:
        """Bytes on the device, by phase and category; what is not the engine's is the same in all phases together."""
        if not self.options.on_gpu:
            return dict.fromkeys(PHASES, self.engine)
        found = {}
        for phase in PHASES:
            beside = LIBRARIES_NBYTES + self.plan.recordings_nbytes
            name = "a parameter, whole" if phase == "load" else "recorded steps"
            taken = self.while_loading_nbytes if phase == "load" else self.plan.recordings_nbytes
            left = {name: taken, "left to libraries": max(beside - taken, 0)}
            found[phase] = self.engine | {"CUDA context": self.rates.context_nbytes or 0} | left
        return found

    @property
    def workspace_in_use(self) -> Nbytes:
        """Of the workspace, what steps of a phase use at most: prompts of all tokens, or one token of each sequence."""
        options, plan = self.options.engine, self.plan
        found = {}
        for phase, tokens in (("prefill", options.max_batch_tokens), ("decode", options.max_decode_rows)):
            step = StepShape(
                options.max_batch_size,
                tokens,
                plan.max_seq_len,
                options.page_size,
                len(plan.groups),
                self.options.gpu_multiprocessors if self.options.on_gpu else 1,
                plan.adapters.rank if plan.adapters else 0,
                options.max_decode_rows,
            )
            buffers = plan_buffers(plan.rank_config, step, plan.site.dtype)
            found[phase] = next(region.nbytes for region in buffers.regions if region.kind == WORKSPACE)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON holds them."""
        plan, totals = self.plan, {phase: sum(nbytes.values()) for phase, nbytes in self.phases.items()}
        return {
            "model": self.options.model,
            "config": asdict(plan.config),
            "mode": plan.mode,
            "why": list(plan.reasons),
            "world_size": plan.site.num_ranks,
            "gpu_memory_nbytes": self.options.gpu_memory_nbytes if self.options.on_gpu else None,
            "dtype": plan.site.dtype_name,
            "kv_dtype": self.options.engine.kv_dtype or plan.site.dtype_name,
            "max_seq_len": plan.max_seq_len,
            "num_context_tokens": plan.num_context_tokens,
            "num_contexts": self.num_contexts,
            "phases": [
                {"phase": phase, "nbytes": nbytes, "total_nbytes": totals[phase]}
                for phase, nbytes in self.phases.items()
            ],
            "peak": {"phase": max(totals, key=totals.__getitem__), "total_nbytes": max(totals.values())},
            "plan_nbytes": plan.memory.nbytes,
            "workspace_in_use_nbytes": self.workspace_in_use,
            "recordings_nbytes": plan.recordings_nbytes,
            "host_nbytes": self.host,
            "modes": self.modes(),
        }

    def modes(self) -> dict[str, Any]:
        """Return, by mode, the bytes of weights on the device and the tokens of context, or why it cannot be."""
        found: dict[str, Any] = {}
        for mode in get_args(Mode):
            try:
                draft = None if self.plan.draft is None else self.plan.draft.config
                plan = plan_with_draft(self.plan.config, self.plan.options, self.plan.site, mode, draft)
            except ValueError as error:
                found[mode] = {"refused": str(error)}
            else:
                found[mode] = {"weights_nbytes": plan.placement.nbytes, "num_context_tokens": plan.num_context_tokens}
        return found

    def __str__(self) -> str:
        plan, phases = self.plan, self.phases
        where = (
            f"{plan.site.num_ranks} × {readable(self.options.gpu_memory_nbytes)}" if self.options.on_gpu else "a CPU"
        )
        rows: list[tuple[str, ...]] = [("", *PHASES)]
        for name in dict.fromkeys(name for nbytes in phases.values() for name, count in nbytes.items() if count):
            rows.append((name, *(_cell(phases[phase].get(name, 0)) for phase in PHASES)))
        rows.append(("on the device", *(readable(sum(phases[phase].values())) for phase in PHASES)))
        rows += [(f"host: {name}", *[_cell(nbytes)] * len(PHASES)) for name, nbytes in self.host.items()]
        used = ", ".join(f"{readable(nbytes)} in {phase}" for phase, nbytes in self.workspace_in_use.items())
        lines = [f"{self.options.model} in {plan.site.dtype_name} on {where}", *plan.reasons]
        lines += [f"  {self.num_contexts:,} of the longest sequences fit at once", *_aligned(rows)]
        lines.append(f"of the workspace, steps use {used}")
        if plan.buffers.image_nbytes:
            lines.append(self._vision_line())
        return "\n".join([*lines, *self._mode_lines()])

    def _vision_line(self) -> str:
        found = {packed.name: packed.nbytes for packed in self.plan.placement.packed_units}
        return (
            f"of the weights, {readable(found[TOWER])} are the vision tower's and {readable(found[PROJECTOR])} its "
            f"projector's; encoding an image takes {readable(self.plan.buffers.image_nbytes)} beside the plan"
        )

    def _mode_lines(self) -> Iterator[str]:
        for mode, found in self.modes().items():
            if "refused" in found:
                yield f"as {mode}: {found['refused'].partition('. ')[0].partition(';')[0]}"
            else:
                tokens = found["num_context_tokens"]
                yield f"as {mode}: {readable(found['weights_nbytes'])} of weights, {tokens:,} tokens of context"

    def drawable(self) -> MemoryPlan:
        """Return the plan of the device and of host memory as one, for the slot map."""
        on_host = (replace(region, on_host=True) for region in self.plan.host.regions)
        return replace(self.plan.memory, regions=(*self.plan.memory.regions, *on_host))


def _cell(nbytes: int) -> str:
    return readable(nbytes) if nbytes else ""


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def forecast_serving(options: ServePlanOptions) -> ServingForecast:
    """Plan to serve the model that the options name, on the GPUs that they describe.

    Raises ValueError where there is no such model, and where it does not fit: how many bytes are missing, and what
    would fit.
    """
    config, rates = config_of(options.model), machine_rates()
    engine, site = engine_and_site(options, rates)
    speculation = engine.speculation
    draft = None if speculation is None or speculation.draft is None else config_of(speculation.draft)
    return ServingForecast(options, plan_with_draft(config, engine, site, options.load.mode, draft), rates)


def engine_and_site(options: ServePlanOptions, rates: MachineRates) -> tuple[EngineOptions, Site]:
    """Return the engine's options, within what CUDA and its libraries leave of a GPU, and where it is to run."""
    engine, load = options.engine, options.load
    dtype = getattr(torch, load.dtype or ("bfloat16" if options.on_gpu else "float32"))
    hardware = None
    if options.on_gpu:
        hardware = Hardware(rates.device, options.gpu_multiprocessors, _serving_rates(rates))
        if engine.memory_limit_nbytes is None:
            left = options.gpu_memory_nbytes - (rates.context_nbytes or 0) - LIBRARIES_NBYTES
            if left < 1:
                raise ValueError(f"CUDA and its libraries take all of gpu_memory_nbytes {options.gpu_memory_nbytes}")
            engine = replace(engine, memory_limit_nbytes=left)
    elif engine.memory_limit_nbytes is None and engine.kv_nbytes is None:
        engine = replace(engine, kv_nbytes=CPU_KV_NBYTES)
    maps = options.transport == "peer" and options.world_size > 1
    return engine, Site(dtype, options.world_size, maps, options.transport.replace("_", " "), hardware)


def _serving_rates(rates: MachineRates) -> Rates | None:
    found = rates.product_flops, rates.memory_nbytes, rates.to_device_nbytes, rates.peer_nbytes
    flops, memory, host, peer = found
    return None if not (flops and memory and host and peer) else Rates(flops, memory, host, peer)


def config_of(name: str) -> DecoderConfig:
    """Return a model's shape: of a preset, a directory, a checkpoint, a config.json, or a run's configuration.

    Weights need not be there. Raises ValueError where there is no such model.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        training = load_training([name])
        if training.model.factory is not None:
            raise ValueError(f"{name} trains a module of model.factory, which cannot be served")
        return decoder_config(training.model)
    if path.name == CONFIG_NAME:
        return load_hf_config(path.parent)
    check_model(name)
    return load_hf_config(path) if (path / CONFIG_NAME).is_file() else open_model(name).config


def fit_report(options: ServePlanOptions, device_nbytes: int) -> fit_serve.ServeFitReport:
    """Search what fits GPUs of ``device_nbytes``; see ``fit_serve.py``."""
    config, rates, engine = config_of(options.model), machine_rates(), options.engine
    if engine.speculation is not None and engine.speculation.draft is not None:
        raise ValueError("fit looks for room for one model: leave out speculate=draft, or say memory_limit_nbytes")
    dtype = options.load.dtype or "bfloat16"

    def asked(settings: ServeSettings, nbytes: int) -> tuple[DecoderConfig, EngineOptions, Site, AnyMode]:
        changed = replace(
            engine,
            kv_dtype=settings.kv_dtype,
            max_batch_size=settings.max_batch_size,
            max_batch_tokens=settings.max_batch_tokens,
            max_seq_len=settings.max_seq_len,
            graphs=settings.graphs,
        )
        there = replace(options, engine=changed, gpu_memory_nbytes=nbytes, world_size=settings.num_ranks)
        return config, *engine_and_site(there, rates), settings.mode

    def least_nbytes(settings: ServeSettings) -> int:
        return least_limit_nbytes(*asked(settings, 1 << 60)) + (rates.context_nbytes or 0) + LIBRARIES_NBYTES

    base = ServeSettings(
        options.load.mode, engine.kv_dtype or dtype, engine.max_batch_size, engine.max_batch_tokens, engine.max_seq_len
    )
    base = replace(base, graphs=engine.graphs, num_ranks=options.world_size)
    search = ServeSearch(
        lambda settings: plan_serving(*asked(settings, device_nbytes)),
        least_nbytes,
        device_nbytes,
        _serving_rates(rates) or H200_RATES,
        config.max_seq_len,
        has_narrow=not config.kv_scales_problem,
    )
    return fit_serve.report(search, base)


def run(options: ServePlanOptions) -> int:
    """Print the plan, and draw its slot map where that is asked for; or what fits. Return the exit status."""
    if options.fit_nbytes is not None:
        found = fit_report(options, options.fit_nbytes)
        _write(options, found.as_dict(), found.text)
        return 0 if found.fits else 1
    forecast = forecast_serving(options)
    _write(options, forecast.as_dict(), str(forecast))
    if options.slot_map is not None:
        slot_map.draw(forecast.drawable(), options.slot_map, f"{options.model}, served")
    return 0


def _write(options: ServePlanOptions, data: dict[str, Any], text: str) -> None:
    print(json.dumps(data) if options.json == "-" else text, flush=True)
    if options.json not in (None, "-"):
        Path(options.json).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Run ``launch.plan --serve``, whose arguments these are without that flag.

    Returns the exit status: 0 where the model fits, 1 where it does not, 2 after a mistake.
    """
    options = COMMAND.answer(arguments, lambda asked: (machine_rates(), config_of(asked.model)))
    return options if isinstance(options, int) else exit_status(run, options)
