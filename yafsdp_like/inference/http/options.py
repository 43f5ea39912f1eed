"""Options of the HTTP interface. Imports nothing that takes time, so that a command line is checked at once."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HttpOptions:
    """Who may ask, for how long, and for how much at once.

    Raises ValueError for values out of range.
    """

    api_key: str | None = None  # bearer token that clients must send under /v1; null: none
    timeout_s: float | None = None  # from a request's arrival to its last token; null or 0: not limited
    max_choices: int = 128  # choices of one request: prompts times n
    max_body_nbytes: int = 16 * 2**20  # of a request; max_seq_len may lower it, of models that see no images
    strict: bool = False  # refuse fields that are not known, instead of ignoring them with a warning header
    max_images: int = 16  # of a request to a model that sees images
    max_image_nbytes: int = 8 * 2**20  # of one image, as PNG or JPEG; the body has it in base64, a third more
    max_image_pixels: int = 2**25  # of one image, before the model's preprocessing
    image_hosts: tuple[str, ...] = ()  # from which images are fetched by http(s) URLs; may be repeated; none: no host
    priorities: bool = False  # requests may say how urgent they are, and preempt others (field priority, lower first)

    def __post_init__(self) -> None:
        check_seconds("timeout_s", self.timeout_s or 0)
        for name in ("max_choices", "max_body_nbytes", "max_images", "max_image_nbytes", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


def check_seconds(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a duration: finite and not negative."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of seconds, not negative, found {value}")
