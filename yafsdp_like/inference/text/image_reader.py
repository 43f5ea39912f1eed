"""Images as bytes to images as a model sees them: decoded by pillow, made ready by the model's own image processor.

Owns what is decoded, and how large it may be. Where bytes come from is not known here. Needs `pillow` and
`transformers`, which are imported when a processor is loaded.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch

from yafsdp_like.inference.engine.image_tokens import Image, check_pixels

if TYPE_CHECKING:
    from pathlib import Path

    from yafsdp_like.models.vision import VisionConfig

FORMATS = "PNG", "JPEG"
MODES = "1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"  # of 8 bits a channel, as pillow names them
MAX_ASPECT = 100
MAX_PIXELS = 2**25  # of one image, before it is made smaller: 100 MB of them


class ImageReader:
    """Reads images for one model; safe to use from several threads."""

    def __init__(self, processor: Any, config: VisionConfig, max_pixels: int = MAX_PIXELS) -> None:
        """``processor`` is one of `transformers`, which works on arrays and gives one picture of each image.

        Raises ValueError for one that gives something else than the model takes.
        """
        from PIL import Image as Picture

        self.config, self._processor, self._max_pixels = config, processor, max_pixels
        self._prepare(Picture.new("RGB", (config.image_size, config.image_size)))

    @classmethod
    def load(cls, directory: Path, config: VisionConfig, max_pixels: int = MAX_PIXELS) -> ImageReader:
        """Load the image processor of a Hugging Face directory; no code of the directory is run.

        Raises ValueError where there is none that can be read, ImportError without `pillow` or `transformers`.
        """
        try:
            import PIL  # noqa: F401
            from transformers import AutoImageProcessor
        except ImportError as error:
            raise ImportError(
                f"images need pillow and transformers: pip install 'yafsdp_like[vision]' ({error})"
            ) from error
        try:
            processor = AutoImageProcessor.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except Exception as error:  # whatever a broken file makes of it
            words = " ".join(str(error).split())
            raise ValueError(f"{directory}: transformers cannot read its image processor: {words}") from error
        return cls(processor, config, max_pixels)

    def read(self, raw: bytes) -> Image:
        """Decode a PNG or JPEG, and make it ready. Raises ValueError for what is neither, broken, or too large."""
        from PIL import Image as Picture
        from PIL import ImageOps

        try:
            with Picture.open(io.BytesIO(raw), formats=FORMATS) as opened:  # which reads sizes, and no pixel
                self._check_size(*opened.size)
                if opened.mode not in MODES:  # whose values would be cut off at 255
                    raise ValueError(f"an image must have 8 bits a channel, found pillow's mode {opened.mode!r}")
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except ValueError:
            raise
        except Exception as error:  # decoders raise whatever a file makes of them
            raise ValueError(f"expected a PNG or JPEG, found none that can be read: {type(error).__name__}") from error
        return self._prepare(picture)

    def _check_size(self, width: int, height: int) -> None:
        """Preprocessing scales the shorter side, so that a long and narrow image could become a huge one."""
        if width * height > self._max_pixels or max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(
                f"an image may have {self._max_pixels} pixels at most, and one side {MAX_ASPECT} times as long as the "
                f"other; found {width} x {height}"
            )

    def _prepare(self, picture: Any) -> Image:
        try:
            pixels = self._processor(picture, return_tensors="np")["pixel_values"]
            image = Image.of(torch.from_numpy(pixels[0].copy()))
        except Exception as error:  # of an image with sides that cannot be scaled, say
            words = " ".join(str(error).split())
            raise ValueError(f"the model's image processor cannot take it: {words}") from error
        check_pixels(image, self.config)
        return image
