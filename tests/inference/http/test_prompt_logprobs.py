"""Log-probabilities of prompts over HTTP, as evaluations ask for them."""

import json
from typing import Any

import pytest
import torch

from tests.inference.http.servers import CHATS, COMPLETIONS, GREEDY, MODEL, PROMPT, Served, make_decoder
from tests.inference.http.test_fields import completion, parser_of
from yafsdp_like.inference.http import protocol
from yafsdp_like.inference.http.errors import ApiError
from yafsdp_like.inference.text.codec import Codec

# What lm-evaluation-harness' `local-completions` sends for a loglikelihood, fields and values included.
LM_EVAL = {"model": MODEL, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


@torch.no_grad()
def scores_of(codec: Codec, prompt: list[int]) -> torch.Tensor:
    """(T, V) log-probabilities of what follows each token."""
    return make_decoder(codec)(torch.tensor([prompt]))[0].float().log_softmax(-1)


def parse_as_lm_eval(choice: dict[str, Any], context_length: int) -> tuple[float, bool]:
    """(sum of log-probabilities, whether all are greedy) of what follows a context, from fields that it reads."""
    of_tokens = slice(context_length, -1)
    logprobs = choice["logprobs"]
    tops, tokens = logprobs["top_logprobs"][of_tokens], logprobs["tokens"][of_tokens]
    is_greedy = all(token == max(top, key=top.get) for token, top in zip(tokens, tops, strict=True))
    return sum(logprobs["token_logprobs"][of_tokens]), is_greedy


def test_a_loglikelihood_is_that_of_one_forward(served: Served) -> None:
    """Several contexts at once, as token ids; one continuation is the greedy one."""
    codec = served.codec
    context = list(codec.encode("The quick brown fox"))
    (greedy, _), other = served.ask(tuple(context), max_tokens=4), list(codec.encode(" jumps over"))
    prompts = [context + greedy, context + other, [*context, other[0]]]
    answer = served.running.post(COMPLETIONS, {**LM_EVAL, "prompt": prompts})
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        total, is_greedy = parse_as_lm_eval(choice, len(context))
        scores = scores_of(codec, prompt)
        places = range(len(context) - 1, len(prompt) - 1)
        assert total == pytest.approx(sum(scores[at, prompt[at + 1]].item() for at in places), abs=1e-3)
        assert is_greedy == all(int(scores[at].argmax()) == prompt[at + 1] for at in places)
    assert parse_as_lm_eval(choices[0], len(context))[1]


def test_an_echo_with_log_probabilities_is_the_text_with_places_of_all_its_tokens(small: Served) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 3, "logprobs": 2, "echo": True, "ignore_eos": True}
    (choice,) = small.running.post(COMPLETIONS, body).json()["choices"]
    logprobs = choice["logprobs"]
    prompt = small.codec.encode(PROMPT)
    assert choice["text"].startswith(PROMPT)
    assert {len(each) for each in logprobs.values()} == {len(prompt) + 3}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    ends = [*logprobs["text_offset"][1:], len(choice["text"])]
    for token, name, start, end in zip(prompt, logprobs["tokens"], logprobs["text_offset"], ends, strict=False):
        text = choice["text"][start:end]
        assert text == (name if small.codec.decode([token]) else "")


def test_a_stream_tells_the_same_with_its_first_piece(small: Served) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 5, "logprobs": 1, "echo": True}
    (whole,) = small.running.post(COMPLETIONS, body).json()["choices"]
    text = small.running.post(COMPLETIONS, {**body, "stream": True}).text
    pieces = [json.loads(line[6:])["choices"][0] for line in text.split("\n\n") if line and line[6:] != "[DONE]"]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        told = [each for piece in pieces if piece["logprobs"] for each in piece["logprobs"][name]]
        assert told == whole["logprobs"][name]


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_log_probabilities_of_a_prompt_can_be_all_that_is_asked_for(small: Served, path: str) -> None:
    asked = {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    body = {**GREEDY, **asked, "max_tokens": 0, "prompt_logprobs": 2, "return_token_ids": True}
    answer = small.running.post(path, body).json()
    (choice,) = answer["choices"]
    prompt, told = choice["prompt_token_ids"], choice["prompt_logprobs"]
    assert (len(told), told[0], answer["usage"]["completion_tokens"]) == (len(prompt), None, 0)
    scores = scores_of(small.codec, prompt)
    for row, token, entry in zip(scores, prompt[1:], told[1:], strict=False):
        assert entry[str(token)]["logprob"] == pytest.approx(row[token].item(), abs=1e-3)
        assert entry[str(int(row.argmax()))]["rank"] == 1
        assert len(entry) in (2, 3)


def test_answers_about_prompts_are_bounded(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_PROMPT_LOGPROBS", 2 * len(codec.encode(PROMPT)))
    assert completion(parser_of(codec), echo=True, logprobs=1).choices
    with pytest.raises(ApiError, match="ask about fewer prompts at once"):
        completion(parser_of(codec), echo=True, logprobs=1, n=2)
