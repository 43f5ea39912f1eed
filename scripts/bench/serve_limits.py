"""Steps whose answers are all bound by a JSON schema, beside free ones: what grammars cost."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import tokenizers

from bench.report import Row, spread
from bench.serve_decode import step_ms
from bench.serve_engine import Bench, Decoding
from yafsdp_like.data.text import TextSource
from yafsdp_like.data.tokenizer import MODEL_FILE, SPECIAL_TOKENS, Tokenizer
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request, RequestOutput, TokenLimits
from yafsdp_like.inference.text.grammar import Grammars

CHARACTERS_PER_TOKEN = 64  # of the text that the tokenizer learns, for each token of the model's vocabulary
TEXT = {"type": "string", "maxLength": 24}
ADDRESS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["street", "number"],
    "properties": {"street": TEXT, "number": {"type": "number"}, "ok": {"type": "boolean"}},
}
PERSON = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "age", "tags", "address"],
    "properties": {
        "name": TEXT,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4},
        "address": ADDRESS,
    },
}
SCHEMA: dict[str, Any] = {"type": "array", "minItems": 10_000, "items": PERSON}  # which ends no answer


class Answering(Decoding):
    """A batch that decodes, and what each of its requests has drawn, by id."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        super().__init__(engine, requests)

    @property
    def num_drawn(self) -> int:
        """Tokens of all requests."""
        return sum(map(len, self.tokens.values()))

    def step(self) -> list[RequestOutput]:
        """One of the engine's. Raises what `Decoding.step` does."""
        outputs = super().step()
        for output in outputs:
            self.tokens[output.request_id] += [token.id for token in output.tokens]
        return outputs


def measure(bench: Bench) -> Iterator[Row]:
    """Rows of each batch: free, with a bias, and bound by the schema; free again last, which tells the noise.

    Raises ValueError where `llguidance` is missing, and GrammarError for an answer that is not of the schema.
    """
    vocab_size = bench.served.plan.config.vocab_size
    tokenizer = trained_tokenizer(vocab_size)
    grammar = Grammars(tokenizer, vocab_size, [tokenizer.eos_token_id]).of_schema(SCHEMA)
    kinds = {
        "free": None,
        "bias": TokenLimits(biases=((5, 1.0),)),
        "json_schema": TokenLimits(grammar=grammar),
        "free again": None,
    }
    for batch in bench.options.batches:
        free = None
        for answers, limits in kinds.items():
            row, drawn = measured(bench, batch, limits)
            if limits is not None and limits.grammar is not None:
                for tokens in drawn:
                    grammar.start().accept(tokens)
            free = free or row["tokens_per_second"]
            of_free = row["tokens_per_second"] / free
            yield {"answers": answers, **row, "of_free": of_free, "tokenizer_tokens": len(tokenizer)}


def trained_tokenizer(vocab_size: int) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens, of the text that the repository carries, as transformers' own.

    That text may give fewer tokens than the model has: the model's others stand for nothing, and are in no grammar.
    """
    from transformers import PreTrainedTokenizerFast

    texts = opening(TextSource().documents(), CHARACTERS_PER_TOKEN * vocab_size)
    files = Tokenizer.train(texts, vocab_size).files
    model = tokenizers.Tokenizer.from_buffer(files[MODEL_FILE])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=SPECIAL_TOKENS["eos_token"])


def opening(documents: Iterable[str], num_characters: int) -> Iterator[str]:
    """Documents of so many characters together; the last one is cut."""
    for document in documents:
        if num_characters <= 0:
            return
        yield document[:num_characters]
        num_characters -= len(document)


def measured(bench: Bench, batch: int, limits: TokenLimits | None) -> tuple[Row, list[list[int]]]:
    """Times of one batch's steps in ms, tokens a second of all that was drawn in them, and all that was drawn."""
    options = bench.options
    room = options.decode_length(batch) - options.decode_prompt
    requests = bench.requests.many(batch, options.decode_prompt, room)
    decoding = Answering(bench.served.engine, [replace(request, limits=limits) for request in requests])
    decoding.fill()
    for _ in range(options.warmup):
        decoding.step()
    first = decoding.num_drawn
    times = [step_ms(decoding) for _ in range(options.steps)]
    rate = (decoding.num_drawn - first) / (sum(times) / 1e3)
    decoding.stop()
    return {"batch": batch, "step_ms": spread(times), "tokens_per_second": rate}, [*decoding.tokens.values()]
