"""One model of a pool: its parts, and which state it is in.

[Note: states of a model]

    absent --> loading --> asleep <--> waking --> awake
               |  |  ^        ^                     |
               |  v  |        +---------------------+
               | failed
               v
             absent

``load``, a wake or a request has an absent model loaded. It ends asleep, or failed with the reason, which it stays
until it is loaded by name again. Unloading makes it absent from any state. A load goes on where the requests that alone
wanted it have left, until another model needs its room in host memory, or for so long (``UNWANTED_LOAD_S``) that
something must be wrong. A model that finds all its bytes on the device is awake at once, and one that
is waking may be put to sleep.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from yafsdp_like.inference.engine.engine import Engine
    from yafsdp_like.inference.pool.host_weights import HostImage
    from yafsdp_like.inference.pool.loading import Loading
    from yafsdp_like.inference.pool.plan import ModelPlan
    from yafsdp_like.inference.pool.residence import Residence
    from yafsdp_like.inference.pool.weights import PooledWeights
    from yafsdp_like.inference.weights.loading import Model


class ModelState(Enum):
    """Where the weights of a model are; see [Note: states of a model]."""

    ABSENT = "absent"  # neither on the device nor in host memory
    LOADING = "loading"  # on their way to host memory
    FAILED = "failed"  # could not be read
    ASLEEP = "asleep"  # in host memory
    WAKING = "waking"  # on their way to the device
    AWAKE = "awake"


@dataclass(frozen=True)
class Switch:
    """A model that woke: what was copied for it, beside what was still or already there."""

    model: str
    nbytes: int
    num_slept: int  # models that went to sleep for it


@dataclass(frozen=True)
class ModelFigures:
    """How much of a model is in host memory, and what its switches took since the start."""

    weights_nbytes: int
    loaded_nbytes: int  # of these, in host memory
    num_wakes: int
    nbytes_copied: int  # from the host, prefetched ones included
    wake_s: float  # from its turn to all weights being there, seen between steps: what requests waited for, or more


@dataclass(eq=False)
class Member:
    """A model of the pool."""

    plan: ModelPlan
    model: Model
    weights: PooledWeights
    residence: Residence
    engine: Engine
    image: HostImage | None = None  # in host memory, whole
    loading: Loading | None = None
    failure: BaseException | None = None  # of the last load
    is_awake: bool = False
    last_step: int = 0  # of the pool, that was this model's
    waits_since: int = 0  # the pool's steps when it began to wait for its turn
    num_wakes: int = 0
    wake_s: float = 0.0  # of wakes that are over
    woken_at: float | None = None  # in seconds of time.monotonic(), while weights arrive

    @property
    def name(self) -> str:
        """Its name in the pool."""
        return self.plan.name

    @property
    def state(self) -> ModelState:
        """Where its weights are."""
        if self.is_awake:
            return ModelState.WAKING if self.weights.is_arriving() else ModelState.AWAKE
        if self.image is not None:
            return ModelState.ASLEEP
        if self.loading is not None:
            return ModelState.LOADING
        return ModelState.ABSENT if self.failure is None else ModelState.FAILED

    @property
    def is_unwanted(self) -> bool:
        """Whether it is being loaded for requests alone, which have all left."""
        return self.loading is not None and self.loading.on_demand and not self.engine.has_work

    @property
    def failure_words(self) -> str | None:
        """Why it could not be loaded, for who asked for it."""
        error = self.failure
        return None if error is None else f"model {self.name!r} could not be loaded: {type(error).__name__}: {error}"

    @property
    def figures(self) -> ModelFigures:
        """How much of it is loaded, and what its switches took."""
        whole = self.plan.image_nbytes
        loaded = 0 if self.loading is None else min(self.loading.nbytes_read, whole)
        loaded = loaded if self.image is None else whole
        return ModelFigures(whole, loaded, self.num_wakes, self.residence.nbytes_copied, self.wake_s)

    def note_arrival(self) -> None:
        """See whether all weights are there, or no longer wanted, and for how long that took."""
        if self.woken_at is not None and not (self.is_awake and self.weights.is_arriving()):
            self.wake_s += time.monotonic() - self.woken_at
            self.woken_at = None
