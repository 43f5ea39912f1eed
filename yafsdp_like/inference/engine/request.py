"""What is asked of the engine and what it answers: plain values, no tensor and no page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from yafsdp_like.kernels.sampling_params import MAX_BIASES, MAX_LOGPROBS, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from yafsdp_like.inference.engine.image_tokens import PlacedImage

PLAIN = SamplingParams()


class QueueFullError(RuntimeError):
    """More requests wait than the engine takes, or can serve in time; try again in ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"  # a stop token was drawn
    LENGTH = "length"  # max_tokens were drawn
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    FAILED = "failed"  # its model could not be loaded
    GRAMMAR = "grammar"  # what it must be cannot be followed any further


class GrammarError(RuntimeError):
    """A text cannot be followed in its grammar any further: where the grammar takes more work than a step may."""


class GrammarState(Protocol):
    """How far a text is in a grammar; called by one thread at a time. ``GrammarError`` of a call ends the request."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that were drawn."""

    def allowed(self) -> Any:
        """Return the bits (W,) int32 of what may follow, as in kernels/token_bits.py, changed by nobody later."""

    def allowed_after(self, tokens: Sequence[int]) -> Any:
        """Return the same for a text that went on by ``tokens``, which this one does not; None if it may not."""


class Grammar(Protocol):
    """What a text must be."""

    def start(self) -> GrammarState:
        """Begin a text."""


@dataclass(frozen=True)
class TokenLimits:
    """Which tokens may be drawn, and biases of their logits, before penalties and temperature."""

    biases: tuple[tuple[int, float], ...] = ()  # (token, what its logit is raised by), each token once
    allowed: tuple[int, ...] | None = None  # no others are drawn
    bad_words: tuple[tuple[int, ...], ...] = ()  # these tokens are not drawn in a row
    min_tokens: int = 0  # no stop token is drawn before
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if len(self.biases) > MAX_BIASES or len({token for token, _ in self.biases}) < len(self.biases):
            raise ValueError(f"biases must be of at most {MAX_BIASES} tokens, each once, found {len(self.biases)}")
        if self.allowed == ():
            raise ValueError("allowed must have at least one token, found none")
        if () in self.bad_words:
            raise ValueError("a bad word must have at least one token, found none")


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued. Raises ValueError for numbers that no engine takes."""

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = PLAIN
    max_tokens: int = 16
    stop_tokens: frozenset[int] = frozenset()  # ends with one of these, which is reported, too
    num_logprobs: int | None = None  # None: none; 0: of the token drawn; n: of the n most probable, too
    num_prompt_logprobs: int | None = None  # the same of the prompt's tokens, which are all computed then
    wants_hidden: bool = False  # tell the hidden state of the prompt's last token
    tenant: str = ""  # whose pages they are
    priority: int = 0  # higher first
    deadline: float | None = None  # in seconds of time.monotonic()
    salt: str | None = None  # pages, of images too, are shared only with requests of the same salt
    adapter: str | None = None  # the LoRA adapter that it is computed with; None: the model as it is
    limits: TokenLimits | None = None  # what may be drawn; None: everything
    images: tuple[PlacedImage, ...] = ()  # in the prompt, as ``place_images`` returns both
    model: str = ""  # which one a `PoolDriver` gives it to; an engine has one model

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar says what it draws, so that a draw may be late."""
        return self.limits is not None and self.limits.grammar is not None

    @property
    def named_tokens(self) -> tuple[int, ...]:
        """All tokens that the vocabulary must have."""
        limits = self.limits
        return self.prompt if limits is None else (*self.prompt, *(limits.allowed or ()), *dict(limits.biases))

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"request {self.id!r}: a prompt must have at least one token, found none")
        if self.max_tokens < 1:
            raise ValueError(f"request {self.id!r}: max_tokens must be at least 1, found {self.max_tokens}")
        for name in ("num_logprobs", "num_prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise ValueError(f"request {self.id!r}: {name} must be between 0 and {MAX_LOGPROBS}, found {count}")


@dataclass(frozen=True)
class Token:
    """A token that was drawn, or of a prompt; log-probabilities are the model's own, before all that sampling does."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability) of the most probable, in falling order


@dataclass(frozen=True)
class RequestOutput:
    """News of one request. The last one of a request has a reason to finish."""

    request_id: str
    tokens: tuple[Token, ...]  # since the output before
    finish: FinishReason | None = None
    num_cached_tokens: int = 0  # of the prompt, that were not computed
    error: str | None = None  # why it FAILED, or what is wrong with its GRAMMAR
    prompt: tuple[Token, ...] = ()  # with the first tokens, if its log-probabilities are asked for; the first has none
    hidden: tuple[float, ...] = ()  # (D,): of the token before the last one here, normed, if it is asked for

    def after(self, before: RequestOutput) -> RequestOutput:
        """Return one output with the tokens of both, ``before`` being an earlier one of the same request."""
        prompt, hidden = before.prompt or self.prompt, before.hidden or self.hidden
        return replace(self, tokens=before.tokens + self.tokens, prompt=prompt, hidden=hidden)


@dataclass(frozen=True)
class Completion:
    """All that was drawn for one request."""

    tokens: tuple[Token, ...]
    finish: FinishReason
    num_cached_tokens: int
    prompt: tuple[Token, ...] = ()  # see ``RequestOutput``
    hidden: tuple[float, ...] = ()  # (D,): of the prompt's last token, normed, if it is asked for

    @property
    def ids(self) -> list[int]:
        """Ids of the tokens."""
        return [token.id for token in self.tokens]

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput]) -> Completion:
        """Join all outputs of one request, in order, of which the last has a reason to finish."""
        finish = outputs[-1].finish
        assert finish is not None, f"request {outputs[-1].request_id!r} goes on"
        return cls(
            tuple(token for output in outputs for token in output.tokens),
            finish,
            max(output.num_cached_tokens for output in outputs),
            next((output.prompt for output in outputs if output.prompt), ()),
            next((output.hidden for output in outputs if output.hidden), ()),
        )


def joined(outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
    """Join outputs of the same request, which come in order, so that each has one."""
    found: dict[str, RequestOutput] = {}
    for output in outputs:
        before = found.get(output.request_id)
        found[output.request_id] = output if before is None else output.after(before)
    return list(found.values())
