"""Which tokens grammars allow, computed in threads beside the engine's, which waits for them only as long as it can.

Owns those threads and each text's place in its grammar. Knows nothing of the device, or of what else limits a row.

[Note: late masks]
What a grammar allows may take any time to find out, and other rows of the step would wait for it. So masks are computed
in threads, several at once (llguidance lets go of the interpreter meanwhile), from when the last token was read, while
the step's forward runs, and the step waits for them as long as ``StepLog.spare_s`` says. A row whose mask is late draws
nothing: the next step computes its last token once more, and draws if the mask is there by then. A text whose mask took
long has the next one computed in the slow lane, for which no step waits until one is quick again; so steps wait once
for a text that stays slow, and for the quick ones behind it. Where all rows are late, nobody is held up, and the step
waits for the first of them.

While llguidance accepts a token it keeps the interpreter, and nothing else goes on; an ambiguous grammar can make that
last longer with each token. So a text that keeps it for more than ``MAX_HELD_S`` ends with an error, and before a slow
text goes on, the slow lane rests for ``_REST`` times as long as its last token kept it: a thread of that lane has the
interpreter for a small share of the time. The quick lane never rests, since the first masks of all texts are in it.
Clocks of tensor parallel ranks differ: these follow no grammars.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from yafsdp_like.inference.engine.batch import RequestStatus
from yafsdp_like.inference.engine.request import GrammarError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from yafsdp_like.inference.engine.batch import ActiveRequest
    from yafsdp_like.inference.engine.request import Grammar, GrammarState

SLOW_S = 2e-3  # CPU time of a mask from which on a text is slow
MAX_HELD_S = 5e-3  # CPU time of accepting tokens at which a text ends
_REST = 20  # times as long as a slow text has kept the interpreter
_MAX_QUICK = 8  # threads of the quick lane, and at most half of the host's cores
_ALONE_S = 0.02  # that a step waits where nobody is held up, until requests may come and go

Words = npt.NDArray[np.int32]  # (W,): bits, as in kernels/token_bits.py
Drafted = tuple[int, ...]


@dataclass(eq=False)
class GrammarText:
    """One text's place in its grammar. While it is busy it belongs to a lane, else to the engine's thread."""

    grammar: Grammar
    num_followed: int  # tokens of the sequence behind which ``masks`` are; at first, the prompt's
    # Of what may follow the text, and drafts behind it.
    masks: dict[Drafted, Words | None] = field(default_factory=dict)
    error: BaseException | None = None  # why it cannot be followed any further
    is_slow: bool = False
    is_awaited: bool = False  # by steps, until it is late once
    job: Future[None] | None = None  # the last that a lane was given
    held_s: float = 0.0  # for which its last token kept the interpreter, until a lane has rested for that
    _state: GrammarState | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a lane has it, which has not answered yet."""
        return self.job is not None and not self.job.done()

    def follow(self, tokens: Sequence[int], drafts: Collection[Drafted]) -> None:
        """Follow the sequence's ``tokens`` to the last one, and find out what may be drawn behind it and each draft."""
        began = time.thread_time()
        try:
            self._find(tokens, drafts)
        except BaseException as error:  # the engine's thread raises it
            self.error = error
        self.is_slow = time.thread_time() - began > SLOW_S * len(drafts) or self.held_s > SLOW_S / 4

    def _find(self, tokens: Sequence[int], drafts: Collection[Drafted]) -> None:
        if self._state is None:
            self._state = self.grammar.start()
        if self.num_followed < len(tokens):
            began = time.thread_time()
            self.masks.clear()
            self._state.accept(tokens[self.num_followed :])
            self.num_followed = len(tokens)
            self.held_s = time.thread_time() - began
            if self.held_s > MAX_HELD_S:
                raise GrammarError(
                    f"what the text must be is too ambiguous to be followed: its last token took "
                    f"{self.held_s * 1e3:.0f} ms, at most {MAX_HELD_S * 1e3:.0f} are allowed"
                )
        for drafted in drafts:
            self.masks[drafted] = self._state.allowed_after(drafted) if drafted else self._state.allowed()


@dataclass(frozen=True)
class AskedMasks:
    """What one sequence asks for, all of whose tokens are known: what may follow it, and each of its drafts."""

    sequence: ActiveRequest
    text: GrammarText
    drafts: list[Drafted] = field(default_factory=list)  # () for the sequence itself

    @property
    def is_answered(self) -> bool:
        """Whether the text has it all, or never will."""
        if self.text.is_busy:
            return False
        is_here = self.text.num_followed == len(self.sequence.tokens)
        return self.text.error is not None or (is_here and all(each in self.text.masks for each in self.drafts))


class MaskLanes:
    """The threads of one engine, which are started when the first grammar comes. See [Note: late masks]."""

    def __init__(self) -> None:
        cores = os.cpu_count() or 1
        self._quick = ThreadPoolExecutor(max(1, min(_MAX_QUICK, cores // 2)), thread_name_prefix="quick grammars")
        self._slow = ThreadPoolExecutor(max(1, cores // 4), thread_name_prefix="slow grammars")

    def find_late(self, asked: Collection[AskedMasks], spare_s: float, *, alone: bool) -> set[ActiveRequest]:
        """Have masks computed, and return the sequences that do not have theirs.

        ``spare_s`` is how long the step may wait. ``alone``: the step has no other rows.
        """
        self._begin([each for each in asked if not each.text.is_busy and not each.is_answered])
        wait(_jobs(each.text for each in asked if each.text.is_awaited), spare_s)
        if alone and all(each.text.is_busy for each in asked):
            wait(_jobs(each.text for each in asked), _ALONE_S, FIRST_COMPLETED)
        late = [each for each in asked if not each.is_answered]
        for each in late:
            each.text.is_awaited = False
        return {each.sequence for each in late}

    def _begin(self, asked: Sequence[AskedMasks]) -> None:
        for each in asked:
            lane = self._slow if each.text.is_slow else self._quick
            each.text.is_awaited = not each.text.is_slow
            each.text.job = lane.submit(_answer, each)


def _answer(asked: AskedMasks) -> None:
    sequence, text = asked.sequence, asked.text
    if text.is_slow and sequence.status is not RequestStatus.ENDED:
        time.sleep(_REST * text.held_s)
        text.held_s = 0.0
    if sequence.status is not RequestStatus.ENDED:
        text.follow(sequence.tokens, asked.drafts)


def _jobs(texts: Iterable[GrammarText]) -> set[Future[None]]:
    return {text.job for text in texts if text.job is not None and text.is_busy}
