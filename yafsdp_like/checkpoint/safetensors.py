"""The safetensors format, by byte range: what a directory holds, some rows of one tensor, and writing tensor by tensor.

Owns the bytes of the files. It must not know of models, of ranks, or of what a name means. The format, as Hugging
Face's `safetensors` repository specifies it: eight bytes with the header's length, little-endian; the header, JSON
that gives each tensor's dtype, shape and range of bytes behind the header; the tensors, row-major, without gaps.

`safetensors` itself maps files, so that what is read is whole pages, and writes only what is in memory at once.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

_ADAPTER, _MISTRALS = "adapter_model", "consolidated"
_OF_OTHERS = (_ADAPTER, _MISTRALS)  # how names of files begin that may lie beside a model's

_MAX_HEADER_NBYTES = 100_000_000  # the format's own limit
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
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `spec.nbytes` bytes of `path` from `offset_nbytes` on."""

    path: Path
    offset_nbytes: int
    spec: TensorSpec

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0, on the CPU; no other byte of the file is read.

        Raises ValueError when the file has become shorter than its header says.
        """
        num_rows, *row_shape = self.spec.shape
        if not 0 <= start <= stop <= num_rows:
            raise ValueError(f"rows {start} to {stop} are not within the {num_rows} rows of a tensor in {self.path}")
        rows = torch.empty(stop - start, *row_shape, dtype=self.spec.dtype)
        row_nbytes = math.prod(row_shape) * self.spec.dtype.itemsize
        if rows.numel():
            _read_into(self.path, self.offset_nbytes + start * row_nbytes, _bytes_of(rows))
        return rows


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory: of the files its index names, else of `model.safetensors`, else of every
    `*.safetensors` in it, but those of adapters and of Mistral's own format.

    Only headers are read. Raises ValueError for a directory without such files, a name that is stored twice, and a
    file that is missing, damaged or cut short.
    """
    found: dict[str, StoredTensor] = {}
    for path in _files_of(directory):
        for name, tensor in _stored_in(path).items():
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
    """The files that an index names, each of which is beside it."""
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
    """What is there where weights are missing, and what to do about it."""
    if found := sorted(directory.glob(f"{_ADAPTER}*")):
        return f"only an adapter, {found[0].name}: merge it into the model that it was made for, and save that"
    if found := sorted(directory.glob(f"{_MISTRALS}*.safetensors")):
        return f"only {found[0].name}, with names of another format: get the directory that transformers loads"
    pickled = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(kind))]
    if pickled:
        return f"{pickled[0]}, a pickle, which is not read: load it with transformers if you trust it, and save it"
    return "none"


def _stored_in(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by its header."""
    file_nbytes = path.stat().st_size
    try:
        if file_nbytes < 8:
            raise ValueError(f"it has {file_nbytes} bytes")
        prefix = bytearray(8)
        _read_into(path, 0, memoryview(prefix))
        (header_nbytes,) = struct.unpack("<Q", prefix)
        if not 2 <= header_nbytes <= min(_MAX_HEADER_NBYTES, file_nbytes - 8):
            raise ValueError(f"its header would have {header_nbytes} bytes, in a file of {file_nbytes}")
        header = bytearray(header_nbytes)
        _read_into(path, 8, memoryview(header))
        entries: dict[str, Any] = json.loads(header)
        if not isinstance(entries, dict):
            raise ValueError(f"its header is {type(entries).__name__}, expected an object in JSON")
        entries.pop("__metadata__", None)
        return {name: _stored_tensor(path, 8 + header_nbytes, entry, file_nbytes) for name, entry in entries.items()}
    except KeyError as error:
        raise ValueError(f"{path} is no whole safetensors file: a tensor in its header lacks {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _stored_tensor(path: Path, data_nbytes: int, entry: Mapping[str, Any], file_nbytes: int) -> StoredTensor:
    """One entry of a header whose tensors begin at byte `data_nbytes`, checked against the file's size."""
    begin, end = entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is not one of {', '.join(_DTYPES)}")
    for number in (begin, end, *entry["shape"]):
        if type(number) is not int or number < 0:
            raise ValueError(f"shapes and offsets are whole numbers from 0 on, found {number!r}")
    spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if end - begin != spec.nbytes or data_nbytes + end > file_nbytes:
        raise ValueError(
            f"bytes {begin} to {end} behind the header do not hold {spec.shape} of {spec.dtype}, "
            f"in a file of {file_nbytes}"
        )
    return StoredTensor(path, data_nbytes + begin, spec)


def _read_into(path: Path, offset_nbytes: int, buffer: memoryview) -> None:
    """Fill `buffer` from `offset_nbytes` on. Every byte that this module reads is read here."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset_nbytes)
        num_read = 0
        while num_read < len(buffer):
            count = file.readinto(buffer[num_read:])
            if not count:
                raise ValueError(f"{path} ends {len(buffer) - num_read} bytes early")
            num_read += count


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# --- writing ---


class TensorWriter:
    """Writes the tensors of `specs` into a directory, one at a time and in that order.

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
        """Raises FileExistsError where other weights lie already: a reader might take theirs for ours."""
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
    """Which tensors go into which file, in order."""
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
    """The length and the header of a file with these tensors; padded, so that tensors begin at a multiple of 8."""
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
