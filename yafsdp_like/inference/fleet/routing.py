"""To which device of many a request goes: one where its model is awake, else where it is awake soonest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class DeviceView:
    """What a router knows of one device."""

    load: float  # the sum of its models' loads: 1 is all of its time
    has_model: bool  # requests of the model are under way there
    is_awake: bool  # the model's weights are there, or on their way
    num_requests: int


def route(devices: Sequence[DeviceView], max_load: float = 1.0) -> int:
    """Return the index of the device for a request of the model that the views are of.

    Where requests of the model are under way already another one costs least, as long as there is time left; then where
    its weights are, then where most time is left; ties go to fewer requests, then to the first.
    """
    if not devices:
        raise ValueError("expected at least one device, found none")

    def key(index: int) -> tuple[bool, bool, bool, float, int, int]:
        view = devices[index]
        has_time = view.load < max_load
        return not has_time, not view.has_model, not view.is_awake, view.load, view.num_requests, index

    return min(range(len(devices)), key=key)
