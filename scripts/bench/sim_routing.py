"""To which simulated devices a request is offered, in which order: by our rule, and by simple ones beside it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from yafsdp_like.inference.fleet.routing import ranked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.sim_device import Device
    from yafsdp_like.inference.fleet.queues import Job

TRIES = 3  # devices that a request is offered to before its client is told to come again


def ours(devices: Sequence[Device], job: Job) -> list[int]:
    """Return the order that servers of a fleet use."""
    return ranked([device.view(job.model) for device in devices])[:TRIES]


def two_choices(devices: Sequence[Device], job: Job) -> list[int]:
    """Return two devices at random, the one with fewer requests first, as Ray Serve does by default."""
    found = random.Random(job.id).sample(range(len(devices)), min(2, len(devices)))
    return sorted(found, key=lambda index: devices[index].view(job.model).num_requests)


def home(devices: Sequence[Device], job: Job) -> list[int]:
    """Return the one device that a model has, whatever becomes of the load."""
    return [sorted(devices[0].scheduler.queues).index(job.model) % len(devices)]


ROUTERS: dict[str, Callable[[Sequence[Device], Job], list[int]]] = {
    "ours": ours,
    "two choices": two_choices,
    "home": home,
}
