"""From what a user calls a model to weights that are served: configurations are read first, then values, once.

Owns where values come from: a Hugging Face directory, a checkpoint of training, a preset with random values, or a
decoder in memory. Every source gives any range of a parameter's elements, so that a rank that holds a part of a unit
reads that part.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from yafsdp_like.checkpoint import steps
from yafsdp_like.checkpoint.safetensors import hold_files
from yafsdp_like.comm.choice import transport_of
from yafsdp_like.comm.consistency import all_gather_object
from yafsdp_like.hardware import Hardware
from yafsdp_like.inference.plan.draft_plan import plan_with_draft
from yafsdp_like.inference.plan.quantized_fields import rows_per_scale
from yafsdp_like.inference.plan.serving_plan import DRAFT, ServingPlan, Site
from yafsdp_like.inference.weights.quantized_source import QuantizedSource, parts_of_each
from yafsdp_like.inference.weights.store import Store, Weights, reserve
from yafsdp_like.memory.streams import streams_of
from yafsdp_like.models import PRESETS, Decoder, DecoderConfig, hf
from yafsdp_like.models.decoder import fill_first_values
from yafsdp_like.models.hf_clip import vision_tensors
from yafsdp_like.models.vision_weights import VisionSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from yafsdp_like.checkpoint.safetensors import StoredTensor
    from yafsdp_like.comm import TransportName
    from yafsdp_like.comm.transport import Transport
    from yafsdp_like.inference.options import AnyMode, EngineOptions
    from yafsdp_like.inference.plan.packed_weights import Parameter

PRESET = "preset:"
ADAPTER_CONFIG = "adapter_config.json"
LIBRARIES_NBYTES = 2**30  # of a GPU, what CUDA's libraries may take beside the plan
CPU_KV_NBYTES = 2**30  # pages on a CPU, where nothing is said
_READ_NBYTES = 64 << 20  # at a time, about


class Source(Protocol):
    """Where the values of parameters come from."""

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read elements of the decoder's parameter ``name`` from ``start`` on into ``out``.

        ``out`` is (n,), on any device; values are cast to its dtype.
        """


@dataclass(frozen=True)
class Model:
    """A model that can be loaded: its shape is known, its values have not been read."""

    name: str
    config: DecoderConfig
    directory: Path | None  # with the tokenizer, if there is one
    source: Callable[[torch.device], Source]  # for weights on that device


def open_model(name: str, config: DecoderConfig | None = None) -> Model:
    """Open the model called ``name``; its configuration is read, its values are not.

    ``name`` is a Hugging Face directory, a ``step-N`` directory of training, a run's directory with such in it (then
    the latest), or ``preset:NAME``, which has random values. A directory with a config.json is a Hugging Face
    directory, whatever else lies there. A checkpoint has its configuration in the directory that training exports
    beside its shards; ``config`` is needed where it did not. Raises ValueError for what is no model, or does not fit
    its configuration. Nothing of a directory is ever run.
    """
    if name.startswith(PRESET):
        return _preset(name)
    path = Path(name).expanduser()
    if (path / hf.CONFIG_NAME).is_file():
        return _with_vision(_hf_directory(path), path)
    checkpoint = path if steps.is_complete(path) else steps.find_latest(path)
    if checkpoint is None and (path / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{name!r} holds an adapter: merge it into the model that it was made for, and save that")
    if checkpoint is None:
        lack = f": it has no {hf.CONFIG_NAME}" if path.is_dir() else ""
        known = f"a Hugging Face directory, a checkpoint (step-N) or {PRESET}NAME"
        raise ValueError(f"expected {known}, found {name!r}{lack}")
    return _checkpoint(checkpoint, config)


def model_of(module: Decoder, name: str = "decoder") -> Model:
    """Return a decoder in memory, unsharded, as a model with the values that it has when it is loaded."""
    return Model(name, module.config, None, lambda device: ModuleSource(module))


def random_model(name: str, config: DecoderConfig) -> Model:
    """Return a model with the values that a decoder starts from, drawn where it is loaded."""
    return Model(name, config, None, lambda device: RandomSource(config, device))


def load(
    model: Model | str,
    options: EngineOptions,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mode: AnyMode = "auto",
    transport: Transport | None = None,
    on_plan: Callable[[ServingPlan], object] | None = None,
    draft: Model | None = None,
) -> Weights:
    """Plan memory within ``options``, allocate all of it, and read the weights of ``model``.

    Weights are bf16 on a GPU and float32 on a CPU unless ``dtype`` is given. ``on_plan`` is called with the plan before
    anything is allocated. With a ``transport`` its ranks may share weights; all of them then call this together. The
    plan has room for the weights of the ``draft`` model, which ``load_draft`` reads. Raises what ``open_model``,
    ``plan_with_draft`` and ``reserve`` do.
    """
    model = open_model(model) if isinstance(model, str) else model
    drafts = None if draft is None else draft.config
    plan = plan_with_draft(model.config, options, site_of(device, dtype, transport), mode, drafts)
    if on_plan is not None:
        on_plan(plan)
    return load_planned(model, plan, device, transport)


def with_memory_limit(
    options: EngineOptions, device: torch.device | str, transport: Transport | None = None
) -> EngineOptions:
    """Limit memory, where nothing is given, to free GPU memory less `LIBRARIES_NBYTES`, or to `CPU_KV_NBYTES`.

    Ranks that a ``transport`` joins call this together, and take the least of what they find, so that they plan alike.
    """
    device = indexed(device)
    if options.memory_limit_nbytes is None and device.type == "cuda":
        limit = max(1, torch.cuda.mem_get_info(device)[0] - LIBRARIES_NBYTES)
        limit = limit if transport is None else min(all_gather_object(limit))
        return replace(options, memory_limit_nbytes=limit)
    if options.memory_limit_nbytes is None and options.kv_nbytes is None:
        return replace(options, kv_nbytes=CPU_KV_NBYTES)
    return options


@hold_files()
def load_planned(
    model: Model, plan: ServingPlan, device: torch.device | str, transport: Transport | None = None
) -> Weights:
    """Allocate what ``plan`` says and read the weights; it was made for ``site_of`` the same device and transport."""
    weights = reserve(plan, indexed(device), transport)
    error: BaseException | None = None
    try:
        source = weights.watched(model.source(weights.device))
        for store in weights.stores():
            fill(store, source)
    except Exception as caught:
        error = caught
    weights.finish_loading(error)
    return weights


def draft_of(options: EngineOptions, given: Model | None = None) -> Model | None:
    """Return the model that drafts tokens, if the options ask for one: the one that is ``given``, or else opened."""
    speculation = options.speculation
    if speculation is not None and speculation.draft is not None:
        return given or open_model(speculation.draft)
    if given is not None:
        raise ValueError(f"a draft model needs speculate='draft:{given.name}', found {options.speculate!r}")
    return None


@hold_files()
def load_draft(weights: Weights, draft: Model) -> Weights:
    """Read the weights of the model that drafts, as planned, in its part of the arena of ``weights``."""
    plan = weights.plan.draft
    assert plan is not None, "planned with the draft model"
    arenas = weights.arena.part(DRAFT), weights.host.part(DRAFT)
    found, source = Weights(plan, *arenas, None, streams_of(weights.device)), draft.source(weights.device)
    for store in found.stores():
        fill(store, source)
    found.finish_loading()
    return found


def site_of(device: torch.device | str, dtype: torch.dtype | None = None, transport: Transport | None = None) -> Site:
    """Return what a plan has to know of ``device``, and of the ranks that ``transport`` joins."""
    device = indexed(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if transport is None:
        return Site(dtype, hardware=Hardware.of(device))
    return Site(dtype, transport.world_size, transport.mapped is not None, transport.description, Hardware.of(device))


def world_transport(device: torch.device | str, asked: TransportName = "auto") -> Transport | None:
    """Make the transport of all ranks of this process's world, together; None where it is alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group = dist.group.WORLD
    assert group is not None
    return transport_of(group, indexed(device), asked)


def indexed(device: torch.device | str) -> torch.device:
    """Return a GPU by its number: that of the current one if none is given."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def fill(store: Store, source: Source) -> None:
    """Read every parameter's elements that ``store`` holds from ``source``."""
    for parameter, segment in store.packed.parameters():
        offset = segment.offset_nbytes - store.start_nbytes  # of the parameter in the store
        first, last = max(offset, 0), min(offset + segment.nbytes, len(store.values))
        if first >= last:
            continue
        values = store.values[first:last].view(parameter.dtype)
        start = (first - offset) // parameter.dtype.itemsize
        if parameter.cut is not None:
            _fill_part(values, start, parameter, store.rank, source)
        else:
            source.read_into(parameter.name, start, values)


def _fill_part(values: Tensor, start: int, parameter: Parameter, rank: int, source: Source) -> None:
    """Read elements (n,) of one rank's part of a parameter that is cut, from the part's element ``start`` on.

    Parts of rows are copied out of the whole matrix, for which the device must have room while it is loaded: a source
    gives rows only, and a rank needs some of each. Of experts that is one expert's matrix at a time: all of a layer's
    together may take more than is free beside the arena.
    """
    cut = parameter.cut
    assert cut is not None
    if cut.dim == 0:
        source.read_into(parameter.name, rank * parameter.numel + start, values)
        return
    shape, stop = cut.whole(parameter.shape)[-2:], start + len(values)
    whole = torch.empty(shape, dtype=values.dtype, device=values.device)
    kept = whole.chunk(cut.num_ranks, cut.dim - len(parameter.shape))[rank]
    for index in range(start // kept.numel(), -(-stop // kept.numel())):
        begin, end = index * kept.numel(), (index + 1) * kept.numel()  # of this matrix's part
        first, last = max(start, begin), min(stop, end)
        source.read_into(parameter.name, index * whole.numel(), whole.view(-1))
        matrix = values[first - start : last - start]
        if last - first == kept.numel():
            matrix.view(kept.shape).copy_(kept)
        else:
            matrix.copy_(kept.flatten()[first - begin : last - begin])


# --- models ---


def _preset(name: str) -> Model:
    preset = name.removeprefix(PRESET)
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1)
        raise ValueError(f"unknown preset {preset!r}; " + (f"did you mean {near[0]!r}?" if near else str([*PRESETS])))
    return random_model(name, PRESETS[preset])


def _hf_directory(path: Path) -> Model:
    config = hf.load_hf_config(path)
    stored, matrices = hf.stored_weights(_on_meta(replace(config, quantization=None)), path, config.quantization)
    if config.quantization is None:
        return Model(str(path), config, path, lambda device: FileSource(stored))
    rows = rows_per_scale(config)
    return Model(str(path), config, path, lambda device: QuantizedSource(matrices, rows, FileSource(stored).read_into))


def _checkpoint(path: Path, config: DecoderConfig | None) -> Model:
    exported = path / steps.HF_EXPORT if (path / steps.HF_EXPORT / hf.CONFIG_NAME).is_file() else None
    if config is None and exported is None:
        raise ValueError(
            f"{path} does not say what model it is of: it has no {steps.HF_EXPORT}/{hf.CONFIG_NAME}; say its config"
        )
    config = config or hf.load_hf_config(path / steps.HF_EXPORT)
    shapes = {name: list(parameter.shape) for name, parameter in _on_meta(config).named_parameters()}
    saved = steps.read_run_metadata(path).get("shapes")
    if not isinstance(saved, dict):
        raise ValueError(f"{path / steps.METADATA}: expected each parameter's shape in 'shapes', found {saved!r}")
    difference = steps.first_difference(saved, shapes)
    if difference is not None:
        raise ValueError(f"{path} is a checkpoint of another model: {difference}")
    return Model(str(path), config, exported, lambda device: CheckpointSource(path, shapes))


def _on_meta(config: DecoderConfig) -> Decoder:
    try:
        with torch.device("meta"):
            return Decoder(config)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"no memory holds a model of such sizes: {config}") from error


def _with_vision(model: Model, path: Path) -> Model:
    """Return a model whose source has the values of its vision tower too, if it has one."""
    if model.config.vision is None:
        return model
    stored, source_of = vision_tensors(path, model.config), model.source
    return replace(model, source=lambda device: VisionSource(source_of(device), stored))


# --- sources ---


class ModuleSource:
    """A decoder in memory."""

    def __init__(self, module: Decoder) -> None:
        self._parameters = dict(module.named_parameters())

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Copy from the module's parameter."""
        out.copy_(self._parameters[name].detach().flatten()[start : start + len(out)])


class RandomSource:
    """The values that ``Decoder(config)`` starts from on ``device`` with seed 0, drawn there."""

    def __init__(self, config: DecoderConfig, device: torch.device, seed: int = 0) -> None:
        self._config, self._device, self._seed = config, device, seed
        self._parameters = {n: (i, p.shape) for i, (n, p) in enumerate(_on_meta(config).named_parameters())}
        self._last: tuple[str, Tensor] | None = None  # experts' matrices, which are read one by one, on the host

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Draw the whole parameter, unless it was the last one, and keep what is asked for."""
        index, shape = self._parameters[name]
        is_whole = len(out) == shape.numel() and out.device == self._device
        if not is_whole and self._last is not None and self._last[0] == name:
            out.copy_(self._last[1].flatten()[start : start + len(out)])
            return
        whole = out.view(shape) if is_whole else torch.empty(shape, dtype=out.dtype, device=self._device)
        fill_first_values(whole, name, self._config, f"{self._seed}.{index}")
        if not is_whole:
            out.copy_(whole.flatten()[start : start + len(out)])
            self._last = (name, whole.cpu()) if len(shape) > 2 else None


class FileSource:
    """Safetensors files: the rows that hold what is asked for are read, some at a time."""

    def __init__(self, stored: Mapping[str, Sequence[StoredTensor]]) -> None:
        """``stored`` are the tensors of each parameter, one behind the other and all of one shape: one, or experts'."""
        self._stored = stored

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read the rows that hold the elements, about 64 MiB at a time."""
        tensors = self._stored[name]
        for index, first, part in parts_of_each(start, out, torch.Size(tensors[0].spec.shape).numel()):
            _read_rows(tensors[index], first, part)


def _read_rows(stored: StoredTensor, start: int, out: Tensor) -> None:
    """Read elements of a tensor from ``start`` on."""
    num_rows, row_numel = stored.spec.shape[0], torch.Size(stored.spec.shape[1:]).numel()
    rows_at_once = max(_READ_NBYTES // (row_numel * stored.spec.dtype.itemsize), 1)
    stop = start + len(out)
    for row in range(start // row_numel, -(-stop // row_numel), rows_at_once):
        values = stored.read_rows(row, min(row + rows_at_once, num_rows)).flatten()
        offset = row * row_numel  # of what was read in the tensor
        first, last = max(offset, start), min(offset + len(values), stop)
        out[first - start : last - start].copy_(values[first - offset : last - offset])


class CheckpointSource:
    """The shards that training has saved, a parameter at a time, whole."""

    def __init__(self, path: Path, shapes: Mapping[str, list[int]]) -> None:
        self._path, self._shapes = path, shapes
        self._last: tuple[str, Tensor] | None = None  # experts' matrices are read one by one

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read the whole parameter, unless it was the last one, and keep what is asked for."""
        if self._last is None or self._last[0] != name:
            self._last = name, torch.empty(self._shapes[name], dtype=torch.float32)
            steps.load_whole(self._path, {"model": {name: self._last[1]}})
        out.copy_(self._last[1].flatten()[start : start + len(out)])
