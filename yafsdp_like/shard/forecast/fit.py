"""Which settings of a training run fit a device, and what each costs in time; and what to change where none do.

Owns the search. A forecast of given settings comes from the caller, who traces the model as seldom as possible: memory
of the optimizer and of shards changes without another trace. What grows with memory is found by bisection.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from yafsdp_like.memory.plan import readable
from yafsdp_like.shard.forecast.step_time import StepKind, step_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from yafsdp_like.hardware import MachineRates
    from yafsdp_like.optim.moments import MomentsFormat
    from yafsdp_like.shard.forecast.quantities import TrainingForecast

SLACK = 0.015  # of the device, by which peaks may be more than is forecast; of 42 measured runs by 1.1 % at most
WIDER_SLACK = {  # where settings are on with which more was measured than is forecast
    "update_in_backward": 0.05,  # 4.8 %, kept by the allocator: what another stream reads cannot be reused at once
    "offload_moments": 0.16,  # 11.9 and 15.3 %, which first steps hold and later ones do not
    "offload_activations": 0.16,  # these two were not measured, and copy between host and device as moments do
    "offload_parameters": 0.16,
}
TOKENS_STEP = 128  # lengths that are tried are multiples of this
MAX_RANKS = 4096
NUM_SHOWN = 8
KEPT_FREE = (
    f"kept free for what no forecast has: {SLACK:.1%} of the device, {WIDER_SLACK['update_in_backward']:.0%} with "
    f"updates in backward, {WIDER_SLACK['offload_moments']:.0%} with anything offloaded"
)


@dataclass(frozen=True)
class Settings:
    """What of a run may be changed so that it fits. A step's sequences stay the same, over all ranks together."""

    global_batch_size: int = 1  # sequences of a step
    seq_len: int = 1024
    micro_batch_size: int = 1  # sequences of one forward on one rank
    num_ranks: int = 1
    split_master: bool = False
    moments: MomentsFormat = "fp32"
    update_in_backward: bool = False
    reshard_after_forward: bool | None = None  # None: all but the root
    checkpointing: bool = False  # of every block
    offload_activations: bool = False
    offload_moments: bool | Literal["and_remainder"] = False  # the latter: of split masters, RemainderOffloadPolicy
    offload_parameters: bool = False  # parameters, gradients, moments and the update on the host: CPUOffloadPolicy

    @property
    def rows(self) -> int:
        """Return a rank's sequences of a step; 0 where they do not divide."""
        rows, rest = divmod(self.global_batch_size, self.num_ranks)
        return 0 if rest else rows

    @property
    def num_accumulated(self) -> int:
        """Return a rank's forwards of a step; 0 where they do not divide."""
        number, rest = divmod(self.rows, self.micro_batch_size)
        return 0 if rest else number

    @property
    def is_valid(self) -> bool:
        """Whether these may be combined."""
        on_host = self.offload_parameters
        return not (
            self.num_accumulated < 1
            or (self.update_in_backward and (self.offload_moments or on_host))
            or (self.checkpointing and self.offload_activations)
            or (self.offload_moments == "and_remainder" and not self.split_master)
            or (on_host and (self.split_master or self.offload_moments or self.moments != "fp32"))
        )

    @property
    def slack(self) -> float:
        """The share of the device that a forecast's peak must leave free."""
        return max([SLACK, *(share for name, share in WIDER_SLACK.items() if getattr(self, name))])

    def with_slack(self, nbytes: int) -> int:
        """Return the bytes of a device that a peak of ``nbytes`` may take."""
        return int(nbytes / (1 - self.slack)) + 1


CHANGES: Mapping[str, tuple[Any, ...]] = {  # values that are tried, beside what the run has; all save memory
    "split_master": (True,),
    "moments": ("bf16", "int8"),
    "update_in_backward": (True,),
    "reshard_after_forward": (None,),
    "checkpointing": (True,),
    "offload_activations": (True,),
    "offload_moments": (True, "and_remainder"),
    "offload_parameters": (True,),
}


@dataclass(frozen=True)
class Fitting:
    """Settings that fit: what is changed, the time of a step, and the peak."""

    settings: Settings
    changes: Mapping[str, Any]  # by the names of Settings
    seconds: float  # of a step, for as many tokens as the run's own step has
    nbytes: int  # of the device, at the peak


@dataclass(frozen=True)
class Search:
    """A device, a machine's rates, and how settings are forecast. ``may_change`` are names of ``Settings``.

    ``least_nbytes`` says, without a forecast, how many bytes settings take at least: most that do not fit need no more.
    """

    forecast: Callable[[Settings], TrainingForecast]
    device_nbytes: int
    rates: MachineRates
    may_change: Sequence[str] = tuple(CHANGES)
    clips: bool = True
    is_graph: bool = False
    max_seq_len: int = 1 << 21  # tokens that the model takes
    least_nbytes: Callable[[Settings], int] = lambda settings: 0
    _known: dict[Settings, TrainingForecast] = field(default_factory=dict, repr=False, compare=False)

    def forecast_of(self, settings: Settings) -> TrainingForecast:
        """Return a forecast, drawn once."""
        key = self._key(settings)
        if key not in self._known:
            self._known[key] = self.forecast(key)
        return self._known[key]

    def _key(self, settings: Settings) -> Settings:
        """Return what a forecast depends on. How often a step accumulates matters only if it does."""
        once = settings.num_ranks * settings.micro_batch_size
        return replace(settings, global_batch_size=once if settings.num_accumulated == 1 else 2 * once)

    def know(self, settings: Settings, forecast: TrainingForecast) -> None:
        """Take a forecast that has been drawn already."""
        self._known[self._key(settings)] = forecast

    def fits(self, settings: Settings) -> bool:
        """Whether the peak leaves its slack."""
        limit = int(self.device_nbytes * (1 - settings.slack))
        return self.least_nbytes(settings) <= limit and self.forecast_of(settings).fits(limit)

    def seconds(self, settings: Settings) -> float:
        """Predict the time of a step."""
        number = settings.num_accumulated
        clips = self.clips and not settings.update_in_backward
        kind = StepKind(clips, self.is_graph, number)
        return step_time(self.forecast_of(settings), self.rates, kind).seconds

    def fitting(self, settings: Settings, base: Settings) -> Fitting:
        """Describe settings that fit, beside those of the run."""
        changes = changed(settings, base)
        tokens = settings.global_batch_size * settings.seq_len
        scale = base.global_batch_size * base.seq_len / tokens
        peak = self.forecast_of(settings).peak.total_nbytes
        return Fitting(settings, changes, self.seconds(settings) * scale, peak)


def switched(base: Settings, may_change: Sequence[str]) -> Iterator[Settings]:
    """Yield every valid combination of the switches that may change, the fewest changes first."""
    names = [name for name in CHANGES if name in may_change]
    values = [tuple(dict.fromkeys((getattr(base, name), *CHANGES[name]))) for name in names]
    found = [replace(base, **dict(zip(names, row, strict=True))) for row in itertools.product(*values)]
    yield from sorted((s for s in found if s.is_valid), key=lambda s: len(changed(s, base)))


def changed(settings: Settings, base: Settings) -> dict[str, Any]:
    """Return what differs by name; a step's sequences go by the ranks and are no change of their own."""
    names = [f.name for f in fields(Settings) if f.name != "global_batch_size"]
    return {name: value for name in names if (value := getattr(settings, name)) != getattr(base, name)}


def largest(values: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of ascending values that fits, where all below one that fits do too; None where none does."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(values[middle]) else (low, middle)
    return values[low - 1] if low else None


def largest_micro_batch(search: Search, settings: Settings, above: int = 0) -> Settings | None:
    """Return the settings with the most sequences a forward that fit, more than ``above``; None where none does."""
    divisors = [number for number in range(above + 1, settings.rows + 1) if settings.rows % number == 0]
    found = largest(divisors, lambda number: search.fits(replace(settings, micro_batch_size=number)))
    return None if found is None else replace(settings, micro_batch_size=found)


def largest_seq_len(search: Search, settings: Settings, most: int | None = None) -> int | None:
    """Return the longest sequences that fit, below ``most``, in multiples of ``TOKENS_STEP``; None where none does."""

    def fits(tokens: int) -> bool:
        return tokens <= search.max_seq_len and search.fits(replace(settings, seq_len=tokens))

    if most is not None:
        return largest(range(TOKENS_STEP, most, TOKENS_STEP), fits)
    low = high = max(1, settings.seq_len // TOKENS_STEP) * TOKENS_STEP
    while low > TOKENS_STEP and not fits(low):
        low, high = low // 2 // TOKENS_STEP * TOKENS_STEP or TOKENS_STEP, low
    while fits(high):
        low, high = high, 2 * high
    return largest(range(low, high + 1, TOKENS_STEP), fits)


def fewest_ranks(search: Search, settings: Settings) -> Settings | None:
    """Return the settings with the fewest ranks, doubled until they fit; None where ``MAX_RANKS`` are too few.

    A rank's sequences stay as they are, so a step has more of them in all.
    """

    def on(times: int) -> Settings:
        return replace(
            settings, num_ranks=times * settings.num_ranks, global_batch_size=times * settings.global_batch_size
        )

    times = [1 << n for n in range(1, 20) if settings.num_ranks << n <= MAX_RANKS]
    if not times or not search.fits(on(times[-1])):
        return None
    too_few = largest(times, lambda number: not search.fits(on(number)))
    return on(times[0] if too_few is None else 2 * too_few)


def what_fits(search: Search, base: Settings) -> list[Fitting]:
    """Return settings that fit, the fastest first: sets of switches with as many sequences a forward as fit.

    A switch is there to save memory, and costs time: a set is tried only for more sequences than fit without some of
    its switches, and left out where another one changes less and is no slower.
    """
    found: list[Fitting] = []
    for settings in switched(replace(base, micro_batch_size=1), search.may_change):
        switches = changed(settings, base)
        switches.pop("micro_batch_size", None)
        without = [f.settings.micro_batch_size for f in found if _switches(f) <= set(switches.items())]
        fitted = largest_micro_batch(search, settings, max(without, default=0))
        if fitted is not None:
            found.append(search.fitting(fitted, base))
    kept: list[Fitting] = []
    for one in sorted(found, key=lambda f: (f.seconds, len(f.changes))):
        if not any(set(other.changes.items()) <= set(one.changes.items()) for other in kept):
            kept.append(one)
    return kept


def _switches(found: Fitting) -> set[tuple[str, Any]]:
    return {(name, value) for name, value in found.changes.items() if name != "micro_batch_size"}


def smallest_changes(search: Search, base: Settings, number: int = 3) -> list[Fitting]:
    """Return the sets of fewest changes that fit, the fastest first.

    Beside switches, these are fewer sequences a forward, shorter sequences, and more ranks. Empty where nothing helps.
    """
    found: list[Fitting] = []
    fewest = len(fields(Settings))
    for settings in switched(base, search.may_change):
        count = len(changed(settings, base))
        if count > fewest:
            break
        fitted = [settings] if search.fits(settings) else _more(search, settings) if count < fewest else ()
        for one in (search.fitting(there, base) for there in fitted):
            fewest = min(fewest, len(one.changes))
            found.append(one)
    least = [one for one in found if len(one.changes) == fewest]
    return sorted(least, key=lambda f: f.seconds)[:number]


def _more(search: Search, settings: Settings) -> Iterator[Settings]:
    """Yield settings that fit with one more change: fewer sequences a forward, shorter ones, or more ranks; or two."""
    single = replace(settings, micro_batch_size=1)
    if not any(search.fits(replace(there, seq_len=TOKENS_STEP)) for there in (single, _on_most_ranks(single))):
        return
    smaller = largest_micro_batch(search, settings)
    found = [smaller, _shorter(search, settings), fewest_ranks(search, settings)]
    if not any(found):
        found = [_shorter(search, single), fewest_ranks(search, single)]
    yield from (one for one in found if one is not None)


def _on_most_ranks(settings: Settings) -> Settings:
    times = max(1, MAX_RANKS // settings.num_ranks)
    return replace(settings, num_ranks=times * settings.num_ranks, global_batch_size=times * settings.global_batch_size)


def least(search: Search, base: Settings) -> Fitting:
    """Return the settings that need the smallest device of all looked at: one short sequence, here or on most ranks.

    They are forecast in the order of what they take at least, and only while that is less than has been found.
    """
    short = replace(base, micro_batch_size=1, seq_len=min(TOKENS_STEP, base.seq_len))
    candidates = [
        settings for there in (short, _on_most_ranks(short)) for settings in switched(there, search.may_change)
    ]
    nbytes = {settings: settings.with_slack(search.least_nbytes(settings)) for settings in candidates}
    best, most = short, 1 << 62
    for settings in sorted(candidates, key=lambda s: (nbytes[s], not s.checkpointing)):
        if nbytes[settings] >= most:
            break
        if (taken := settings.with_slack(search.forecast_of(settings).peak.total_nbytes)) < most:
            best, most = settings, taken
    return search.fitting(best, base)


def _shorter(search: Search, settings: Settings) -> Settings | None:
    tokens = largest_seq_len(search, settings, settings.seq_len)
    return None if tokens is None else replace(settings, seq_len=tokens)


def describe(found: Fitting, words: Callable[[str, Any], str], seconds: float | None) -> str:
    """Return one line: what is changed, the time of a step, beside that of the run as it is, and the peak."""
    changes = ", ".join(words(name, value) for name, value in found.changes.items()) or "as it is"
    compared = "" if not seconds else f", {found.seconds / seconds - 1:+.0%}"
    return f"{found.seconds * 1e3:10.1f} ms a step{compared}  {readable(found.nbytes):>11}  {changes}"


@dataclass(frozen=True)
class FitReport:
    """What fits, the fastest first; or, where nothing does, the smallest changes that would."""

    fits: bool
    found: Sequence[Fitting]
    text: str


def report(search: Search, base: Settings, words_of: Callable[[str, Any], str]) -> FitReport:
    """Search, and say what was found; ``words_of`` says a change."""
    limit = readable(search.device_nbytes)
    peak = search.forecast_of(base).peak
    own = search.seconds(base)
    head = f"{KEPT_FREE}\nas it is: {own * 1e3:.1f} ms a step, {readable(peak.total_nbytes)} in {peak.phase} of {limit}"
    if found := what_fits(search, base):
        lines = [describe(one, words_of, own) for one in found[:NUM_SHOWN]]
        return FitReport(True, found, "\n".join([head, f"what fits {limit}, the fastest first:", *lines]))
    smallest = least(search, base)
    found = smallest_changes(search, base) if search.fits(smallest.settings) else []
    if not found:
        words = f"nothing fits {limit}, with all that may change and {MAX_RANKS} ranks; the least is"
        return FitReport(False, (), "\n".join([head, words, describe(smallest, words_of, own)]))
    lines = [describe(one, words_of, own) for one in found]
    text = "\n".join([head, f"nothing fits {limit} as it is; the smallest changes that would:", *lines])
    return FitReport(False, found, text)
