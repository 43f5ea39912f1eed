"""Which settings of a server fit a GPU, and what each costs in tokens of context or in time; what to change otherwise.

Owns the search over where weights lie, the dtype of the KV cache and the sequences of a step. A plan of given settings
comes from the caller: it takes milliseconds, and is the one that the engine allocates. Tensor parallel ranks are left
out, since what their sums take is not predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations
from typing import Any

from yafsdp_like.hardware import Rates
from yafsdp_like.inference.kv.slabs import ITEMSIZES
from yafsdp_like.inference.options import AnyMode
from yafsdp_like.inference.plan.serving_plan import ServingPlan
from yafsdp_like.memory.plan import readable
from yafsdp_like.shard.forecast.fit import largest

NARROW = "float8_e4m3fn"
MAX_BATCH_SIZE = 1024  # sequences of a step
MAX_RANKS = 8  # GPUs of one host
TOKENS_STEP = 128  # lengths of sequences that are tried where the one asked for does not fit
MIN_BATCH_TOKENS = 64  # of a step, below which prompts take too many steps
NUM_SHOWN = 3
FLAGS = {
    "mode": "--mode={}",
    "kv_dtype": "--kv-dtype={}",
    "max_batch_size": "--max-batch-size={}",
    "max_batch_tokens": "--max-batch-tokens={}",
    "max_seq_len": "--max-seq-len={}",
    "graphs": "--no-graphs",
    "num_ranks": "--world-size={}",
}


@dataclass(frozen=True)
class ServeSettings:
    """What of a server may be changed so that it fits."""

    mode: AnyMode
    kv_dtype: str
    max_batch_size: int
    max_batch_tokens: int
    max_seq_len: int | None  # None: what fits, up to the model's
    graphs: bool = True
    num_ranks: int = 1


@dataclass(frozen=True)
class ServeFitting:
    """Settings that fit: how many sequences of ``max_seq_len`` tokens at once, and a decoding step of them all."""

    settings: ServeSettings
    changes: dict[str, Any]  # by the names of ServeSettings
    mode: AnyMode
    num_sequences: int
    seq_len: int
    num_context_tokens: int
    seconds: float  # of the step, at least

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON holds them."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("settings", "changes")}
        return {"changes": [in_words(*change) for change in self.changes.items()]} | found

    def __str__(self) -> str:
        changes = " ".join(in_words(*change) for change in self.changes.items()) or "as it is"
        rate = self.num_sequences / self.seconds
        return (
            f"{self.num_sequences:>6,} of {self.seq_len:,} tokens at once, {self.num_context_tokens:>9,} in all  "
            f"{self.seconds * 1e3:8.1f} ms a step, {rate:>9,.1f} tokens/s  {changes}"
        )


@dataclass(frozen=True)
class ServeFitReport:
    """What fits, the fastest step first; or, where nothing does, the smallest changes that would."""

    fits: bool
    found: Sequence[ServeFitting]
    text: str

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON holds them."""
        return {"fits": self.fits, "settings": [one.as_dict() for one in self.found]}


def in_words(name: str, value: Any) -> str:
    """Return a change as it is written on the command line."""
    return FLAGS[name].format(value)


@dataclass(frozen=True)
class ServeSearch:
    """A GPU, its rates, and how settings are planned."""

    plan: Callable[[ServeSettings], ServingPlan]  # raises ValueError where they do not fit
    least_nbytes: Callable[[ServeSettings], int]  # of a GPU that they fit
    device_nbytes: int
    rates: Rates
    longest: int  # tokens that the model takes
    has_narrow: bool = True  # keys and values may be kept as `NARROW`
    _known: dict[ServeSettings, ServingPlan | None] = field(default_factory=dict, repr=False, compare=False)

    def planned(self, settings: ServeSettings) -> ServingPlan | None:
        """Return the plan, drawn once; None where there is none."""
        if settings not in self._known:
            try:
                self._known[settings] = self.plan(settings)
            except ValueError:
                self._known[settings] = None
        return self._known[settings]

    def num_sequences(self, settings: ServeSettings) -> int:
        """Return the sequences of the longest length that are held at once, as many as a step takes at most."""
        plan = self.planned(settings)
        return 0 if plan is None else min(plan.num_context_tokens // plan.max_seq_len, settings.max_batch_size)

    def fitting(self, settings: ServeSettings, base: ServeSettings) -> ServeFitting:
        """Describe settings that fit, beside those that were asked for."""
        plan, number = self.planned(settings), self.num_sequences(settings)
        assert plan is not None, "they fit"
        found = {f.name: getattr(settings, f.name) for f in fields(settings)}
        changes = {name: value for name, value in found.items() if value != getattr(base, name)}
        automatic = self.planned(replace(settings, mode=base.mode))
        if automatic is not None and automatic.mode == plan.mode:
            changes.pop("mode", None)
        seconds = plan.decode_seconds(self.rates, number)
        return ServeFitting(settings, changes, plan.mode, number, plan.max_seq_len, plan.num_context_tokens, seconds)


def report(search: ServeSearch, base: ServeSettings) -> ServeFitReport:
    """Search, and say what was found."""
    limit = readable(search.device_nbytes)
    if found := what_fits(search, base):
        head = f"what fits {limit}, of each GPU; steps decode one token of each sequence, and take so long at least:"
        return ServeFitReport(True, found, "\n".join([head, *map(str, found)]))
    found = smallest_changes(search, base)
    if found:
        head = f"nothing fits {limit} as it is; the smallest changes that would:"
        return ServeFitReport(False, found, "\n".join([head, *map(str, found)]))
    nbytes, settings = least(search, base)
    changes = " ".join(in_words(name, value) for name, value in _savings(search, base, settings).items())
    text = (
        f"nothing fits {limit}, with all that may change; the least is {readable(nbytes)} of each GPU, with {changes}"
    )
    return ServeFitReport(False, (), text)


def what_fits(search: ServeSearch, base: ServeSettings) -> list[ServeFitting]:
    """Return a choice for each place of weights and dtype of the KV cache, the fastest step first.

    Each has as many sequences as fit at once, of the length that is asked for, or the model's, or the longest that
    fits. Left out is what holds no more than another one, in no shorter step.
    """
    found = []
    for mode in _modes(base):
        for kv_dtype in _kv_dtypes(search, base):
            settings = replace(base, mode=mode, kv_dtype=kv_dtype, max_seq_len=base.max_seq_len or search.longest)
            best = _most_sequences(search, settings)
            if best is None and base.max_seq_len is None:
                alone = search.planned(replace(settings, max_batch_size=1, max_seq_len=None))
                longest = alone.max_seq_len if alone is not None else 0
                best = _most_sequences(search, replace(settings, max_seq_len=longest)) if longest else None
            if best is not None:
                found.append(search.fitting(best, base))
    kept = [one for one in found if not any(_is_no_better(one, other) for other in found if other is not one)]
    return sorted(kept, key=lambda one: one.seconds)


def _modes(base: ServeSettings) -> Sequence[AnyMode]:
    if base.mode != "auto":
        return (base.mode,)
    return ("resident", "gathered", "streamed") if base.num_ranks > 1 else ("resident", "streamed")


def _kv_dtypes(search: ServeSearch, base: ServeSettings) -> Sequence[str]:
    is_tried = search.has_narrow and ITEMSIZES[base.kv_dtype] > 1
    return (base.kv_dtype, NARROW) if is_tried else (base.kv_dtype,)


def _most_sequences(search: ServeSearch, settings: ServeSettings) -> ServeSettings | None:
    sizes = range(1, min(MAX_BATCH_SIZE, settings.max_batch_tokens) + 1)
    number = largest(sizes, lambda size: search.num_sequences(replace(settings, max_batch_size=size)) >= size)
    return None if number is None else replace(settings, max_batch_size=number)


def _is_no_better(one: ServeFitting, other: ServeFitting) -> bool:
    narrower = ITEMSIZES[other.settings.kv_dtype] < ITEMSIZES[one.settings.kv_dtype]
    return not narrower and (
        other.num_sequences * other.seq_len >= one.num_sequences * one.seq_len and other.seconds <= one.seconds
    )


# --- where nothing fits ---


def smallest_changes(search: ServeSearch, base: ServeSettings) -> list[ServeFitting]:
    """Return the sets of fewest changes with which one sequence fits, the fastest first; empty where none is enough."""
    savings = _savings(search, base)
    if search.planned(replace(base, **savings)) is None:
        return []
    for count in range(1, len(savings) + 1):
        sets = ({name: savings[name] for name in names} for names in combinations(savings, count))
        fitted = [replace(base, **found) for found in sets if search.planned(replace(base, **found)) is not None]
        if fitted:
            found = [search.fitting(_relaxed(search, base, settings), base) for settings in fitted]
            return sorted(found, key=lambda one: one.seconds)[:NUM_SHOWN]
    return []


def _savings(search: ServeSearch, base: ServeSettings, like: ServeSettings | None = None) -> dict[str, Any]:
    """Return what may be changed, each to the value that takes least; of ``like``, only what it changes."""
    savings: dict[str, Any] = {
        "mode": "auto",
        "kv_dtype": _kv_dtypes(search, base)[-1],
        "max_batch_size": 1,
        "max_batch_tokens": min(base.max_batch_tokens, max(base.max_batch_size, MIN_BATCH_TOKENS)),
        "max_seq_len": min(base.max_seq_len, TOKENS_STEP) if base.max_seq_len else None,
        "graphs": False,
        "num_ranks": max(base.num_ranks, MAX_RANKS),
    }
    other = {name: value for name, value in savings.items() if value != getattr(base, name)}
    return {name: value for name, value in other.items() if like is None or getattr(like, name) == value}


def _relaxed(search: ServeSearch, base: ServeSettings, settings: ServeSettings) -> ServeSettings:
    """Return settings that fit with each number no further from the one asked for than it must be."""
    numbers: dict[str, Sequence[int]] = {
        "max_batch_size": range(1, base.max_batch_size),
        "max_batch_tokens": range(settings.max_batch_tokens, base.max_batch_tokens, MIN_BATCH_TOKENS),
        "max_seq_len": range(TOKENS_STEP, base.max_seq_len or TOKENS_STEP, TOKENS_STEP),
        "num_ranks": [-number for number in (8, 4, 2) if number > base.num_ranks],
    }
    for name, values in numbers.items():
        if getattr(settings, name) != getattr(base, name):
            settings = _nearest(search, settings, name, values)
    return settings


def _nearest(search: ServeSearch, settings: ServeSettings, name: str, values: Sequence[int]) -> ServeSettings:
    """Return settings with the last of ``values``, which take more and more, that fits; negative ones count down."""

    def having(value: int) -> ServeSettings:
        changes: dict[str, Any] = {name: abs(value)}
        return replace(settings, **changes)

    number = largest(values, lambda value: search.planned(having(value)) is not None)
    return settings if number is None else having(number)


def least(search: ServeSearch, base: ServeSettings) -> tuple[int, ServeSettings]:
    """Return the bytes of the smallest GPU that would do with all changes, on as many ranks or on a whole host."""
    smallest = replace(base, **_savings(search, base))
    found = [(search.least_nbytes(one), one) for one in (replace(smallest, num_ranks=base.num_ranks), smallest)]
    return min(found, key=lambda pair: pair[0])
