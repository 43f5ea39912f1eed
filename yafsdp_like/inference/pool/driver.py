"""A pool of models as one engine: what a service needs of an engine, for requests that say which model they are for.

Owns which requests are under way and whose they are, and how long idle models stay on the device. Of a pool over
several ranks it is the first one's, and the others follow (``tp_pool.py``). Knows nothing of threads, text or HTTP.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from yafsdp_like.inference.pool.host_weights import ModelUnavailableError
from yafsdp_like.inference.pool.member import ModelState
from yafsdp_like.inference.pool.tp_pool import TPPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from yafsdp_like.inference.engine.adapters import Adapters
    from yafsdp_like.inference.engine.metrics import Metrics
    from yafsdp_like.inference.engine.request import Request, RequestOutput
    from yafsdp_like.inference.fleet.standing import Standing
    from yafsdp_like.inference.kv.occupancy import Stretch
    from yafsdp_like.inference.pool.member import ModelFigures
    from yafsdp_like.inference.pool.pool import ModelPool


@dataclass(frozen=True)
class WaitingLimit:
    """What a service asks of an engine's options."""

    max_waiting: int  # requests of one model that may wait, the most of any model


@dataclass(frozen=True)
class ModelStatus:
    """How one model of a pool stands."""

    state: ModelState
    error: str | None  # why it failed
    engine: Metrics
    figures: ModelFigures


@dataclass(frozen=True)
class PoolMetrics:
    """How a pool stands: sums over its models, the pages that they share, and each model."""

    num_running: int
    num_waiting: int
    num_swapped: int
    num_steps: int
    num_swapped_out: int
    num_recomputed: int
    num_tokens_computed: int
    num_tokens_cached: int
    num_tokens_drawn: int
    num_pages_evicted: int
    num_images_encoded: int
    num_images_found: int
    kv_nbytes_used: int
    kv_nbytes_cached: int
    kv_nbytes: int
    host_kv_nbytes_used: int
    host_kv_nbytes_cached: int
    host_kv_nbytes: int
    models: Mapping[str, ModelStatus]

    @classmethod
    def of(cls, models: Mapping[str, ModelStatus]) -> PoolMetrics:
        """Return the metrics of these models, at least one; what they share is what any of them says."""
        engines = [status.engine for status in models.values()]
        names = [name for name in cls.__annotations__ if name != "models"]
        shared = {name: getattr(engines[0], name) for name in names if "kv_" in name or name == "num_pages_evicted"}
        summed = {name: sum(getattr(each, name) for each in engines) for name in names if name not in shared}
        return cls(models=models, **shared, **summed)


class PoolDriver:
    """A pool's models behind the calls of one engine; ``Request.model`` says which one is asked.

    A model whose weights are not on the host is loaded for its next request, beside the steps of others. One that
    failed to load is not tried again until ``load``. Not safe for threads.
    """

    def __init__(
        self,
        pool: ModelPool,
        ttls: Mapping[str, float] | None = None,
        host_ttls: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ttls``: after how many seconds without a request a model sleeps, by name; others stay awake.

        ``host_ttls``: after how many it leaves host memory, too, and its pages are freed; its next request loads it.
        Both count from a model's last request, wake or load, and end late by as much as a service waits between two
        looks for work.
        """
        self.options = WaitingLimit(max(pool.engine(name).options.max_waiting for name in pool.plan.models))
        self._pool, self._clock = pool, clock
        self._calls = pool if pool.tp_group is None else TPPool(pool)  # that change the pool
        self._ttls, self._host_ttls = dict(ttls or {}), dict(host_ttls or {})
        self._models: dict[str, str] = {}  # of requests that have not ended, by id
        self._idle_since = dict.fromkeys(pool.plan.models, clock())
        self._num_standings = 0

    # --- as an engine ---

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to return, or an idle model is to leave the device or the host."""
        has_work = self._calls.has_work
        self._note_loads()
        return has_work or any(self._to_sleep()) or any(self._to_unload())

    @property
    def rest_s(self) -> float:
        """0.0: models step in turn, and a call of ``step`` is taken to last as long as a step (`turns.py`)."""
        return 0.0

    def add(self, request: Request) -> None:
        """Queue a request of a model, as ``ModelPool.add`` does, and raise what it raises."""
        self._calls.add(request.model, request)
        self._models[request.id] = request.model

    def cancel(self, request_id: str) -> None:
        """Cancel a request, wherever its model is; its last output comes from ``step``. Harmless once it has ended."""
        if request_id in self._models:
            self._calls.cancel(self._models[request_id], request_id)

    def step(self) -> list[RequestOutput]:
        """Let models go whose time is over, make one step of one model, and return outputs."""
        self._note_loads()
        for name in list(self._to_unload()):
            self._calls.unload(name)
        for name in list(self._to_sleep()):
            self._calls.sleep(name)
        outputs = [output for _, output in self._calls.step()]
        for output in outputs:
            if output.finish is not None:
                self._idle_since[self._models.pop(output.request_id)] = self._clock()
        return outputs

    def metrics(self) -> PoolMetrics:
        """Return how the pool and its models stand."""
        return PoolMetrics.of(self.models())

    def occupancy(self) -> list[Stretch]:
        """Return who has which of the planned bytes on the device now, in the order of addresses."""
        return self._pool.occupancy()

    def standing(self) -> Standing:
        """Return how the pool stands, for those who route requests to one of many; O(models + requests under way)."""
        self._num_standings += 1
        return replace(self._pool.turns.standing(), number=self._num_standings)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the pool's books are right; for when nothing is under way."""
        self._pool.check_integrity()

    def close(self) -> None:
        """Give up loads and wait for all that is under way; every other call raises RuntimeError from then on."""
        self._calls.close()

    def _to_sleep(self) -> Iterator[str]:
        """Yield models that are awake and have had no request for as long as they may."""
        return (name for name in self._ttls if self._pool.is_awake(name) and self._is_late(name, self._ttls))

    def _to_unload(self) -> Iterator[str]:
        """Yield models that are in host memory and have had no request for as long as they may."""
        return (name for name in self._host_ttls if self._pool.is_loaded(name) and self._is_late(name, self._host_ttls))

    def _is_late(self, name: str, ttls: Mapping[str, float]) -> bool:
        return self._clock() - self._idle_since[name] >= ttls[name] and not self._pool.engine(name).has_work

    def _note_loads(self) -> None:
        """See that models are being loaded, which is no idleness."""
        for name in self._host_ttls:
            if not self._pool.is_loaded(name):
                self._idle_since[name] = self._clock()

    # --- models ---

    def adapters_of(self, name: str) -> Adapters:
        """Return the LoRA adapters of a model, which stay its own while it sleeps, or is not loaded.

        Raises ValueError where ranks share the pool: loading is no call that they make together yet.
        """
        if self._pool.tp_group is not None:
            raise ValueError("tensor parallel ranks load LoRA adapters only when the server starts: name them there")
        return self._pool.engine(name).adapters

    def models(self) -> dict[str, ModelStatus]:
        """Return how each model stands."""
        states, figures, failures = self._pool.states(), self._pool.figures(), self._pool.failures()
        return {
            name: ModelStatus(state, failures.get(name), self._pool.engine(name).metrics(), figures[name])
            for name, state in states.items()
        }

    def state_of(self, name: str) -> tuple[ModelState, str | None]:
        """Return where the weights of a model are, and why it has failed; O(models), unlike ``models``."""
        return self._pool.states()[name], self._pool.failures().get(name)

    def load_all(self, watch: Callable[[str, ModelFigures], object] = lambda name, figures: None) -> dict[str, str]:
        """Load all models, one after the other, and return why those that are not there could not be.

        The others can be asked. One without room in host memory has not failed: its requests are refused until another
        is unloaded.
        """
        errors = {name: str(error) for name, error in self._calls.load_all(watch).items()}
        return errors | self._pool.failures()

    def load(self, name: str) -> None:
        """Begin to read a model's weights into host memory, even if that has failed before.

        How it goes is in ``models``. Raises HostFullError, with the numbers, where there is no room.
        """
        self._calls.start_loading(name)

    def unload(self, name: str) -> None:
        """Take a model from device and host, or load it no further. Raises ValueError while it has requests."""
        self._calls.unload(name)

    def sleep(self, name: str) -> None:
        """Let a model sleep; one with requests wakes again in its turn."""
        self._calls.sleep(name)

    def wake_up(self, name: str) -> None:
        """Wake a model; those in its way sleep. Raises ModelUnavailableError while it is not loaded."""
        state = self._pool.states()[name]
        if state in (ModelState.ABSENT, ModelState.LOADING, ModelState.FAILED):
            raise ModelUnavailableError(f"model {name!r} is {state.value}: it can be woken once it is loaded")
        self._idle_since[name] = self._clock()
        self._calls.wake_up(name)
