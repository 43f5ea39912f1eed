"""Images in prompts, as an engine is given them: pixels, where they stand, and the tokens that hold their places.

Plain values; images are decoded by ``text/image_reader.py``, and become rows of a step in ``image_rows.py``.

[Note: tokens of an image]
In a prompt a token stands for each row of an image: the model's image token, whose embedding is replaced. It is an
``ImageToken``, which has that number everywhere a number is asked for, and is equal only to a token of the same image.
So prefixes are cached under what is in their images, and everything else takes prompts as it always did.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from yafsdp_like.models.vision import VisionConfig


class ImageToken(int):
    """A token that stands for a row of an image; see [Note: tokens of an image]."""

    digest: bytes  # of the image

    def __new__(cls, number: int, digest: bytes) -> ImageToken:
        """Make the token ``number`` of an image."""
        token = super().__new__(cls, number)
        token.digest = digest
        return token

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageToken) and self.digest == other.digest and int(self) == int(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((int(self), self.digest))

    def __reduce__(self) -> tuple[type[ImageToken], tuple[int, bytes]]:
        return ImageToken, (int(self), self.digest)


@dataclass(frozen=True, eq=False)
class Image:
    """An image after preprocessing: pixels (C, S, S) float32 in host memory, known by a digest of these."""

    pixels: Tensor
    digest: bytes

    @classmethod
    def of(cls, pixels: Tensor) -> Image:
        """Make an image of its pixels (C, S, S), whatever their dtype."""
        pixels = pixels.detach().cpu().float().contiguous()
        digest = hashlib.blake2b(str(tuple(pixels.shape)).encode(), digest_size=32)
        digest.update(pixels.numpy().data)
        return cls(pixels, digest.digest())


@dataclass(frozen=True)
class PlacedImage:
    """An image, and the places in a prompt that stand for its rows."""

    image: Image
    start: int
    num_rows: int

    @property
    def end(self) -> int:
        """The place behind the last row."""
        return self.start + self.num_rows


def place_images(
    prompt: Sequence[int], images: Sequence[Image], config: VisionConfig
) -> tuple[tuple[int, ...], tuple[PlacedImage, ...]]:
    """Return a prompt with a token for each row of its images, and where these are: what a ``Request`` is given.

    In ``prompt`` one image token stands for each of ``images``, in order. Raises ValueError where these are not as
    many, and for pixels of another shape than the model's.
    """
    places = [place for place, token in enumerate(prompt) if token == config.image_token]
    if len(places) != len(images):
        raise ValueError(f"expected a place in the prompt for each of {len(images)} images, found {len(places)}")
    found: list[int] = []
    placed, after = [], 0
    for place, image in zip(places, images, strict=True):
        check_pixels(image, config)
        found += prompt[after:place]
        placed.append(PlacedImage(image, len(found), config.num_rows))
        found += [ImageToken(config.image_token, image.digest)] * config.num_rows
        after = place + 1
    return (*found, *prompt[after:]), tuple(placed)


def check_images(name: str, prompt: Sequence[int], images: Sequence[PlacedImage], config: VisionConfig | None) -> None:
    """Raise ValueError, with a request's ``name``, for images that it cannot have, or that are not where they belong.

    ``config`` is None where no images are taken.
    """
    if config is None:
        raise ValueError(f"{name}: the model takes no images, nor do tensor parallel ranks; found {len(images)}")
    end = 0
    for placed in images:
        check_pixels(placed.image, config)
        expected = ImageToken(config.image_token, placed.image.digest)
        is_whole = placed.num_rows == config.num_rows and end <= placed.start and placed.end <= len(prompt)
        if not is_whole or any(token != expected for token in prompt[placed.start : placed.end]):
            raise ValueError(
                f"{name}: expected {config.num_rows} tokens of the image from place {placed.start} on; make prompts by "
                "place_images()"
            )
        end = placed.end


def check_pixels(image: Image, config: VisionConfig) -> None:
    """Raise ValueError for pixels of another shape than a model's."""
    expected = (3, config.image_size, config.image_size)
    if tuple(image.pixels.shape) != expected:
        raise ValueError(f"expected pixels {expected} of an image, found {tuple(image.pixels.shape)}")
