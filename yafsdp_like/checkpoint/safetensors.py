"""Safetensors files: which tensors a directory holds, rows of one tensor, and writing tensor by tensor.

Reading is the `safetensors` library's, which maps a file and copies what is asked for. It writes only what is in memory
at once, so writing is ours. The format, as the library's repository specifies it: eight bytes with the header's length,
little-endian; the header, JSON with each tensor's dtype, shape and range of bytes after the header; the tensors,
row-major, without gaps. This file knows nothing of models, of ranks, or of what a name means.
"""

import contextlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

_ADAPTER, _MISTRALS = "adapter_model", "consolidated"
_MAX_OPEN = 8  # files at a time
_OF_OTHERS = (_ADAPTER, _MISTRALS)  # prefixes of other files that may be beside a model's

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """The dtype and shape of a tensor that is, or will be, in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    path: Path
    name: str
    spec: TensorSpec

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of dimension 0 to the CPU, and no others.

        Raises ValueError for rows that are not there, and if the file has become damaged or shorter.
        """
        num_rows = self.spec.shape[0]
        if not 0 <= start <= stop <= num_rows:
            raise ValueError(f"rows {start} to {stop} are not within the {num_rows} rows of a tensor in {self.path}")
        with _opened(self.path) as file:
            return file.get_slice(self.name)[start:stop]

    def read(self) -> Tensor:
        """Read all of it to the CPU, which may have no dimension. Raises ValueError if the file has become damaged."""
        with _opened(self.path) as file:
            return file.get_tensor(self.name)


def _file(path: Path, *state: int) -> Any:
    """Open a file. ``state`` is what changes if the file does: where files are held, it is then opened anew."""
    return safe_open(path, framework="pt")


_opener: ContextVar[Callable[..., Any]] = ContextVar("_opener", default=_file)


@contextlib.contextmanager
def hold_files() -> Iterator[None]:
    """Keep files open that this thread reads, up to 8 of them, until this is left.

    For reading many tensors: of thousands, a file's header takes longer to read than one of them does. Without this a
    file is open while one tensor is read.
    """
    outer = _opener.set(lru_cache(maxsize=_MAX_OPEN)(_file))
    try:
        yield
    finally:
        _opener.reset(outer)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file by the library, which checks its header and size; ValueError in one line if they are wrong."""
    try:
        state = path.stat()
        yield _opener.get()(path, state.st_ino, state.st_size, state.st_mtime_ns)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """List every tensor of a directory by name.

    Its files are those that its index names, else `model.safetensors`, else every `*.safetensors` except adapters and
    Mistral's own format. Only headers are read. Raises ValueError for a directory without such files, a name that is
    stored twice, and a file that is missing, damaged or cut short.
    """
    found: dict[str, StoredTensor] = {}
    for path in _files_of(directory):
        for name, tensor in stored_in(path).items():
            if name in found:
                raise ValueError(f"'{name}' is both in {found[name].path} and in {path}")
            found[name] = tensor
    return found


def _files_of(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    if index.exists():
        files = [directory / name for name in _named_in(index)]
        missing = [path.name for path in files if not path.exists()]
        if missing:
            raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
        return files
    if (directory / FILE_NAME).exists():
        return [directory / FILE_NAME]
    files = [path for path in sorted(directory.glob("*.safetensors")) if not path.name.startswith(_OF_OTHERS)]
    if not files:
        raise ValueError(f"expected {FILE_NAME} or other safetensors files in {directory}, found {_instead(directory)}")
    return files


def _named_in(index: Path) -> list[str]:
    """Return the files that an index names, each of which is beside it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names:
            raise ValueError("its weight_map is empty")
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r} is not the name of a safetensors file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of safetensors files: {error!r}") from error
    return names


def _instead(directory: Path) -> str:
    """Describe what is there instead of weights, and what to do about it."""
    if found := sorted(directory.glob(f"{_ADAPTER}*")):
        return f"only an adapter, {found[0].name}: merge it into the model that it was made for, and save that"
    if found := sorted(directory.glob(f"{_MISTRALS}*.safetensors")):
        return f"only {found[0].name}, with names of another format: get the directory that transformers loads"
    pickled = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(kind))]
    if pickled:
        return f"{pickled[0]}, a pickle, which is not read: load it with transformers if you trust it, and save it"
    return "none"


def stored_in(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one file, by its header."""
    with _opened(path) as file:
        return {name: StoredTensor(path, name, _spec_of(file.get_slice(name))) for name in file.keys()}  # noqa: SIM118


def _spec_of(stored: Any) -> TensorSpec:
    if (name := stored.get_dtype()) not in _DTYPES:
        raise ValueError(f"dtype {name} is not one of {', '.join(_DTYPES)}")
    return TensorSpec(_DTYPES[name], tuple(stored.get_shape()))


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# --- writing ---


class TensorWriter:
    """Write the tensors of `specs` into a directory, one at a time and in that order.

    They go into `model.safetensors`, or, where that would have more than `max_file_nbytes` bytes of tensors, into
    several files with an index; a file holds at least one tensor. Used as a context, it raises RuntimeError when
    left without all of them.
    """

    def __init__(self, directory: Path, specs: Mapping[str, TensorSpec], max_file_nbytes: int) -> None:
        self._directory = directory
        self._specs = dict(specs)
        self._order = list(specs)
        self._num_written = 0
        self._files = _split(specs, max_file_nbytes)
        self._path_of = {name: path for path, names in self._files.items() for name in names}
        self._open_path = ""
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Raise FileExistsError where the directory holds weights already: a reader might take them for these."""
        self._directory.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in self._directory.glob("*.safetensors*"))
        if there:
            raise FileExistsError(f"{self._directory} already holds weights: {', '.join(there)}")
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; raises ValueError unless it is what `specs` announced."""
        expected = self._order[self._num_written]
        if name != expected or TensorSpec(tensor.dtype, tuple(tensor.shape)) != self._specs[name]:
            raise ValueError(
                f"expected '{expected}' {self._specs[expected]}, got '{name}' {tensor.dtype} {tuple(tensor.shape)}"
            )
        if self._path_of[name] != self._open_path:
            self._next_file(self._path_of[name])
        assert self._file is not None
        if tensor.numel():
            self._file.write(_bytes_of(tensor.detach().cpu().contiguous()))
        self._num_written += 1

    def _next_file(self, path: str) -> None:
        self._close()
        self._open_path = path
        self._file = (self._directory / path).open("wb")
        self._file.write(_header({name: self._specs[name] for name in self._files[path]}))

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if kind is not None:
            return
        if self._num_written < len(self._order):
            raise RuntimeError(f"'{self._order[self._num_written]}' and what follows it has not been written")
        if len(self._files) > 1:
            total = sum(spec.nbytes for spec in self._specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._path_of}
            (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _split(specs: Mapping[str, TensorSpec], max_file_nbytes: int) -> dict[str, list[str]]:
    """Assign tensors to files, in order."""
    groups: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not groups or size + spec.nbytes > max_file_nbytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    if len(groups) <= 1:
        return {FILE_NAME: list(specs)}
    stem, suffix = FILE_NAME.split(".")
    return {
        f"{stem}-{position:05d}-of-{len(groups):05d}.{suffix}": names for position, names in enumerate(groups, start=1)
    }


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Encode the length and the header of a file with these tensors, padded to a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    for name, spec in specs.items():
        entries[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (offset, offset + spec.nbytes),
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
