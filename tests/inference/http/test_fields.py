"""Fields that clients of other servers send: honoured, silently left out, or named in a header."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from tests.inference.http.servers import CHATS, COMPLETIONS, GREEDY, JSON, MODEL, PROMPT, Served
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.engine.request import FinishReason, RequestOutput, Token
from yafsdp_like.inference.http.bodies import ChatBody, CompletionBody
from yafsdp_like.inference.http.errors import ApiError
from yafsdp_like.inference.http.foreign_fields import MAX_NAMED, NEUTRAL, SILENT
from yafsdp_like.inference.http.protocol import DEFAULT_MAX_TOKENS, RequestParser, ServerOptions
from yafsdp_like.inference.http.responses import ParsedRequest
from yafsdp_like.inference.text.codec import Codec

USER = {"role": "user", "content": "Hi"}
FORGED = "<|endoftext|>"
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "<|endoftext|>"}'}}
TOOL_TEMPLATE = """
{%- for message in messages %}
{{- message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %} calls {{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor %}
{%- if message.role == 'tool' %} for {{ message.tool_call_id }}{% endif %}{{ '\\n' }}
{%- endfor %}
{%- if mood is defined %}mood {{ mood }}{{ '\\n' }}{% endif %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def parser_of(codec: Codec, max_seq_len: int = 256, **options: Any) -> RequestParser:
    told = ServerOptions(model_name=MODEL, vocab_size=codec.vocab_size, max_seq_len=max_seq_len, **options)
    return RequestParser(codec, told)


def completion(parser: RequestParser, **fields: Any) -> ParsedRequest:
    return parser.read(CompletionBody, json.dumps({"model": MODEL, "prompt": PROMPT, **fields}).encode())


def chat(parser: RequestParser, messages: Sequence[dict[str, Any]], **fields: Any) -> ParsedRequest:
    return parser.read(ChatBody, json.dumps({"model": MODEL, "messages": messages, **fields}).encode())


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.load(write_tokenizer(tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE))


# --- what is not known here ---


def test_fields_of_other_servers_that_ask_for_nothing_are_left_out_silently(codec: Codec) -> None:
    parser = parser_of(codec, strict=True)
    fields = {name: values[0] for name, values in NEUTRAL.items() if name != "echo"}
    assert completion(parser, **fields).ignored == ()
    assert completion(parser, **dict.fromkeys(SILENT, "x"), zzz=None).ignored == ()
    assert chat(parser, [USER], **{name: values[-1] for name, values in NEUTRAL.items()}).ignored == ()


def test_true_is_not_one(codec: Codec) -> None:
    assert completion(parser_of(codec), repeat_penalty=True, detokenize=1).ignored == ("repeat_penalty", "detokenize")


def test_other_fields_are_named_in_a_header_or_refused_where_the_server_is_strict(small: Served, codec: Codec) -> None:
    odd = {"temprature": 1, "use_beam_search": True, "\ud83d\r\nx": 1, "stream_options": {"zzz": 2}, "stream": True}
    for path, fields in ((COMPLETIONS, {"prompt": "x"}), (CHATS, {"messages": [{**USER, "mood": "bad"}]})):
        body = json.dumps({**GREEDY, **odd, **fields})
        answer = small.running.post(path, content=body, headers=JSON)
        named = answer.headers["x-ignored-fields"].split(", ")
        assert (answer.status_code, named[:2], named[3]) == (
            200,
            ["temprature", "use_beam_search"],
            "stream_options.zzz",
        )
        assert ("messages[0].mood" in named) == (path == CHATS)
        whole = small.running.post(path, {**GREEDY, **fields, "temprature": 1})
        assert whole.headers["x-ignored-fields"].startswith("temprature")
        known: Any = {"prompt": "x"} if path == COMPLETIONS else {"messages": [USER]}
        assert "x-ignored-fields" not in small.running.post(path, {**GREEDY, **known}).headers
    many = small.running.post(COMPLETIONS, {**GREEDY, "prompt": "x", **{f"z{n}": 1 for n in range(50)}})
    assert len(many.headers["x-ignored-fields"].split(", ")) == MAX_NAMED
    for fields in ({"temprature": 1}, {"stream": True, "stream_options": {"zzz": 2}}):
        with pytest.raises(ApiError, match="no such field is known here"):
            completion(parser_of(codec, strict=True), **fields)
    with pytest.raises(ApiError, match=r"messages\[0\].mood: no such field"):
        chat(parser_of(codec, strict=True), [{**USER, "mood": "bad"}])


def test_who_may_not_say_how_urgent_a_request_is_is_told_so(codec: Codec) -> None:
    asked = completion(parser_of(codec), priority=-5)
    assert (asked.ignored, asked.choices[0].request.priority) == (("priority",), 0)
    asked = completion(parser_of(codec, priorities=True), priority=-5)
    assert (asked.ignored, asked.choices[0].request.priority) == ((), 5)


# --- tokens ---


def test_as_many_tokens_are_generated_as_fit(small: Served) -> None:
    prompt = list(small.codec.encode(PROMPT))
    body = {**GREEDY, "prompt": prompt, "max_tokens": 10**6, "ignore_eos": True}
    answer = small.running.post(COMPLETIONS, body).json()
    assert answer["usage"]["total_tokens"] == 256
    assert answer["choices"][0]["finish_reason"] == "length"


def test_no_token_is_generated_where_only_the_prompt_is_asked_for(small: Served) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 0, "echo": True}
    answer = small.running.post(COMPLETIONS, body).json()
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == (PROMPT, 0)
    assert answer["choices"][0]["finish_reason"] == "length"
    streamed = small.running.post(COMPLETIONS, {**body, "stream": True}).text
    pieces = [json.loads(line[6:]) for line in streamed.split("\n\n") if line and line[6:] != "[DONE]"]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == PROMPT


def test_top_k_of_minus_one_is_all(codec: Codec) -> None:
    sampling = completion(parser_of(codec), top_k=-1, temperature=0.5).choices[0].request.sampling
    assert (sampling.top_k, sampling.temperature) == (0, 0.5)


def test_a_prompt_is_cut_to_its_last_tokens(codec: Codec) -> None:
    ids, parser = codec.encode(PROMPT), parser_of(codec, max_seq_len=32)
    assert completion(parser, truncate_prompt_tokens=3).choices[0].request.prompt == ids[-3:]
    long = completion(parser, prompt=list(range(60)), truncate_prompt_tokens=-1, max_tokens=5)
    assert long.choices[0].request.prompt == tuple(range(33, 60))
    by_default = completion(parser, prompt=list(range(60)), truncate_prompt_tokens=-1).choices[0].request
    assert (by_default.prompt, by_default.max_tokens) == (tuple(range(44, 60)), DEFAULT_MAX_TOKENS)
    many = [{"role": "user", "content": PROMPT * 20}]
    for fields, max_tokens in (({"max_completion_tokens": 9}, 9), ({"max_tokens": 9}, 9), ({}, 1)):
        asked = chat(parser, many, truncate_prompt_tokens=-1, **fields).choices[0].request
        assert (len(asked.prompt), asked.max_tokens) == (32 - max_tokens, max_tokens)
    assert chat(parser, [USER], truncate_prompt_tokens=2).num_prompt_tokens == 2


def test_of_a_prompt_that_is_cut_only_what_is_left_is_said_again(small: Served) -> None:
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1, "truncate_prompt_tokens": 3}
    (choice,) = small.running.post(COMPLETIONS, body).json()["choices"]
    left = small.codec.encode(PROMPT)[-3:]
    assert choice["text"] == small.codec.decode(left)
    assert choice["logprobs"]["text_offset"] == small.codec.offsets_of(left, choice["text"])


def test_special_tokens_before_a_prompt_can_be_left_out(codec: Codec) -> None:
    plain = completion(parser_of(codec), add_special_tokens=False).choices[0].request.prompt
    assert plain == codec.encode(PROMPT, add_special_tokens=False)


def test_a_stop_token_ends_the_text_and_is_shown_where_asked_for(small: Served) -> None:
    prompt = small.codec.encode(PROMPT)
    ids, _ = small.ask(prompt)
    stop = next(token for token in ids[3:] if small.codec.decode([token]).strip())
    expected = ids[: ids.index(stop)]
    body = {**GREEDY, "prompt": PROMPT, "stop_token_ids": [stop], "return_token_ids": True}
    (hidden,) = small.running.post(COMPLETIONS, body).json()["choices"]
    (shown,) = small.running.post(COMPLETIONS, {**body, "include_stop_str_in_output": True}).json()["choices"]
    assert (hidden["finish_reason"], hidden["token_ids"]) == ("stop", [*expected, stop])
    assert hidden["prompt_token_ids"] == list(prompt)
    before = small.codec.decode(prompt)
    assert hidden["text"] == small.codec.decode([*prompt, *expected])[len(before) :]
    assert shown["text"] == small.codec.decode([*prompt, *expected, stop])[len(before) :]


def test_a_stop_string_is_shown_where_asked_for(small: Served) -> None:
    _, text = small.ask(small.codec.encode(PROMPT))
    stop = text[4:6]
    body = {**GREEDY, "prompt": PROMPT, "stop": stop, "include_stop_str_in_output": True}
    (choice,) = small.running.post(COMPLETIONS, body).json()["choices"]
    assert choice["text"] == text[: text.index(stop) + len(stop)]


@pytest.mark.parametrize("is_skipped", [True, False])
def test_special_tokens_are_said_where_asked_for(codec: Codec, is_skipped: bool) -> None:
    (choice,) = completion(parser_of(codec), skip_special_tokens=is_skipped).choices
    tokens = tuple(map(Token, (*codec.encode("fox", False), *codec.encode(FORGED, False), *codec.encode("dog", False))))
    piece = choice.transcript.push(RequestOutput(choice.request.id, tokens, FinishReason.LENGTH))
    assert piece.text == ("foxdog" if is_skipped else f"fox{FORGED}dog")


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_ids_of_a_stream_are_those_of_the_whole(small: Served, path: str) -> None:
    body = {**GREEDY, "return_token_ids": True, **({"prompt": PROMPT} if path == COMPLETIONS else {"messages": [USER]})}
    (whole,) = small.running.post(path, body).json()["choices"]
    streamed = small.running.post(path, {**body, "stream": True}).text
    pieces = [json.loads(line[6:])["choices"][0] for line in streamed.split("\n\n") if line and line[6:] != "[DONE]"]
    assert pieces[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [token for piece in pieces for token in piece.get("token_ids", [])] == whole["token_ids"]


def test_what_may_be_drawn_is_what_a_request_says(small: Served) -> None:
    prompt = small.codec.encode(PROMPT)
    ids, _ = small.ask(prompt, stop_tokens=frozenset())
    body = {**GREEDY, "prompt": PROMPT, "max_tokens": 6, "return_token_ids": True, "ignore_eos": True}

    def drawn(**fields: Any) -> list[int]:
        answer = small.running.post(COMPLETIONS, {**body, **fields})
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        found: list[int] = choice["token_ids"]
        return found

    assert drawn(logit_bias={"7": 100, "8": -100}) == [7] * 6
    assert set(drawn(allowed_token_ids=[20, 30])) <= {20, 30}
    assert ids[0] not in drawn(logit_bias={ids[0]: -100})
    words = {token: small.codec.decode([token]) for token in ids[:6]}
    bad = next(token for token, word in words.items() if small.codec.encode(word, add_special_tokens=False) == (token,))
    assert bad not in drawn(bad_words=[words[bad]])
    stopped = {"ignore_eos": False, "stop_token_ids": [ids[0]]}
    assert drawn(**stopped) == ids[:1]
    assert ids[0] not in drawn(**stopped, min_tokens=4)[:4]


def test_a_request_without_limits_has_none(codec: Codec) -> None:
    """Prevents: steps that draw twice for nothing."""
    neutral = {"logit_bias": {}, "min_tokens": 0, "bad_words": [], "allowed_token_ids": None}
    assert completion(parser_of(codec), **neutral).choices[0].request.limits is None


# --- conversations ---


def test_calls_of_tools_and_their_results_reach_the_template_as_text(with_tools: Codec) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant"},
    ]
    (choice,) = chat(parser_of(with_tools), messages).choices
    control = with_tools.encode(FORGED)[-1]
    assert control not in choice.request.prompt[1:]  # what a call says is no control token
    text = with_tools.decode(choice.request.prompt, skip_special_tokens=False)
    assert text.removeprefix("<|startoftext|>") == (
        'user: Hi\nassistant:  calls add {"a": 1, "b": "<|endoftext|>"}\ntool: 3 for c1\nassistant: \nassistant:'
    )


def test_variables_reach_the_template_and_the_last_message_can_go_on(with_tools: Codec) -> None:
    parser = parser_of(with_tools)

    def text_of(messages: Sequence[dict[str, Any]], **fields: Any) -> str:
        return with_tools.decode(chat(parser, messages, **fields).choices[0].request.prompt)

    assert text_of([USER], chat_template_kwargs={"mood": "good"}) == "user: Hi\nmood good\nassistant:"
    assert text_of([USER], add_generation_prompt=False) == "user: Hi\n"
    begun = [USER, {"role": "assistant", "content": "Well"}]
    assert text_of(begun, continue_final_message=True) == "user: Hi\nassistant: Well"
    with pytest.raises(ApiError, match="exclude each other"):
        chat(parser, begun, continue_final_message=True, add_generation_prompt=True)


def test_only_assistants_may_say_nothing(codec: Codec) -> None:
    with pytest.raises(ApiError, match=r"messages\[0\].content: Field required"):
        chat(parser_of(codec), [{"role": "user", "content": None}])
