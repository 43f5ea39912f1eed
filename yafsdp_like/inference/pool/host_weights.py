"""Weights of models in host memory, each as it lies on the device, in one region of a fixed size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yafsdp_like.memory.arena import Place


class HostFullError(RuntimeError):
    """Host memory for weights has no room for a model; unload another one, or give it more."""


class HostWeights:
    """The images of a pool's models: one range of bytes each, the first that is free when it is put there."""

    def __init__(self, region: Place) -> None:
        self._region = region
        self._segments: dict[str, Segment] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._segments

    def put(self, name: str, nbytes: int) -> Place:
        """Return the place of a new image; raises HostFullError, with the numbers, where no range is so large."""
        assert name not in self._segments, f"model {name!r} has an image already"
        gaps = list(self._gaps())
        start = next((gap.offset_nbytes for gap in gaps if gap.nbytes >= nbytes), None)
        if start is None:
            held = ", ".join(f"{other!r} {segment.nbytes:,}" for other, segment in self._segments.items())
            free = [gap.nbytes for gap in gaps]
            raise HostFullError(
                f"model {name!r} needs {nbytes:,} bytes of host memory for its weights; of "
                f"{self._region.segment.nbytes:,} bytes {sum(free):,} are free, {max(free):,} in a row (bytes of other "
                f"models: {held or 'none'}): unload one of them, or raise host_weights_nbytes"
            )
        self._segments[name] = Segment(start, nbytes)
        return self._region.part(self._segments[name])

    def drop(self, name: str) -> None:
        """Free the bytes of an image."""
        del self._segments[name]

    def _gaps(self) -> Iterator[Segment]:
        end = 0
        for segment in sorted(self._segments.values(), key=lambda segment: segment.offset_nbytes):
            yield Segment(end, segment.offset_nbytes - end)
            end = segment.end_nbytes
        yield Segment(end, self._region.segment.nbytes - end)
