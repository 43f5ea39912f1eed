"""Images of a step: their features out of pages, or of the vision tower, projected to rows of the residual stream.

Owns what is issued for images. They are encoded and projected one at a time, by PyTorch's allocator, within the bytes
that the plan leaves for one (``VisionConfig.activation_nbytes``). A step without images issues nothing here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from yafsdp_like.inference.kv.image_pages import ImagePages, image_shape
from yafsdp_like.inference.kv.kv_cache import Tier
from yafsdp_like.inference.kv.prefix import ImageContent
from yafsdp_like.models import vision

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from yafsdp_like.inference.engine.batch import Run
    from yafsdp_like.inference.engine.image_tokens import Image, PlacedImage
    from yafsdp_like.inference.engine.places import EnginePlaces
    from yafsdp_like.inference.weights.store import Weights
    from yafsdp_like.models.vision import VisionConfig


class ImageRun(NamedTuple):
    """The rows of one image that a run computes."""

    placed: PlacedImage
    tenant: str
    salt: str | None
    first: int  # of the image's rows
    rows: slice  # of the step


class ImageRows:
    """The images of one engine's steps."""

    def __init__(self, weights: Weights, places: EnginePlaces, config: VisionConfig) -> None:
        self._weights, self._config = weights, config
        self._shape = image_shape(config, weights.plan.site.dtype_name)
        self._pages = ImagePages(places.pools[Tier.DEVICE], self._shape)
        self._region = places.regions[Tier.DEVICE]
        self.num_encoded = self.num_found = 0

    @classmethod
    def of(cls, weights: Weights, places: EnginePlaces) -> ImageRows | None:
        """Return None for a model that takes no images."""
        return None if weights.config.vision is None else cls(weights, places, weights.config.vision)

    def find(self, runs: Sequence[Run]) -> list[ImageRun]:
        """Return which rows of a step are whose, in order; ``runs`` are those of the step."""
        found, row = [], 0
        for run in runs:
            request = run.sequence.request
            for placed in request.images:
                first, last = max(placed.start, run.start), min(placed.end, run.end)
                if first < last:
                    rows = slice(row + first - run.start, row + last - run.start)
                    found.append(ImageRun(placed, request.tenant, request.salt, first - placed.start, rows))
            row += run.num_tokens
        return found

    def compute(self, runs: Sequence[ImageRun]) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the step and what they are, (rows, D), one image at a time: issued when it is asked for."""
        for placed, tenant, salt, first, rows in runs:
            tower, projector = self._weights.vision()
            content = ImageContent(self._weights.tower_digest, placed.image.digest, salt)
            features = self._features(content, placed.image, tenant, tower)
            whole = vision.project(self._config, projector, features)  # the same bits, however a prompt is cut
            yield rows, whole[first : first + rows.stop - rows.start]

    def warm_up(self) -> None:
        """Issue what an image takes once, for libraries to load their kernels."""
        tower, projector = self._weights.vision()
        pixels = torch.zeros(3, self._config.image_size, self._config.image_size)
        vision.project(self._config, projector, vision.encode(self._config, tower, pixels))

    def _features(self, content: ImageContent, image: Image, tenant: str, tower: vision.Weights) -> Tensor:
        page = self._pages.find(content)
        if page is not None:
            self.num_found += 1
            return self._page(page)
        features = vision.encode(self._config, tower, image.pixels)
        self.num_encoded += 1
        page = self._pages.put(content, tenant)
        if page is not None:
            self._page(page).copy_(features)
        return features

    def _page(self, page: int) -> Tensor:
        """Return the features (R, E) in a page."""
        shape = self._shape
        values = self._region[page * shape.nbytes :][: shape.page_size * shape.head_dim * shape.itemsize]
        return values.view(self._weights.dtype).view(shape.page_size, shape.head_dim)
