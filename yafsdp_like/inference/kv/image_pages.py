"""Features of images in pages: which page of a pool holds what a vision tower makes of which image. Integers only.

[Note: pages of images]
A page holds one image. It has a reference only while the step that reads it is being issued: all that is issued later
comes behind that on the device, so the page may go as soon as that is done. Between steps it is a victim as pages of
prefixes are, and where no page can be had an image is encoded without one. So images never keep a sequence waiting, and
no sequence keeps an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.inference.kv.slabs import PageShape

if TYPE_CHECKING:
    from yafsdp_like.inference.kv.pages import PagePool
    from yafsdp_like.inference.kv.prefix import ImageContent
    from yafsdp_like.models.vision import VisionConfig

ENCODED_ROWS_PER_S = 1e5  # at which features are taken to come back, where policies weigh it


def image_shape(config: VisionConfig, dtype: str) -> PageShape:
    """Return the shape of pages that hold the features of one image."""
    return PageShape(1, 1, config.dim, config.num_rows, dtype, num_planes=1)


def image_shapes(config: VisionConfig | None, dtype: str) -> tuple[PageShape, ...]:
    """Return the shapes of pages of a model's images; none where it takes no images."""
    return () if config is None else (image_shape(config, dtype),)


class ImagePages:
    """The images in one pool of pages; see [Note: pages of images]."""

    def __init__(self, pool: PagePool, shape: PageShape) -> None:
        pool.admit(shape)
        self._pool, self._shape = pool, shape

    def find(self, content: ImageContent) -> int | None:
        """Return the page of an image, which counts as used; None if there is none."""
        page = self._pool.find(self._shape, content)
        if page is not None:
            self._pool.add_references(self._shape, [page])
            self._pool.drop(self._shape, page)
        return page

    def put(self, content: ImageContent, tenant: str) -> int | None:
        """Return a page for an image that has none, to be written by what is issued next; None if none can be had."""
        page = self._pool.take(self._shape, tenant)
        if page is not None:
            self._pool.publish_all(self._shape, [page], [content], [self._shape.page_size / ENCODED_ROWS_PER_S])
            self._pool.drop(self._shape, page)
        return page
