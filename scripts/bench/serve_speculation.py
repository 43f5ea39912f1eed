"""Speculative decoding beside none, of the same requests to a model whose next token is known.

[Note: a known next token]
Random weights draw tokens that nothing can foresee. So in each row the head has the embedding of the token before, and
what layers add is scaled down until it decides nothing; all of it is computed. Tokens of the vocabulary's lower half
follow each other in circles of `PERIOD`, as a text that repeats itself; those of its upper half come once each, so
there is nothing to look up. The model that drafts never draws every fifth token.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.report import Row
from bench.serve_engine import GREEDY, Bench, model_of, use_further_engine
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.weights.loading import Model, RandomSource, open_model
from yafsdp_like.models.decoder import DecoderConfig

PERIOD = 32
WRONG_EVERY = 5
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
LAYER_OUTPUTS = ("o_proj.weight", "down_proj.weight")  # what layers add to the residual stream
LAYER_SCALE = 1e-3
TEXTS = ("repetitive", "new")


@dataclass(frozen=True)
class SpeculationRun:
    """What became of some requests, from the step on in which all had drawn."""

    tokens: list[list[int]]  # of each request, all
    tokens_per_second: float
    tokens_per_step: float  # of one request


@dataclass(frozen=True)
class KnownNextToken:
    """A source of random values but for the head, see [Note: a known next token]."""

    config: DecoderConfig
    others: RandomSource
    is_draft: bool

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read elements of a parameter, as sources do."""
        if name == HEAD:
            out.copy_(self._head(out).flatten()[start : start + len(out)])
            return
        self.others.read_into(name, start, out)
        if name.endswith(LAYER_OUTPUTS):
            out.mul_(LAYER_SCALE)

    def _head(self, like: Tensor) -> Tensor:
        vocab_size = self.config.vocab_size
        embedding = like.new_empty(vocab_size, self.config.dim)
        self.others.read_into(EMBEDDING, 0, embedding.view(-1))
        tokens = torch.arange(vocab_size, device=like.device)
        head = embedding[before(tokens, vocab_size)]
        if self.is_draft:
            head[::WRONG_EVERY] *= -1
        return head


def before(tokens: Tensor, vocab_size: int) -> Tensor:
    """Return the token that each token follows."""
    half = vocab_size // 2 // PERIOD * PERIOD
    circles = tokens // PERIOD * PERIOD + (tokens % PERIOD - 1) % PERIOD
    return torch.where(tokens < half, circles, half + (tokens - half - 1) % (vocab_size - half))


def known_model(name: str, config: DecoderConfig, is_draft: bool = False) -> Model:
    """A model of that shape, not quantized, with a head of its own."""
    untied = replace(config, tie_embeddings=False, quantization=None)
    return Model(name, untied, None, lambda device: KnownNextToken(untied, RandomSource(untied, device), is_draft))


def measure(bench: Bench) -> Iterator[Row]:
    """A row for each way to draft, kind of text and batch; greedy, and without drafts the same tokens are expected."""
    shape = model_of(bench.options).config
    model = known_model("known", shape)
    draft_shape = replace(open_model(bench.options.draft).config, vocab_size=shape.vocab_size)
    draft = known_model("known-draft", draft_shape, is_draft=True)
    use = partial(runs, bench)
    without = use_further_engine(bench, model, use)
    for speculate, drafter in (("prompt-lookup", None), (f"draft:{draft.name}", draft)):
        for (text, batch), run in use_further_engine(bench, model, use, draft=drafter, speculate=speculate).items():
            plain = without[text, batch]
            yield {
                "speculate": speculate,
                "text": text,
                "batch": batch,
                "same_tokens": run.tokens == plain.tokens,
                "tokens_per_step": run.tokens_per_step,
                "tokens_per_second": run.tokens_per_second,
                "tokens_per_second_without": plain.tokens_per_second,
                "of_without": run.tokens_per_second / plain.tokens_per_second,
            }


def runs(bench: Bench, engine: Engine) -> dict[tuple[str, int], SpeculationRun]:
    """Of each kind of text and batch; each load runs twice, and the second time counts."""
    found = {}
    for text in TEXTS:
        for batch in bench.options.batches:
            for name in ("warmup", "timed"):
                found[text, batch] = run_of(engine, requests(bench, name, text, batch))
    return found


def requests(bench: Bench, name: str, text: str, batch: int) -> list[Request]:
    """Return prompts that each go on at another place of the text, with all tokens to draw."""
    options, vocab_size = bench.options, bench.served.plan.config.vocab_size
    half = vocab_size // 2 // PERIOD * PERIOD
    found = []
    for row in range(batch):
        if text == "repetitive":
            prompt = tuple(row * PERIOD % half + index % PERIOD for index in range(options.prompt_tokens))
        else:
            begin = row * (vocab_size - half) // batch
            prompt = tuple(half + (begin + index) % (vocab_size - half) for index in range(options.prompt_tokens))
        found.append(Request(f"{name} {text} {batch} {row}", prompt, GREEDY, max_tokens=options.new_tokens))
    return found


def run_of(engine: Engine, asked: Sequence[Request]) -> SpeculationRun:
    """Serve requests to their ends."""
    tokens: dict[str, list[int]] = {request.id: [] for request in asked}
    for request in asked:
        engine.add(request)
    while not all(tokens.values()):
        step(engine, tokens)
    first, num_steps, begin = sum(map(len, tokens.values())), 0, time.perf_counter()
    while engine.has_work:
        step(engine, tokens)
        num_steps += 1
    seconds, drawn = time.perf_counter() - begin, sum(map(len, tokens.values())) - first
    return SpeculationRun([*tokens.values()], drawn / seconds, drawn / len(asked) / max(1, num_steps))


def step(engine: Engine, tokens: dict[str, list[int]]) -> None:
    """Step once, and note what was drawn."""
    for output in engine.step():
        tokens[output.request_id] += [token.id for token in output.tokens]
