"""Reading torch's distributed checkpoints from sources that are not trusted: nothing in them is run.

Owns what may stand in such a checkpoint. Its `.metadata` is a pickle, and so is every value that is no tensor. A pickle
names functions and calls them, so here it may name those classes only that describe tensors and where they lie, and
values are read by torch's own restricted loader. Torch's `FileSystemReader` and `DefaultLoadPlanner` restrict neither.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.planner import ReadItem

METADATA = ".metadata"  # the name is torch's

_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            described.BytesStorageMetadata,
            described.ChunkStorageMetadata,
            described.Metadata,
            described.MetadataIndex,
            described.StorageMeta,
            described.TensorProperties,
            described.TensorStorageMetadata,
            described._MEM_FORMAT_ENCODING,
            _StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # a look-up by name
    # Where the writer's directory was. Python 3.13 moved the classes; paths of another system are plain ones here.
    **{
        (module, name): pathlib.PurePath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a pickle asks for by name: one of the classes above, or a dtype."""
        if (found := _CLASSES.get((module, name))) is not None:
            return found
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not what metadata are made of")


def read_metadata(path: Path) -> Metadata:
    """What the checkpoint in the directory `path` says it holds. Raises ValueError for what is no such thing."""
    try:
        with (path / METADATA).open("rb") as file:
            found = _MetadataUnpickler(file).load()
        _check(found)
    except OSError as error:
        raise ValueError(f"{path / METADATA} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever broken bytes make of it
        raise ValueError(f"{path / METADATA} is not the metadata of a distributed checkpoint: {error}") from error
    assert isinstance(found, Metadata)
    return found


def _check(found: object) -> None:
    """Raises ValueError for other things than metadata, and for files outside the checkpoint's directory."""
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise ValueError(f"found a {type(found).__name__} in it")
    if not isinstance(found.storage_data, dict):
        raise ValueError("it does not say where tensors lie")
    for entry in found.storage_data.values():
        if not isinstance(entry, _StorageInfo) or not isinstance(entry.relative_path, str):
            raise ValueError(f"expected where a tensor lies, found {type(entry).__name__}")
        if not all(isinstance(vars(entry).get(name), int) for name in ("offset", "length")):
            raise ValueError(f"it does not say which bytes of {entry.relative_path!r} are a tensor's")
        place = PurePath(entry.relative_path)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"it refers to {entry.relative_path!r}, which is not in the checkpoint's directory")


class CheckedReader(FileSystemReader):
    """Torch's reader of files, for metadata that were read before by `read_metadata`."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata given at construction, which have been checked."""
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class CheckedPlanner(DefaultLoadPlanner):
    """Torch's plan of what is read, whose values that are no tensors are plain ones: numbers, texts, containers."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Unpickle only plain values, and hand them on to torch."""
        plain = torch.load(value, map_location="cpu", weights_only=True)
        checked = io.BytesIO()  # torch's own method, which knows where the value belongs, reads it again
        torch.save(plain, checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def why(error: CheckpointException) -> str:
    """The first failure among the ranks', in one line, with its type unless it is a mistake in what was read."""
    rank, failure = next(iter(sorted(error.failures.items())))
    cause = failure[0]
    kind = "" if isinstance(cause, (ValueError, OSError)) else f"{type(cause).__name__}: "
    words = str(cause).strip().splitlines() or [""]
    # Torch goes on with advice to read the file unrestricted, which is none for a damaged one.
    first = words[0] if not kind else words[0].split(". ")[0]
    return f"{kind}{first} (rank {rank})"
