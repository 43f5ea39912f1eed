"""The values of a vision tower: where they are read from, and a digest of them, taken while they are read.

Models whose towers have one digest share the features of images, whatever else they are made of.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from yafsdp_like.models.vision import TOWER, VisionConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from yafsdp_like.checkpoint.safetensors import StoredTensor


class ValueReader(Protocol):
    """Where the values of parameters come from, as ``loading.Source``."""

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read elements of a parameter from ``start`` on into ``out``."""


class VisionSource:
    """A tower's and a projector's values out of safetensors files; what is the decoder's comes from another source."""

    def __init__(self, decoder: ValueReader, stored: Mapping[str, StoredTensor]) -> None:
        self._decoder, self._stored = decoder, stored

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read the whole parameter, and keep what is asked for."""
        stored = self._stored.get(name)
        if stored is None:
            self._decoder.read_into(name, start, out)
        else:
            out.copy_(stored.read_rows(0, stored.spec.shape[0]).flatten()[start : start + len(out)])


class TowerDigest:
    """The digest of one model's vision tower, of its shape, dtype and values in the order in which they are read."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        alone = replace(config, image_token=0, projector_activation="gelu", projector_bias=True)
        self._shape = f"{alone} {dtype}".encode()
        self._digest = hashlib.blake2b(self._shape, digest_size=32)

    @property
    def value(self) -> bytes:
        """The digest of what was read last."""
        return self._digest.digest()

    def watch(self, source: ValueReader) -> ValueReader:
        """Return a source that reads as ``source`` does; the digest is then that of all that is read of the tower."""
        self._digest = hashlib.blake2b(self._shape, digest_size=32)
        return _Watched(source, self._digest)


class _Watched:
    def __init__(self, source: ValueReader, digest: hashlib.blake2b) -> None:
        self._source, self._digest = source, digest

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read as the source does, and note the values of a tower's."""
        self._source.read_into(name, start, out)
        if name.startswith(f"{TOWER}."):
            self._digest.update(out.detach().cpu().contiguous().view(torch.uint8).numpy().data)
