"""Weights of models in host memory, each as it lies on the device, in one region of a fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.memory.layout import Segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yafsdp_like.memory.arena import Place


class ModelUnavailableError(RuntimeError):
    """A model of the pool cannot be asked: it could not be loaded, or has no room in host memory."""


class HostFullError(ModelUnavailableError):
    """Host memory for weights has no room for a model; unload another one, or give it more."""


@dataclass(eq=False)
class HostImage:
    """A model's range of host memory, whether its weights are there yet or not."""

    name: str
    place: Place
    is_cancelled: bool = False  # its load is: the bytes are free as soon as nobody writes them


class HostWeights:
    """The images of a pool's models: one range of bytes each, the first that is free when it is put there."""

    def __init__(self, region: Place) -> None:
        self._region = region
        self._images: list[HostImage] = []

    def put(self, name: str, nbytes: int) -> HostImage:
        """Return the place of a new image; raises HostFullError, with the numbers, where no range is so large."""
        gaps = list(self._gaps())
        start = next((gap.offset_nbytes for gap in gaps if gap.nbytes >= nbytes), None)
        if start is None:
            held = ", ".join(self._described()) or "none"
            free = [gap.nbytes for gap in gaps]
            raise HostFullError(
                f"model {name!r} needs {nbytes:,} bytes of host memory for its weights; of "
                f"{self._region.segment.nbytes:,} bytes {sum(free):,} are free, {max(free):,} in a row (bytes of other "
                f"models: {held}): unload one of them, or raise host_weights_nbytes"
            )
        self._images.append(HostImage(name, self._region.part(Segment(start, nbytes))))
        return self._images[-1]

    def drop(self, image: HostImage) -> None:
        """Free the bytes of an image."""
        self._images.remove(image)

    def _described(self) -> Iterator[str]:
        for image in self._images:
            words = " until its cancelled load ends" if image.is_cancelled else ""
            yield f"{image.name!r} {image.place.segment.nbytes:,}{words}"

    def _gaps(self) -> Iterator[Segment]:
        start = self._region.segment.offset_nbytes
        end = 0
        for segment in sorted((image.place.segment for image in self._images), key=lambda each: each.offset_nbytes):
            yield Segment(end, segment.offset_nbytes - start - end)
            end = segment.end_nbytes - start
        yield Segment(end, self._region.segment.nbytes - end)
