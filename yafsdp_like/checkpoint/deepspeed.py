"""DeepSpeed's ZeRO checkpoints of stages 1 to 3, loaded into a sharded model and its optimizer.

Owns where their files keep which values: flat fp32 partitions and Adam's moments, one file a rank, and names and shapes
beside them. DeepSpeed is not needed, and nothing in the files is run: classes that a pickle names become inert.

[Note: ZeRO's flat partitions]
Stages 1 and 2 concatenate the trainable parameters of each parameter group, and cut the result into one piece a rank.
Stage 3 cuts each parameter into one piece a rank, padded to equal lengths, and concatenates the pieces of a rank, over
several tensors (`sub_group_size`). Shapes are listed in the order of concatenation, group by group.
"""

from __future__ import annotations

import collections
import math
import pickle
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from yafsdp_like.comm.consistency import raise_on_all_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

OPTIMIZER, MODEL = "*_optim_states.pt", "*model_states.pt"
DATA_PARALLEL = re.compile(r"(?:[a-z]+\d+_)?(?:zero_pp_rank_\d+_)?mp_rank_0+_(?:model|optim)_states\.pt")
STATE = "optimizer_state_dict"  # a key of a rank's file, and with stage 3 again of what is below it
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


def _plain(build: Callable[..., Tensor], _: Any, args: Sequence[Any], __: Any) -> Tensor:
    """A tensor that was pickled with attributes, which DeepSpeed gives to those of stage 3, without them."""
    return build(*args)


_BUILDERS: dict[tuple[str, str], Any] = {
    ("torch._tensor", "_rebuild_from_type_v2"): _plain,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}


class Inert:
    """Stands for an object of a class that is not built here: it holds what the class would have been called with."""

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        """Leave the state alone."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Leave an item alone."""

    def append(self, value: Any) -> None:
        """Leave an item alone."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return what builds tensors, dtypes and plain containers; `Inert` for all else."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else _BUILDERS.get((module, name), Inert)


@dataclass(frozen=True)
class FlatPlace:
    """Where a parameter lies in its vectors: `numel` values of each of its pieces, from `offset` on."""

    group: int
    offset: int
    shape: torch.Size


class ZeroCheckpoint:
    """What a directory of ``DeepSpeedEngine.save_checkpoint`` holds; values are read when they are asked for."""

    def __init__(self, directory: str | Path, tag: str | None = None) -> None:
        """Map the files. Raises ``ValueError`` where they are not a complete checkpoint of stage 1, 2 or 3."""
        self.path = _tagged(Path(directory), tag)
        self._ranks = [_load(file)[STATE] for file in _of_all_ranks(self.path, OPTIMIZER)]
        self._models = [_load(file) for file in _of_all_ranks(self.path, MODEL)]
        stage = self._ranks[0].get("zero_stage")
        self.stage = int(stage.args[0] if isinstance(stage, Inert) else stage or 0)
        count = self._ranks[0].get("partition_count")
        self._check(count if isinstance(count, list) else [count])
        self.global_steps = int(self._models[0].get("global_steps", 0))
        self.shared: dict[str, str] = dict(self._models[0].get("shared_params") or {})  # name -> whose values it has
        self._frozen: Mapping[str, Any] = self._models[0].get("frozen_param_shapes") or {}
        self._places = self._place(self._models[0]["param_shapes"])
        self._vectors = {WEIGHT: self._weights()} | {kind: self._moments(kind) for kind in MOMENTS}

    def _check(self, counts: Sequence[int | None]) -> None:
        if self.stage not in (1, 2, 3) or not isinstance(self._models[0].get("param_shapes"), list):
            raise ValueError(f"{self.path}: expected a ZeRO checkpoint of stage 1, 2 or 3, found stage {self.stage}")
        if len(set(counts)) != 1:
            raise ValueError(f"{self.path}: its parameter groups are cut for {counts} ranks, as those of experts are")
        count = counts[0]
        if count != len(self._ranks):
            raise ValueError(f"{self.path}: expected {count} files {OPTIMIZER}, found {len(self._ranks)}")
        if self.stage == 3 and len(self._models) != len(self._ranks):
            raise ValueError(f"{self.path}: expected {count} files {MODEL}, found {len(self._models)}")

    @property
    def names(self) -> list[str]:
        """Return the names of all parameters, frozen and tied ones included."""
        return [*self._places, *self._frozen, *self.shared]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers that the model's state dict had, whole."""
        module = self._models[0].get("module") or {}
        return {name: module[name] for name in self._models[0].get("buffer_names") or () if name in module}

    @property
    def step(self) -> float:
        """Return the number of updates that the optimizer has made."""
        state = self._inner(self._ranks[0])
        first: dict[str, Any] = next(iter(state["state"].values()), {})
        return float(first.get("step", state["param_groups"][0].get("step", 0)))

    def read(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Return the fp32 values of a parameter, or of a moment of it (`exp_avg`, `exp_avg_sq`), whole, on the CPU.

        Raises ``KeyError`` for a name that is not there, and for moments of a frozen parameter.
        """
        shape = self.shape(name)
        return torch.cat(self.pieces(name, kind))[: shape.numel()].view(shape).float()

    def shape(self, name: str) -> torch.Size:
        """Return a parameter's shape. Raises ``KeyError`` for a name that is not there."""
        name = self.shared.get(name, name)
        return torch.Size(self._frozen[name]) if name in self._frozen else self._places[name].shape

    def has_moments(self, name: str) -> bool:
        """Whether a parameter was trained."""
        return self.shared.get(name, name) in self._places

    def pieces(self, name: str, kind: str = WEIGHT) -> list[Tensor]:
        """Return flat views of the files that make a parameter's values, one behind the other, with padding at the end.

        Raises ``KeyError`` as ``read`` does, and ``ValueError`` where values are missing. Nothing is read.
        """
        name = self.shared.get(name, name)
        if name in self._frozen and kind == WEIGHT:
            parts = [model["frozen_param_fragments"][name].flatten() for model in self._models]
            return _cut(parts if self.stage == 3 else parts[:1], 0, self.shape(name).numel())
        place = self._places[name]
        numel, vectors = place.shape.numel(), self._vectors[kind]
        if self.stage == 3:
            each = math.ceil(numel / len(self._ranks))
            return [piece for rank in vectors for piece in _cut(rank, place.offset, each)]
        return _cut(vectors[place.group] if place.group < len(vectors) else [], place.offset, numel)

    def _place(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, FlatPlace]:
        places: dict[str, FlatPlace] = {}
        paddings = self._ranks[0].get("param_alignment_paddings") or [[0] * len(shapes) for shapes in groups]
        offset = 0
        for group, shapes in enumerate(groups):
            offset = offset if self.stage == 3 else 0
            for index, (name, given) in enumerate(shapes.items()):
                shape = torch.Size(given)
                places[name] = FlatPlace(group, offset, shape)
                offset += math.ceil(shape.numel() / len(self._ranks)) if self.stage == 3 else shape.numel()
                offset += 0 if self.stage == 3 else paddings[group][index]
        return places

    def _inner(self, rank: Mapping[str, Any]) -> Any:
        """Return the state dict of the optimizer that DeepSpeed steps with flat tensors in the place of parameters."""
        found = rank.get(STATE if self.stage == 3 else "base_optimizer_state")
        if not isinstance(found, dict) or "state" not in found:
            raise ValueError(f"{self.path}: it has no moments of a rigid checkpoint (elastic_checkpoint is on?)")
        return found

    def _weights(self) -> list[list[Tensor]]:
        if self.stage == 3:
            return [rank["fp32_flat_groups"] for rank in self._ranks]
        return _by_group(rank["single_partition_of_fp32_groups"] for rank in self._ranks)

    def _moments(self, kind: str) -> list[list[Tensor]]:
        ranks = []
        for rank in self._ranks:
            inner = self._inner(rank)
            keys = [key for group in inner["param_groups"] for key in group["params"]]
            ranks.append([inner["state"][key][kind].flatten() for key in keys if kind in inner["state"].get(key, {})])
        return ranks if self.stage == 3 else _by_group(ranks)


def _by_group(ranks: Iterable[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [list(pieces) for pieces in zip(*ranks, strict=True)]


def _cut(pieces: Sequence[Tensor], start: int, numel: int) -> list[Tensor]:
    """Views of values `start` to `start + numel` of pieces in a row. ValueError where there are not so many."""
    found = []
    wanted = numel
    for piece in pieces:
        taken = piece[min(start, len(piece)) :][:wanted]
        found.append(taken)
        wanted -= len(taken)
        start = max(0, start - len(piece))
    if wanted:
        raise ValueError(f"the checkpoint has {numel - wanted} of the {numel} values of a parameter")
    return found


def _tagged(directory: Path, tag: str | None) -> Path:
    latest = directory / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
    path = directory / tag if tag else directory
    if not path.is_dir():
        raise ValueError(f"expected a DeepSpeed checkpoint, found no directory {path}")
    return path


def _of_all_ranks(path: Path, pattern: str) -> list[Path]:
    """The files of data parallel ranks, in order of ranks. Raises ValueError for model parallel ones."""
    files = sorted(path.glob(pattern), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    if not files:
        raise ValueError(f"{path} is no DeepSpeed checkpoint: it has no {pattern}")
    if others := [file.name for file in files if not DATA_PARALLEL.fullmatch(file.name)]:
        raise ValueError(f"{path}: {others[0]} is of model or expert parallel ranks, which are not supported")
    return files


def _load(file: Path) -> Any:
    try:
        # torch.load hands archives with this record to torch.jit.load, which runs the code that they bring.
        if "constants.pkl" in torch._C.PyTorchFileReader(str(file)).get_all_records():
            raise ValueError("it is a TorchScript archive, which would be run")
        return torch.load(
            str(file),
            map_location="cpu",
            mmap=True,
            weights_only=False,
            pickle_module=SimpleNamespace(Unpickler=_Unpickler, __name__=__name__),
        )
    except Exception as error:  # whatever broken bytes make of it
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from error


@torch.no_grad()
def load_deepspeed(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, directory: str | Path, tag: str | None = None
) -> int:
    """Fill a sharded model, and its optimizer, from a checkpoint that DeepSpeed wrote on any number of ranks.

    Call it on every rank. Each reads whole parameters, one at a time, and keeps its rows. The optimizer is one with
    Adam's moments, this package's in any format or torch's; its rates and groups stay what they are.

    Args:
        model: a module that ``fully_shard`` has sharded, whose parameters have memory.
        optimizer: None to load weights alone.
        directory: what ``save_checkpoint`` was given, or a tag's directory in it.
        tag: which one; by default the one that the file ``latest`` names.

    Returns:
        the number of steps that DeepSpeed had made.

    Raises:
        ValueError: for files that are no such checkpoint, and parameters whose names or shapes differ.
        AgreedError: the same on every rank of a process group, if one of them finds this.

    The model and the optimizer are as they were then.
    """
    with raise_on_all_ranks() if dist.is_initialized() else nullcontext():
        checkpoint = ZeroCheckpoint(directory, tag)
        _check_fits(checkpoint, model, optimizer)
    params = dict(model.named_parameters(remove_duplicate=True))
    for name, param in params.items():
        param.copy_(_placed_as(param, checkpoint.read(name)))
    for name, buffer in model.named_buffers():
        saved = checkpoint.buffers.get(name)
        if saved is not None:
            buffer.copy_(saved)
    if optimizer is not None:
        state: Any = get_optimizer_state_dict(model, optimizer)
        for name, values in state["state"].items():
            values["step"] = torch.tensor(checkpoint.step)
            for kind in MOMENTS:
                values[kind] = _placed_as(params[name], checkpoint.read(name, kind))
        set_optimizer_state_dict(model, optimizer, state)
    return checkpoint.global_steps


def _check_fits(checkpoint: ZeroCheckpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ValueError unless the checkpoint has all values that the model and the optimizer take, in their shapes."""
    path, params = checkpoint.path, dict(model.named_parameters(remove_duplicate=True))
    known = set(checkpoint.names)
    if missing := [name for name in params if name not in known]:
        raise ValueError(f"{path} has no {missing[0]!r} ({len(missing)} missing); it has {checkpoint.names[:3]}")
    buffers = checkpoint.buffers
    taken = {**params, **{name: buffer for name, buffer in model.named_buffers() if name in buffers}}
    for name, value in taken.items():
        saved = checkpoint.shape(name) if name in params else buffers[name].shape
        if saved != value.shape:
            raise ValueError(f"{name!r} has shape {tuple(value.shape)}, and {tuple(saved)} in {path}")
    updated = {id(param) for group in optimizer.param_groups for param in group["params"]} if optimizer else set()
    for name, param in params.items():
        checkpoint.pieces(name)
        if id(param) not in updated or not param.requires_grad:
            continue
        if not checkpoint.has_moments(name):
            raise ValueError(
                f"{path} has no moments of {name!r}, which was frozen: load the weights without an optimizer"
            )
        for kind in MOMENTS:
            checkpoint.pieces(name, kind)


def _placed_as(param: Tensor, value: Tensor) -> Tensor:
    if not isinstance(param, DTensor):
        return value.to(param.device)
    return distribute_tensor(value.to(param.device), param.device_mesh, param.placements, src_data_rank=None)
