"""What one device has been asked: the requests of each model, when their next tokens are due, what they need.

Owns the books of a scheduler and no decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yafsdp_like.inference.fleet.times import LearnedTimes, StepLines

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from yafsdp_like.inference.fleet.reader import Reader, Targets

_WEIGHT = 0.2  # of the last switch in what one is expected to take
UNKNOWN_TOKENS = 256  # that a request is expected to draw before any has ended, if it may


@dataclass(frozen=True)
class ModelSpec:
    """One model as a scheduler knows it."""

    targets: Targets
    lines: StepLines
    switch_s: float = 0.0  # that waking it takes, not hidden behind steps of others; corrected by real switches
    max_batch: int = 64  # requests of one step
    kv_nbytes: float = 0.0  # of one token's keys and values
    home: range = range(0)  # bytes of the device that its weights fill when it is awake

    def __post_init__(self) -> None:
        if self.switch_s < 0 or self.max_batch < 1:
            raise ValueError(f"expected switch_s of at least 0 and a batch of at least 1, found {self}")


@dataclass(frozen=True)
class Job:
    """A request as a scheduler knows it."""

    id: str
    model: str
    num_prompt_tokens: int
    max_tokens: int
    tenant: str = ""


class OpenRequest:
    """A request that was admitted, and its reader."""

    def __init__(self, job: Job, reader: Reader) -> None:
        self.job, self.reader = job, reader

    @property
    def num_keys(self) -> int:
        """Tokens of context that its next step reads."""
        return self.job.num_prompt_tokens + self.reader.num_tokens


class ModelQueue:
    """The requests of one model: those that wait for their first token, and those that decode."""

    def __init__(self, name: str, spec: ModelSpec) -> None:
        self.name, self.spec, self.targets = name, spec, spec.targets
        self.times = LearnedTimes(spec.lines)
        self.switch_s = spec.switch_s
        self.waiting: dict[str, OpenRequest] = {}  # in order of arrival
        self.running: dict[str, OpenRequest] = {}
        self.waits_since = math.inf  # when it began to wait for a turn; inf: it has no work, or its turn

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self.waiting or self.running)

    @property
    def can_join(self) -> bool:
        """Whether a request waits that a step has room for."""
        return bool(self.waiting) and len(self.running) < self.spec.max_batch

    def requests(self) -> Iterator[OpenRequest]:
        """Yield all requests, those that decode first."""
        yield from self.running.values()
        yield from self.waiting.values()

    def find(self, request_id: str) -> OpenRequest:
        """Return one request, wherever it is."""
        return self.running.get(request_id) or self.waiting[request_id]

    def start(self, request_id: str) -> None:
        """Let a waiting request decode."""
        self.running[request_id] = self.waiting.pop(request_id)

    def end(self, request_id: str) -> OpenRequest:
        """Forget a request."""
        found = self.running.pop(request_id, None)
        return self.waiting.pop(request_id) if found is None else found

    # --- what is due, and what it takes ---

    @property
    def due(self) -> float:
        """When the first token of any request is due; inf without requests."""
        return min((request.reader.due for request in self.requests()), default=math.inf)

    @property
    def step_s(self) -> float:
        """Seconds of a step that decodes all requests that fit, waiting ones too."""
        num_rows = min(len(self.running) + len(self.waiting), self.spec.max_batch)
        if not num_rows:
            return 0.0
        num_keys = sum(request.num_keys for request in self.running.values())
        return self.times.decode_s(num_rows, num_keys)

    def mixed_step_s(self, num_prompt_tokens: int) -> float:
        """Return the seconds of a step that computes so many tokens of prompts, or only decodes."""
        return self.times.prefill_s(num_prompt_tokens) if num_prompt_tokens else self.step_s

    @property
    def load(self) -> float:
        """The share of a device that decoding at the pace of the readers takes."""
        return self.step_s / self.targets.tpot_s

    def prefill_s(self, requests: Iterable[OpenRequest]) -> float:
        """Return the seconds of computing these requests' prompts together."""
        return self.times.prefill_s(sum(request.job.num_prompt_tokens for request in requests))

    def num_left(self, request: OpenRequest) -> int:
        """Return the tokens that a request is expected to draw yet, at least one."""
        expected = self.times.num_drawn or UNKNOWN_TOKENS
        return max(1, round(min(expected, request.job.max_tokens)) - request.reader.num_tokens)

    @property
    def kv_nbytes(self) -> float:
        """The bytes of keys and values that all its requests are expected to have at their ends."""
        num_tokens = sum(request.num_keys + self.num_left(request) for request in self.requests())
        return num_tokens * self.spec.kv_nbytes

    def kv_nbytes_of(self, job: Job) -> float:
        """Return the bytes that a request is expected to have at its end."""
        expected = min(self.times.num_drawn or UNKNOWN_TOKENS, job.max_tokens)
        return (job.num_prompt_tokens + expected) * self.spec.kv_nbytes

    def note_switch(self, seconds: float) -> None:
        """Correct what waking it is expected to take."""
        self.switch_s += _WEIGHT * (seconds - self.switch_s)
