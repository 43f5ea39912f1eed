"""Weights of models in host memory, each as it lies on the device, in one region of a fixed size.

[Note: no fragments]
An image lies in a row where a gap is large enough, the smallest such one, and else in pieces of the largest gaps. All
sizes are multiples of ``ALIGNMENT_NBYTES``, the region's too, so that no byte of a gap is lost: a model can be loaded
exactly if as many bytes are free as its weights have, whatever was loaded and unloaded before. A wake then makes a copy
more for each border of pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import ALIGNMENT_NBYTES, Segment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from yafsdp_like.memory.arena import Place


class ModelUnavailableError(RuntimeError):
    """A model of the pool cannot be asked: it could not be loaded, or has no room in host memory."""


class HostFullError(ModelUnavailableError):
    """Host memory for weights has no room for a model; unload another one, or give it more."""


@dataclass(eq=False)
class HostImage:
    """A model's pieces of host memory, in order, whether its weights are there yet or not."""

    name: str
    places: list[Place]
    is_cancelled: bool = False  # its load is: the bytes are free as soon as nobody writes them

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(place.segment.nbytes for place in self.places)


class HostWeights:
    """The images of a pool's models; see [Note: no fragments]."""

    def __init__(self, region: Place) -> None:
        self._region = region
        self._images: list[HostImage] = []

    def put(self, name: str, nbytes: int) -> HostImage:
        """Return the places of a new image; raises HostFullError, with the numbers, where fewer bytes are free."""
        assert nbytes % ALIGNMENT_NBYTES == 0 < nbytes, f"{nbytes} bytes of {name!r} leave pieces that nobody can use"
        gaps = list(self._gaps())
        free = sum(gap.nbytes for gap in gaps)
        if free < nbytes:
            held = ", ".join(self._described()) or "none"
            raise HostFullError(
                f"model {name!r} needs {nbytes:,} bytes of host memory for its weights; of "
                f"{self._region.segment.nbytes:,} bytes {free:,} are free (bytes of other models: {held}): unload one "
                f"of them, or raise host_weights_nbytes by {nbytes - free:,}"
            )
        places = [self._region.part(segment) for segment in _chosen(gaps, nbytes)]
        self._images.append(HostImage(name, places))
        return self._images[-1]

    def drop(self, image: HostImage) -> None:
        """Free the bytes of an image."""
        self._images.remove(image)

    def _described(self) -> Iterator[str]:
        for image in self._images:
            words = " until its cancelled load ends" if image.is_cancelled else ""
            yield f"{image.name!r} {image.nbytes:,}{words}"

    def _gaps(self) -> Iterator[Segment]:
        first, end = self._region.segment.offset_nbytes, 0
        taken = [place.segment for image in self._images for place in image.places]
        for segment in sorted(taken, key=lambda segment: segment.offset_nbytes):
            yield Segment(end, segment.offset_nbytes - first - end)
            end = segment.end_nbytes - first
        yield Segment(end, self._region.segment.nbytes - end)


def _chosen(gaps: Sequence[Segment], nbytes: int) -> Iterator[Segment]:
    """Yield parts of gaps for ``nbytes`` bytes: of the smallest that has room for all, or else of the largest."""
    whole = [gap for gap in gaps if gap.nbytes >= nbytes]
    for gap in sorted(whole or gaps, key=lambda gap: gap.nbytes, reverse=not whole):
        if nbytes:
            part = Segment(gap.offset_nbytes, min(gap.nbytes, nbytes))
            nbytes -= part.nbytes
            yield part
