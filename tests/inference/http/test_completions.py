"""Completions and chats as OpenAI's own client sees them, against an engine that is asked directly."""

from typing import Any

import openai
import pytest

from tests.inference.http.servers import GREEDY, MAX_SEQ_LEN, MODEL, PROMPT, Served, make_engine, serving
from yafsdp_like.inference.engine.request import FinishReason, Request
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.kernels.sampling_params import SamplingParams

# --- completions ---


def test_a_completion_is_what_the_engine_says(served: Served) -> None:
    prompt = served.codec.encode(PROMPT)
    ids, text = served.ask(prompt)
    answer = served.client.completions.create(prompt=PROMPT, **GREEDY)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.model) == (text, "length", MODEL)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(ids))
    assert answer.usage.total_tokens == len(prompt) + len(ids)


def test_a_prompt_may_be_text_or_ids_one_or_many(small: Served) -> None:
    other = "A lazy dog"
    ids, other_ids = list(small.codec.encode(PROMPT)), list(small.codec.encode(other))
    texts = [small.ask(tuple(prompt))[1] for prompt in (ids, other_ids)]
    for prompt, expected in (
        ([PROMPT], texts[:1]),
        (ids, texts[:1]),
        ([PROMPT, other], texts),
        ([ids, other_ids], texts),
    ):
        answer = small.client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))


def test_a_seed_gives_each_of_n_choices_again_and_alone(small: Served) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "top_p": 0.95}
    answers = [small.client.completions.create(n=3, seed=7, **body) for _ in range(2)]
    first, second = ([choice.text for choice in answer.choices] for answer in answers)
    assert first == second
    assert len(set(first)) == 3
    alone = small.client.completions.create(seed=8, **body).choices[0].text
    assert alone == first[1]
    assert answers[0].usage is not None
    assert answers[0].usage.prompt_tokens == len(small.codec.encode(PROMPT))
    unseeded = {small.client.completions.create(**body).choices[0].text for _ in range(3)}
    assert len(unseeded) == 3


def test_pieces_of_a_stream_are_the_text_and_usage_comes_last_if_asked_for(served: Served) -> None:
    _, text = served.ask(served.codec.encode(PROMPT))
    chunks = list(
        served.client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == text
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) > 5
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in pieces)
    plain = list(served.client.completions.create(prompt=PROMPT, stream=True, **GREEDY))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_choices_of_a_stream_are_told_apart_by_index(small: Served) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": [PROMPT, "A lazy dog"], "n": 2, "seed": 3, "max_tokens": 6}
    whole = small.client.completions.create(**body)
    texts = dict.fromkeys(range(4), "")
    for chunk in small.client.completions.create(stream=True, **body):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {choice.index: choice.text for choice in whole.choices}


@pytest.mark.parametrize("stream", [False, True])
def test_echo_says_the_prompt_first(served: Served, stream: bool) -> None:
    ids = list(served.codec.encode(PROMPT))
    expected = PROMPT + served.ask(tuple(ids))[1]
    for prompt in (PROMPT, ids):
        answer = served.client.completions.create(prompt=prompt, echo=True, stream=stream, **GREEDY)
        if isinstance(answer, openai.Stream):
            assert "".join(chunk.choices[0].text for chunk in answer) == expected
        else:
            assert answer.choices[0].text == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_its_request(served: Served, stream: bool) -> None:
    """Also one that begins in one token and ends in another; the engine computes no further."""
    _, text = served.ask(served.codec.encode(PROMPT), max_tokens=200)
    stop = text[8:12]
    expected = text[: text.index(stop)]
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 200, "stop": ["\u2603 no such thing", stop]}
    answer = served.client.completions.create(stream=stream, **body)
    if isinstance(answer, openai.Stream):
        chunks = list(answer)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        assert answer.usage is not None
        assert answer.usage.completion_tokens < 50
    served.running.check_idle()


def test_a_choice_that_a_stop_string_has_ended_is_not_computed_while_others_go_on(codec: Codec) -> None:
    with serving(make_engine(codec), codec) as running:
        body = {**GREEDY, "prompt": [PROMPT, "A lazy dog"], "max_tokens": 120, "ignore_eos": True}
        first, second = (choice["text"] for choice in running.post("/v1/completions", body).json()["choices"])
        before = running.call(lambda engine: engine.metrics().num_tokens_drawn)
        stop = next(first[at : at + 6] for at in range(3, 40) if first[at : at + 6] not in second)
        choices = running.post("/v1/completions", {**body, "stop": stop}).json()["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["stop", "length"]
        running.check_idle()
        assert running.call(lambda engine: engine.metrics().num_tokens_drawn) - before < 200  # of 240


def test_log_probabilities_are_the_engines_and_stand_at_their_text(served: Served) -> None:
    prompt = served.codec.encode(PROMPT)
    request = Request("logprobs", prompt, SamplingParams(temperature=0), max_tokens=6, num_logprobs=3)
    tokens = served.reference.generate([request])["logprobs"].tokens
    answer = served.client.completions.create(prompt=PROMPT, logprobs=3, **{**GREEDY, "max_tokens": 6})
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == [served.codec.name_of(token.id) for token in tokens]
    assert found.token_logprobs == pytest.approx([token.logprob for token in tokens], abs=1e-4)
    assert found.top_logprobs is not None
    for top, token in zip(found.top_logprobs, tokens, strict=True):
        assert top == pytest.approx({served.codec.name_of(id_): value for id_, value in token.top}, abs=1e-4)
        assert len(top) == 3
    assert found.text_offset is not None
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)
    for offset, name in zip(found.text_offset, found.tokens, strict=True):
        if not name.startswith("bytes:"):
            assert answer.choices[0].text[offset:].startswith(name)


def test_log_probabilities_of_a_stream_are_those_of_the_whole(served: Served) -> None:
    body = {**GREEDY, "prompt": PROMPT, "logprobs": 0}
    whole = served.client.completions.create(**body).choices[0].logprobs
    assert whole is not None
    assert whole.top_logprobs is None
    parts = [chunk.choices[0].logprobs for chunk in served.client.completions.create(stream=True, **body)]
    assert [name for part in parts if part is not None for name in part.tokens or ()] == whole.tokens
    assert [at for part in parts if part is not None for at in part.text_offset or ()] == whole.text_offset


def test_penalties_and_cuts_reach_the_engine(small: Served) -> None:
    prompt = small.codec.encode(PROMPT)
    fields = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.3}
    sampling = SamplingParams(0.7, top_p=0.9, presence_penalty=0.5, frequency_penalty=-0.5, seed=11, **fields)
    _, text = small.ask(prompt, sampling=sampling)
    answer = small.client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=24,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=11,
        extra_body=fields,
    )
    assert answer.choices[0].text == text


def test_a_prompt_that_came_before_is_cached_but_not_for_another_salt(small: Served) -> None:
    prompt = "never said before " * 10

    def cached(**extra: str) -> int:
        answer = small.client.completions.create(prompt=prompt, extra_body=extra, **GREEDY)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached() == 0
    assert cached() >= 16
    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") >= 16


def test_a_token_that_ends_texts_ends_the_answer_unless_ignored(codec: Codec) -> None:
    """With a small vocabulary, of which it is drawn now and then."""
    prompt, reference = codec.encode(PROMPT), make_engine(codec)
    for seed in range(200):
        request = Request("x", prompt, SamplingParams(1.5, seed=seed), max_tokens=40, stop_tokens=codec.stop_tokens)
        expected = reference.generate([request])["x"]
        if expected.finish is FinishReason.STOP:
            break
    text = codec.decode([*prompt, *expected.ids])[len(PROMPT) :]
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 1.5, "seed": seed, "max_tokens": 40}
    with serving(make_engine(codec), codec) as running:
        client = running.client()
        answer = client.completions.create(**body)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "stop")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(expected.ids)
        (choice,) = client.completions.create(extra_body={"ignore_eos": True}, **body).choices
        assert choice.finish_reason == "length"
        assert choice.text.startswith(text)


# --- chats ---


def test_a_chat_completes_what_its_template_makes(served: Served) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
    prompt = served.codec.encode_chat(messages)
    _, text = served.ask(prompt)
    answer = served.client.chat.completions.create(messages=messages, **GREEDY)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (text, "assistant", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_developer_is_the_system_and_parts_of_text_are_text(small: Served) -> None:
    plain: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\nthere"}]
    parts: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
    ]
    first, second = (
        small.client.chat.completions.create(messages=messages, **GREEDY).choices[0].message.content
        for messages in (plain, parts)
    )
    assert first == second


def test_an_answer_sent_back_as_the_client_gives_it_is_understood(small: Served) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    body = {**GREEDY, "max_tokens": 4}
    answer = small.client.chat.completions.create(messages=messages, **body)
    messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    assert small.client.chat.completions.create(messages=messages, **body).choices[0].finish_reason == "length"


def test_a_streamed_chat_names_its_role_and_says_the_same(served: Served) -> None:
    body = {**GREEDY, "messages": [{"role": "user", "content": "Hi"}], "n": 2}
    whole = served.client.chat.completions.create(**body)
    texts, roles, finishes = ["", ""], [], []
    for chunk in served.client.chat.completions.create(stream=True, **body):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.delta.role] if choice.delta.role else []
        finishes += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert (roles, finishes) == (["assistant"] * 2, ["length"] * 2)


def test_bytes_of_a_chats_log_probabilities_are_its_text(served: Served) -> None:
    body = {**GREEDY, "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2}
    choice = served.client.chat.completions.create(**body).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    raw = b"".join(bytes(token.bytes or []) for token in content)
    assert raw.decode(errors="replace") == choice.message.content
    assert [len(token.top_logprobs) for token in content] == [2] * 24
    assert [token.top_logprobs[0].token for token in content] == [token.token for token in content]  # greedy


def test_a_chat_without_max_tokens_goes_on_to_what_fits(small: Served) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    answer = small.client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (MAX_SEQ_LEN, "length")
    short = small.client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=3)
    assert short.usage is not None
    assert short.usage.completion_tokens <= 3
