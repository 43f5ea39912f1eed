"""What is refused and how; the list of models, health, metrics and keys."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.inference.http.servers import CHATS, COMPLETIONS, GREEDY, JSON, MODEL, PROMPT, Running, make_engine, serving
from yafsdp_like.inference.engine.metrics import Metrics
from yafsdp_like.inference.http.bodies import MAX_STOP_STRINGS
from yafsdp_like.inference.http.metrics import ENGINE_HELP
from yafsdp_like.inference.text.codec import Codec

# --- what is refused ---

HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
WITH_IMAGE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "words"),
    [
        (COMPLETIONS, {}, 400, "prompt", "Field required"),
        (COMPLETIONS, {"prompt": "x", "model": None}, 400, "model", "valid string"),
        (COMPLETIONS, {"prompt": "x", "model": "gpt-9"}, 404, "model", "there is no 'gpt-9' here, only 'tiny'"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt", "at least one token"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": ["x", 1]}, 400, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": [True]}, 400, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "a string, a list of strings"),
        (COMPLETIONS, {"prompt": [0, 99_999]}, 400, "prompt", "token ids must be from 0 to"),
        (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "token ids must be from 0 to"),
        (COMPLETIONS, {"prompt": [10**400]}, 400, "prompt", "0...0"),  # of which not all is said again
        (COMPLETIONS, {"prompt": "\ud83d"}, 400, "prompt", "surrogate"),
        (COMPLETIONS, {"prompt": "fox " * 300}, 400, "prompt", "are more than the 256 that fit"),
        (COMPLETIONS, {"prompt": [5] * 256}, 400, "prompt", "256 tokens, and 1 to generate"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0; found -1"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "0 generates nothing"),
        (COMPLETIONS, {"prompt": "x", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens", "-1 or at least 1"),
        (CHATS, {**HELLO, "max_completion_tokens": 0}, 400, "max_tokens", "0 generates nothing"),
        (
            CHATS,
            {**HELLO, "chat_template_kwargs": {"tokenize": True}},
            400,
            "chat_template_kwargs",
            "not for templates",
        ),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "9"}, 400, "max_tokens", "valid integer; found '9'"),
        (COMPLETIONS, {"prompt": "x", "n": 0}, 400, "n", "greater than or equal to 1"),
        (COMPLETIONS, {"prompt": ["x"] * 9, "n": 2}, 400, "n", "at most 16 choices in all, found 18"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        (COMPLETIONS, {"prompt": "x", "top_p": 0}, 400, "top_p", "greater than 0"),
        (COMPLETIONS, {"prompt": "x", "seed": 2**63}, 400, "seed", "less than"),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a"] * (MAX_STOP_STRINGS + 1)}, 400, "stop", "at most 16 strings"),
        (COMPLETIONS, {"prompt": "x", "stop": [""]}, 400, "stop", "of 1 to 256 characters"),
        (COMPLETIONS, {"prompt": "x", "stop": ["a", "\udfff"]}, 400, "stop", "half a surrogate pair"),
        (COMPLETIONS, {"prompt": "x", "guided_choice": []}, 400, "guided_choice", "at least one text"),
        (COMPLETIONS, {"prompt": "x", "structured_outputs": {"choice": []}}, 400, "structured_outputs", "at least one"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, 400, "suffix", "only continues a prompt"),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}, 400, "best_of", "not ranked"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 101}}, 400, "logit_bias", "a bias from -100 to 100"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"five": 1}}, 400, "logit_bias", "token ids"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"99999": 1}}, 400, "logit_bias", "token ids must be from 0 to"),
        (COMPLETIONS, {"prompt": "x", "allowed_token_ids": []}, 400, "allowed_token_ids", "at least one token"),
        (COMPLETIONS, {"prompt": "x", "allowed_token_ids": [-1]}, 400, "allowed_token_ids", "must be from 0 to"),
        (COMPLETIONS, {"prompt": "x", "bad_words": [""]}, 400, "bad_words", "from 1 to 256 characters"),
        (COMPLETIONS, {"prompt": "x", "bad_words": ["\ud800"]}, 400, "bad_words", "surrogate"),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 10**400}}, 400, "logit_bias", "a bias from -100 to 100"),
        (COMPLETIONS, {"prompt": "x", "stream_options": {}}, 400, "stream_options", "only for stream"),
        (CHATS, {}, 400, "messages", "Field required"),
        (CHATS, {"messages": []}, 400, "messages", "at least 1 item"),
        (CHATS, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "Field required"),
        (CHATS, {"messages": [{"role": "clown", "content": "x"}]}, 400, "messages[0].role", "'system', 'developer'"),
        (CHATS, WITH_IMAGE, 400, "messages", "the model takes no images"),
        (CHATS, {**HELLO, "tools": [{"type": "function"}]}, 400, "tools[0]", "a function in it"),
        (CHATS, {**HELLO, "tools": [TOOL]}, 400, "tools", "chat template knows of none"),
        (CHATS, {**HELLO, "functions": [{"name": "f"}]}, 400, "functions", "the old name of tools"),
        (CHATS, {**HELLO, "tool_choice": "required"}, 400, "tool_choice", "names no function"),
        (CHATS, {**HELLO, "response_format": {"type": "xml"}}, 400, "response_format", "found 'xml'"),
        (CHATS, {**HELLO, "response_format": {"type": "json_schema"}}, 400, "response_format", "an object `schema`"),
        (CHATS, {**HELLO, "guided_json": {"type": "zzz"}}, 400, "guided_json", "not understood"),
        (CHATS, {**HELLO, "guided_regex": "x", "guided_choice": ["y"]}, 400, "guided_choice", "set one"),
        (CHATS, {**HELLO, "structured_outputs": {"zzz": "x"}}, 400, "structured_outputs", "expected one of json"),
        (CHATS, {**HELLO, "structured_outputs": {"choice": "x"}}, 400, "structured_outputs", "expected list"),
        (CHATS, {**HELLO, "modalities": ["audio"]}, 400, "modalities", "only text"),
        (CHATS, {**HELLO, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs: true"),
        (CHATS, {**HELLO, "max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "differs from"),
        (CHATS, {"messages": [*HELLO["messages"], {"role": "system", "content": "x"}]}, 400, "messages", "come first"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    plain: Running, path: str, fields: dict[str, Any], status: int, param: str, words: str
) -> None:
    answer = plain.post(path, content=json.dumps({"model": MODEL, **fields}), headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: ")
    assert words in error["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"{", JSON, 400, "the body is no JSON"),
        (b"", JSON, 400, "must be a JSON object"),
        (b"[1]", JSON, 400, "must be a JSON object"),
        (b'"x"', JSON, 400, "must be a JSON object"),
        (b"\xff\xfe", JSON, 400, ""),
        (b"[" * 50_000, JSON, 400, ""),
        (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", JSON, 400, ""),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', JSON, 400, "finite number"),
        (b'{"model": "tiny", "prompt": "x"}', {"content-type": "text/plain"}, 400, "must be a JSON object"),
        (b'{"prompt": "' + b"x" * 100_000 + b'"}', JSON, 413, "100000 bytes at most"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_body_that_is_no_request_is_an_error_and_no_failure(
    plain: Running, content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    answer = plain.post(COMPLETIONS, content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(("error", "status"), [(RecursionError(), 400), (ValueError("odd"), 400), (KeyError("x"), 500)])
def test_a_body_that_its_parser_fails_on_is_an_error_that_clients_read(
    plain: Running, error: Exception, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("yafsdp_like.inference.http.protocol.RequestParser.read_sent", fail)
    answer = plain.post(COMPLETIONS, {"model": MODEL, "prompt": "x"})
    assert (answer.status_code, "message" in answer.json()["error"]) == (status, True)


def test_a_body_that_does_not_say_how_long_it_is_is_cut_short_too(plain: Running) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 1000

    assert plain.post(COMPLETIONS, content=endless(), headers=JSON).status_code == 413


def test_errors_are_those_that_the_client_knows(plain: Running) -> None:
    client = plain.client()
    with pytest.raises(openai.BadRequestError, match="only continues") as caught:
        client.completions.create(model=MODEL, prompt="x", suffix="y")
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match="fit") as caught:
        client.completions.create(model=MODEL, prompt="fox " * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="other", prompt="x")
    assert not_found.value.code == "model_not_found"


def test_an_unknown_path_and_a_wrong_method_are_errors_in_the_same_form(plain: Running) -> None:
    assert (plain.post("/v1/rerank", {}).status_code, plain.get(COMPLETIONS).status_code) == (404, 405)
    assert plain.get("/nowhere").json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("path", "allowed"), [("/health", "GET, HEAD, OPTIONS"), (COMPLETIONS, "OPTIONS, POST")])
def test_what_may_be_done_at_a_path_is_told(plain: Running, path: str, allowed: str) -> None:
    answer = plain.http.options(path)
    assert (answer.status_code, answer.headers["allow"], answer.content) == (204, allowed, b"")
    wrong = plain.http.delete(path)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, allowed)


def test_head_is_get_without_a_body(plain: Running) -> None:
    for path, status in (("/health", 200), ("/metrics", 200), ("/v1/models", 200), ("/nowhere", 404), (CHATS, 405)):
        answer = plain.http.head(path)
        assert (answer.status_code, answer.content) == (status, b"")
    assert plain.http.options("/nowhere").status_code == 404


def test_a_model_answers_to_all_of_its_names(codec: Codec) -> None:
    with serving(make_engine(codec), codec, aliases=("runs/tiny",)) as running:
        for name in (MODEL, "runs/tiny"):
            answer = running.post(COMPLETIONS, {**GREEDY, "model": name, "prompt": "x"}).json()
            assert answer["model"] == MODEL
            assert running.get(f"/v1/models/{name}").json()["id"] == MODEL
        assert running.get("/v1/models/runs").status_code == 404


def test_fields_that_say_nothing_of_the_text_are_taken(plain: Running) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logit_bias": {}}
    for_chats = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert plain.post(COMPLETIONS, {**GREEDY, **harmless, "prompt": "x", "best_of": 1}).status_code == 200
    assert plain.post(CHATS, {**GREEDY, **harmless, **for_chats, **HELLO}).status_code == 200
    nulls = dict.fromkeys(("n", "stop", "seed", "top_p", "stream", "logprobs", "echo", "suffix", "stream_options"))
    assert plain.post(COMPLETIONS, {**GREEDY, **nulls, "prompt": "x"}).status_code == 200


# --- models, health, metrics, keys ---


def test_the_one_model_is_listed_and_found(plain: Running) -> None:
    client = plain.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "yafsdp_like"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_health_says_that_it_serves(plain: Running) -> None:
    assert (plain.get("/health").status_code, plain.get("/health").json()) == (200, {"status": "serving"})


def test_metrics_count_what_was_done(codec: Codec) -> None:
    with serving(make_engine(codec), codec) as running:
        body = {**GREEDY, "prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}
        assert running.post(COMPLETIONS, {**body, "n": 2}).status_code == 200
        assert running.post(COMPLETIONS, {**body, "n": 0}).status_code == 400
        assert running.get("/secret").status_code == 404
        numbers = running.numbers()
        assert numbers["yafsdp_like_http_responses_total,/v1/completions,200"] == 1
        assert numbers["yafsdp_like_http_responses_total,/v1/completions,400"] == 1
        assert numbers["yafsdp_like_http_responses_total,none,404"] == 1  # never a path that a client made up
        assert numbers["yafsdp_like_generated_tokens_total"] == 10
        assert numbers["yafsdp_like_prompt_tokens_total"] == len(codec.encode(PROMPT))
        assert numbers["yafsdp_like_finished_total,length"] == 2
        assert numbers["yafsdp_like_time_to_first_token_seconds_count"] == 2
        assert numbers["yafsdp_like_time_between_tokens_seconds_count"] == 8
        assert numbers["yafsdp_like_request_seconds_count"] == 2
        assert numbers["yafsdp_like_engine_num_running"] == 0
        assert numbers["yafsdp_like_engine_num_tokens_drawn"] >= 10
        assert numbers["yafsdp_like_engine_device_busy_seconds"] > 0
        assert 0 <= numbers["yafsdp_like_engine_device_waiting_share"] < 1


def test_every_figure_of_the_engine_is_explained() -> None:
    """Prevents: help that says a metric's name again, or figures that no metric has."""
    named = {field.name for field in dataclasses.fields(Metrics)}
    assert named == set(ENGINE_HELP)
    assert not [name for name, words in ENGINE_HELP.items() if name.replace("_", " ") in words.lower()]


def test_two_servers_of_one_process_count_for_themselves(plain: Running, codec: Codec) -> None:
    """Prevents the default registry of the process, which has room for one."""
    with serving(make_engine(codec), codec) as running:
        assert "yafsdp_like_http_responses_total,/v1/models,200" not in running.numbers()


def test_a_key_is_asked_for_where_there_is_one(codec: Codec) -> None:
    with serving(make_engine(codec), codec, api_key="sésame") as running:
        for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "Basic none"}):
            answer = running.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        known = {"authorization": "Bearer sésame".encode()}
        assert running.get("/v1/models", headers=known).status_code == 200
        assert (running.get("/health").status_code, running.get("/metrics").status_code) == (200, 200)
        with pytest.raises(openai.AuthenticationError):
            running.client().models.list()
