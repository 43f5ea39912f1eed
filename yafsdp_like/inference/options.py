"""Options of an engine: what it may take, and how it serves.

Imports no torch, so that a command line can be checked before torch is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal, get_args

from yafsdp_like.inference.kv.eviction import Costs, Tenant

AnyMode = Literal["auto", "resident", "gathered", "streamed", "tensor_parallel"]
PolicyName = Literal["lru", "gdsf"]

PROMPT_LOOKUP, DRAFT_MODEL = "prompt-lookup", "draft"  # how tokens are drafted
MAX_DRAFTED_ROWS = 128  # of a step with drafts: beyond about so many, GPUs are bound by arithmetic, and no row is free


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted, of which one step verifies several. Raises ValueError for numbers out of range."""

    num_tokens: int = 7  # of one sequence in one step, at most
    draft: str | None = None  # the model that drafts, as `open_model` takes it; None: the sequence's own tokens

    def __post_init__(self) -> None:
        if not 1 <= self.num_tokens <= 16:
            raise ValueError(f"speculate must draft 1 to 16 tokens, found {self.num_tokens}")

    @classmethod
    def parse(cls, text: str) -> Speculation:
        """Read ``prompt-lookup[:k]``, or ``draft:MODEL[:k]``, of k tokens. Raises ValueError for anything else."""
        how, *rest = text.split(":")
        count = int(rest.pop()) if rest and rest[-1].isdecimal() else None
        draft = ":".join(rest)
        if how not in (PROMPT_LOOKUP, DRAFT_MODEL) or bool(draft) != (how == DRAFT_MODEL):
            raise ValueError(
                f"speculate must be {PROMPT_LOOKUP}, or {DRAFT_MODEL}:MODEL, and then :k for k tokens or nothing, "
                f"found {text!r}"
            )
        if draft:
            return cls(3 if count is None else count, draft)
        return cls() if count is None else cls(count)


@dataclass(frozen=True)
class EngineOptions:
    """Memory, batches, scheduling and prefix caching of one engine.

    A plan needs ``memory_limit_nbytes``, ``kv_nbytes``, or both. Raises ValueError for values out of range.
    """

    memory_limit_nbytes: int | None = None  # everything planned on one device; null: a GPU's free memory less 1GiB
    kv_nbytes: int | None = None  # KV cache; null: what the memory limit leaves
    host_kv_nbytes: int = 0  # KV cache in host memory, for sequences that are swapped out
    max_batch_size: int = 32  # sequences of one step
    max_batch_tokens: int = 2048  # tokens of one step, at most
    tpot_ms: float | None = None  # target of the time between a request's tokens; null: chunks of 512 beside decoding
    max_seq_len: int | None = None  # tokens of one sequence; null: what fits, up to the model's
    page_size: int = 16  # tokens of one page of the KV cache
    kv_dtype: str | None = None  # of the KV cache: float32, bfloat16 or float8_e4m3fn; null: the weights'
    max_waiting: int = 1024  # requests in the waiting queue, preempted ones among them
    prefix_cache: bool = True  # share pages of equal prefixes between requests
    graphs: bool = True  # CUDA graphs of steps, but for those of more than 2,048 tokens
    lookahead: bool = True  # launch a step before the tokens of the step before it are read
    debug: bool = False  # poison freed pages, and check memory and books in every step; or set YAFSDP_DEBUG=1
    policy: PolicyName = "lru"  # eviction order of cached pages: lru, or gdsf (greedy dual size frequency)
    tenants: tuple[Tenant, ...] = ()  # tenants with a reserved number of pages or a priority
    costs: Costs | None = None  # rates of copying and of recomputing pages; null: measured when the engine starts
    adapter_slots: int | None = None  # LoRA adapters on the device at once; null: as many as are given, up to 8
    adapter_rank: int | None = None  # the largest rank of an adapter; null: of those that are given, or else 16
    host_adapters: int | None = None  # LoRA adapters in host memory at once; null: those given, or as many as slots
    speculate: str | None = None  # prompt-lookup[:k] or draft:MODEL[:k]: draft up to k tokens where that pays

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 0 if name == "host_kv_nbytes" else 1
            if type(value) is int and value < low and name != "tpot_ms":
                raise ValueError(f"{name} must be at least {low}, found {value}")
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens must be at least max_batch_size, a token of each sequence, "
                f"found {self.max_batch_tokens} and {self.max_batch_size}"
            )
        if self.tpot_ms is not None and not 0 < self.tpot_ms <= 1e9:
            raise ValueError(f"tpot_ms must be above 0 and at most 1e9, found {self.tpot_ms}")
        if self.policy not in get_args(PolicyName):
            raise ValueError(f"policy must be one of {', '.join(get_args(PolicyName))}, found {self.policy!r}")
        if self.speculate is not None:
            Speculation.parse(self.speculate)

    @property
    def speculation(self) -> Speculation | None:
        """How tokens are drafted; None: not at all."""
        return None if self.speculate is None else Speculation.parse(self.speculate)

    @property
    def max_decode_rows(self) -> int:
        """Rows of a step that only decodes, at most: one for each sequence, and one for each token that is drafted."""
        most, speculation = self.max_batch_size, self.speculation
        if speculation is None or most >= MAX_DRAFTED_ROWS:
            return most
        return min(most * (1 + speculation.num_tokens), MAX_DRAFTED_ROWS, self.max_batch_tokens)

    def with_budget(self, max_batch_tokens: int, tpot_ms: float | None) -> EngineOptions:
        """Return these options with other steps, of no more tokens than an engine of these has room for.

        Raises ValueError for more of them, less than one for each sequence, and for a target where these have none.
        """
        if not self.max_batch_size <= max_batch_tokens <= self.max_batch_tokens:
            raise ValueError(
                f"expected max_batch_tokens from max_batch_size, {self.max_batch_size}, to {self.max_batch_tokens}, "
                f"which the engine was made for, found {max_batch_tokens}"
            )
        if tpot_ms is not None and self.tpot_ms is None:
            raise ValueError(f"tpot_ms {tpot_ms} needs an engine that was made with a tpot_ms, which measures steps")
        return replace(self, max_batch_tokens=max_batch_tokens, tpot_ms=tpot_ms)

    @property
    def is_debugged(self) -> bool:
        """Whether it is served in debug mode: as asked for, or as the environment says."""
        return self.debug or os.environ.get("YAFSDP_DEBUG", "").lower() not in ("", "0", "false")


@dataclass(frozen=True)
class PoolOptions:
    """Memory that the models of a pool share, and their turns.

    Raises ValueError for values out of range.
    """

    memory_limit_nbytes: int  # everything planned on one device
    kv_nbytes: int | None = None  # pages that no weights displace; null: as many as any model's longest sequence needs
    host_weights_nbytes: int | None = None  # weights in host memory, whether awake or asleep; null: those of all models
    host_kv_nbytes: int = 0  # KV cache in host memory, for sequences that are swapped out
    max_turn_steps: int = 256  # of models that are awake, while another waits for their memory; no targets are given
    admission_load: float | None = 1.0  # with targets: share of the device beyond which requests are refused
    policy: PolicyName = "lru"  # eviction order of cached pages: lru, or gdsf (greedy dual size frequency)
    tenants: tuple[Tenant, ...] = ()  # tenants, or models by name, with a reserved number of pages or a priority

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 0 if name == "host_kv_nbytes" else 1
            if type(value) is int and value < low:
                raise ValueError(f"{name} must be at least {low}, found {value}")
        if self.admission_load is not None and not 0 < self.admission_load <= 1e9:
            raise ValueError(f"admission_load must be above 0, found {self.admission_load}")
        if self.policy not in get_args(PolicyName):
            raise ValueError(f"policy must be one of {', '.join(get_args(PolicyName))}, found {self.policy!r}")
