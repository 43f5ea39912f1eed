"""Options of an engine: what it may take, and how it serves.

Imports no torch, so that a command line can be checked before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from yafsdp_like.inference.kv.eviction import Costs, Tenant

AnyMode = Literal["auto", "resident", "gathered", "streamed", "tensor_parallel"]
PolicyName = Literal["lru", "gdsf"]


@dataclass(frozen=True)
class ServingLimits:
    """Memory that an engine may take, and what must fit into it.

    A plan needs ``memory_limit_nbytes``, ``kv_nbytes``, or both. Raises ValueError for numbers out of range.
    """

    memory_limit_nbytes: int | None = None  # everything planned on one device; null: no limit
    kv_nbytes: int | None = None  # KV cache; null: what the memory limit leaves
    host_kv_nbytes: int = 0  # KV cache in host memory, for sequences that are swapped out
    max_batch_size: int = 32  # sequences of one step
    max_batch_tokens: int = 2048  # tokens of one step
    max_seq_len: int | None = None  # tokens of one sequence; null: what fits, up to the model's
    page_size: int = 16  # tokens of one page of the KV cache
    kv_dtype: str | None = None  # of the KV cache: float32, bfloat16 or float8_e4m3fn; null: the weights'

    def __post_init__(self) -> None:
        for name in ("memory_limit_nbytes", "kv_nbytes", "max_batch_size", "max_batch_tokens", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if self.host_kv_nbytes < 0 or self.page_size < 1:
            raise ValueError(f"found host_kv_nbytes {self.host_kv_nbytes} and page_size {self.page_size}")
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens must be at least max_batch_size, a token of each sequence, "
                f"found {self.max_batch_tokens} and {self.max_batch_size}"
            )


@dataclass(frozen=True)
class EngineOptions(ServingLimits):
    """Memory, batches, scheduling and prefix caching of one engine.

    Raises ValueError for values out of range.
    """

    max_waiting: int = 1024  # requests in the waiting queue, preempted ones among them
    prefix_cache: bool = True  # share pages of equal prefixes between requests
    graphs: bool = True  # CUDA graphs for steps in which every sequence decodes
    lookahead: bool = True  # launch a step before the tokens of the step before it are read
    policy: PolicyName = "lru"  # eviction order of cached pages: lru, or gdsf (greedy dual size frequency)
    tenants: tuple[Tenant, ...] = ()  # tenants with a reserved number of pages or a priority
    costs: Costs | None = None  # rates of copying and of recomputing pages; null: measured when the engine starts

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy not in get_args(PolicyName):
            raise ValueError(f"policy must be one of {', '.join(get_args(PolicyName))}, found {self.policy!r}")
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting must be at least 1, found {self.max_waiting}")
