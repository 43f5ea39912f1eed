"""Tools: what models of the served families write becomes calls, in one piece and in a stream."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.http.servers import CHATS, MODEL, Served, served_with
from tests.inference.http.test_fields import chat, parser_of
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.engine.request import FinishReason, RequestOutput, Token
from yafsdp_like.inference.http.responses import ParsedRequest
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.tool_calls import ParsedCall, ToolCallParser, ToolFormat, calls_of, tool_format_of

USER = {"role": "user", "content": "Hi"}
TOOL = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
ADD = {"type": "function", "function": TOOL}
TEMPLATE = """{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}answer with <tool_call>: """
TEXTS: dict[str, tuple[ToolFormat, str, str, list[tuple[str, dict[str, Any]]]]] = {
    "one": ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [("add", {"a": 1})]),
    "two behind a text": (
        "hermes",
        'Well <b> <tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
        "Well <b>",
        [("f", {}), ("g", {})],
    ),
    "none": ("hermes", "a < b <tool", "a < b <tool", []),
    "no call": ("hermes", "<tool_call>oh</tool_call>!", "<tool_call>oh</tool_call>!", []),
    "not closed": ("hermes", '<tool_call>{"name": "f"}', "", [("f", {})]),
    "mistral": (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1]}}, {"name": "g"}]',
        "",
        [("f", {"x": [1]}), ("g", {})],
    ),
    "mistral, a text": ("mistral", "I say [TOOL", "I say [TOOL", []),
    "llama": (
        "llama",
        '<|python_tag|>{"name": "f", "parameters": {"x": "}"}}; {"name": "g"}',
        "",
        [("f", {"x": "}"}), ("g", {})],
    ),
    "llama, JSON that is no call": ("llama", '{"a": 1}', '{"a": 1}', []),
    "llama, a text": ("llama", "well {", "well {", []),
}


def parsed(parser: ToolCallParser, pieces: Sequence[str]) -> tuple[str, list[ParsedCall]]:
    """Content and calls of a text that comes in pieces, the last of which ends it."""
    found = [parser.push(piece, is_last=index == len(pieces) - 1) for index, piece in enumerate(pieces)]
    parts = [part for _, parts in found for part in parts]
    indexes = [part.index for part in parts]
    assert indexes == sorted(indexes)
    assert [part.index for part in parts if part.name] == [part.index for part in parts if part.id] == [*set(indexes)]
    return "".join(content for content, _ in found), calls_of(parts)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
BROKEN = [
    '{"name": "f"',
    '{"name": "f", "arguments": {"a": "}',
    '{"a": {}}',
    "</tool_call>",
    "<tool_call>",
    "[TOOL_CALLS]",
    "oh {",
    "]",
]


@st.composite
def answers(draw: st.DrawFn, format: ToolFormat) -> tuple[str, list[tuple[str, Any]]]:
    """A text, with its calls."""
    calls = draw(
        st.lists(st.tuples(st.text(min_size=1, max_size=6), st.dictionaries(st.text(max_size=4), VALUES)), max_size=3)
    )
    more = draw(st.sampled_from(["", ', "id": "x"', ', "extra": {"arguments": {"z": [1]}}']))
    key = draw(st.sampled_from(["arguments", "parameters"]))
    ascii, spaced = draw(st.booleans()), draw(st.sampled_from([None, 1]))
    dump = partial(json.dumps, ensure_ascii=ascii, indent=spaced)
    objects = [f'{{"name": {dump(name)}, "{key}": {dump(arguments)}{more}}}' for name, arguments in calls]
    joined = {
        "hermes": "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects),
        "mistral": f"[TOOL_CALLS] [{', '.join(objects)}]" if objects else "",
        "llama": "; ".join(objects),
        "json": (objects or [""])[0],
    }
    return joined[format], calls[:1] if format == "json" else calls


@pytest.mark.parametrize("format", ["hermes", "mistral", "llama", "json"])
@given(data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_calls_in_parts_are_the_same_however_the_text_is_cut(format: ToolFormat, data: st.DataObject) -> None:
    text, calls = data.draw(answers(format))
    ends = data.draw(st.sampled_from(["", *BROKEN]))
    begins = data.draw(st.sampled_from(["", "So: ", " \n"])) if format in ("hermes", "mistral") else ""
    text = begins + text + ends
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
    whole, cut = (parsed(ToolCallParser(format), each) for each in ([text], pieces))
    assert whole[0] == cut[0]
    assert [(call.name, call.arguments) for call in whole[1]] == [(call.name, call.arguments) for call in cut[1]]
    found = [(call.name, json.loads(call.arguments)) for call in whole[1][: len(calls)]]
    assert found == calls
    if not calls and not whole[1]:
        assert whole[0] == text
    if calls and not ends:
        assert whole[0].strip() == begins.strip()


def test_arguments_are_told_as_they_come() -> None:
    parser = ToolCallParser("hermes")
    text = '<tool_call>{"name": "f", "arguments": {"a": [1, {"b": "}"}]}}</tool_call>'
    told = [part for character in text[:-1] for part in parser.push(character, is_last=False)[1]]
    assert (told[0].name, told[0].arguments) == ("f", "{")
    assert "".join(part.arguments for part in told) == '{"a": [1, {"b": "}"}]}' and len(told) == 22
    assert {part.name for part in told[1:]} == {part.id for part in told[1:]} == {None}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_found_however_the_text_comes(name: str, size: int) -> None:
    format, text, content, expected = TEXTS[name]
    parser = ToolCallParser(format)
    said, calls = parsed(parser, [text[start : start + size] for start in range(0, len(text), size)])
    assert [(call.name, json.loads(call.arguments)) for call in calls] == expected
    assert said.strip() == content
    assert parser.num_calls == len(expected)
    assert all(call.id.isalnum() and len(call.id) == 9 for call in calls)  # as Mistral's template wants them


def test_a_template_says_how_calls_are_written() -> None:
    assert tool_format_of("{{ tools }} <tool_call>") == "hermes"
    assert tool_format_of("{{ tools }} [TOOL_CALLS]") == "mistral"
    assert tool_format_of('{{ tools }} {"name": x, "parameters": y}') == "llama"
    assert [tool_format_of(template) for template in (None, "{{ messages }} <tool_call>", "{{ tools }}")] == [None] * 3


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.load(write_tokenizer(Path(tmp_path_factory.mktemp("tools")), TEMPLATE))


@pytest.fixture(scope="module")
def caller(with_tools: Codec) -> Iterator[Served]:
    with served_with(with_tools) as served:
        yield served


def said(parsed: ParsedRequest, codec: Codec, text: str) -> Iterator[RequestOutput]:
    """What an engine tells if it draws a text, token by token."""
    ids = [*codec.encode(text, add_special_tokens=False), min(codec.stop_tokens)]
    for token in ids:
        finish = FinishReason.STOP if token == ids[-1] else None
        yield RequestOutput(parsed.choices[0].request.id, (Token(token),), finish)


def test_a_chat_answers_with_calls_whole_and_streamed(with_tools: Codec) -> None:
    text = 'So: <tool_call>{"name": "add", "arguments": {"a": 4}}</tool_call>'
    whole, streamed = (chat(parser_of(with_tools), [USER], tools=[ADD], stream=stream) for stream in (False, True))
    assert with_tools.decode(whole.choices[0].request.prompt).startswith("add ")
    for output in said(whole, with_tools, text):
        whole.choices[0].add(whole.choices[0].transcript.push(output))
    (choice,) = whole.format.body(whole)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"].strip()) == ("tool_calls", "So:")
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 4})
    (asked,) = streamed.choices
    deltas = [
        event["choices"][0]
        for output in said(streamed, with_tools, text)
        for event in streamed.format.part_events(streamed, asked, asked.transcript.push(output))
    ]
    content = "".join(delta["delta"].get("content", "") for delta in deltas)
    first, *told = [each for delta in deltas for each in delta["delta"].get("tool_calls", [])]
    assert (content.strip(), deltas[-1]["finish_reason"]) == ("So:", "tool_calls")
    assert (first["index"], first["function"]["name"], first["type"]) == (0, "add", "function")
    assert len(told) > 1 and all(each.keys() == {"index", "function"} for each in told)
    arguments = "".join(each["function"]["arguments"] for each in (first, *told))
    assert arguments == call["function"]["arguments"]


def test_a_model_is_told_of_no_tools_where_none_may_be_called(with_tools: Codec) -> None:
    parsed = chat(parser_of(with_tools), [USER], tools=[ADD], tool_choice="none")
    assert not with_tools.decode(parsed.choices[0].request.prompt).startswith("add ")
    assert parsed.choices[0].tools is None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_must_be_made_is_made(caller: Served, choice: Any) -> None:
    pytest.importorskip("llguidance")
    body = {
        "model": MODEL,
        "messages": [USER],
        "temperature": 0,
        "max_tokens": 200,
        "tools": [ADD],
        "tool_choice": choice,
    }
    answer = caller.running.post(CHATS, body)
    assert answer.status_code == 200, answer.text
    (found,) = answer.json()["choices"]
    assert found["finish_reason"] == "tool_calls"
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    assert 0 <= json.loads(call["function"]["arguments"])["a"] <= 9
    assert found["message"]["content"] is None


def test_openais_client_puts_streamed_arguments_together(caller: Served) -> None:
    pytest.importorskip("llguidance")
    tool: Any = {"type": "function", "function": {**TOOL, "strict": True}}
    asked: dict[str, Any] = {"model": MODEL, "messages": [USER], "temperature": 0, "max_tokens": 200}
    asked |= {"tools": [tool], "tool_choice": "required"}
    (whole,) = caller.client.chat.completions.create(**asked).choices[0].message.tool_calls
    with caller.client.chat.completions.stream(**asked) as stream:
        deltas = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (choice,) = stream.get_final_completion().choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, call.function.arguments) == ("add", whole.function.arguments)
    assert call.function.parsed_arguments == json.loads(whole.function.arguments)
    assert "".join(deltas) == whole.function.arguments and len(deltas) > 2


SELF = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
KIN = {"type": "object", "properties": {"kid": SELF}, "required": ["kid"], "additionalProperties": False}
DRAFT_04 = "http://json-schema.org/draft-04/schema#"


def defining(kind: str, **more: str) -> dict[str, Any]:
    properties = {"a": {"$ref": "#/$defs/A"}, "b": {"$ref": "#/properties/a"}}
    schema = {"type": "object", "properties": properties, "$defs": {"A": {"type": kind}}, "required": ["a", "b"]}
    return {**schema, "additionalProperties": False, **more}


def is_call_of(schemas: list[dict[str, Any]], codec: Codec, text: str) -> bool:
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": each}} for i, each in enumerate(schemas)]
    (choice,) = chat(parser_of(codec), [USER], tools=tools, tool_choice="required").choices
    grammar: Any = choice.request.limits.grammar
    tokens = [*codec.encode(text, add_special_tokens=False), min(codec.stop_tokens)]
    return bool(grammar.start()._matcher.validate_tokens(tokens) == len(tokens))


def test_a_reference_in_a_tools_schema_is_to_that_schema_and_not_to_the_call(with_tools: Codec) -> None:
    pytest.importorskip("llguidance")
    inner = '{"name":"f0","arguments":{"kid":null}}'
    assert is_call_of([KIN], with_tools, '{"name":"f0","arguments":{"kid":{"kid":null}}}')
    assert not is_call_of([KIN], with_tools, f'{{"name":"f0","arguments":{{"kid":{inner}}}}}')
    for more in ({}, {"$schema": DRAFT_04}, {"$id": "urn:same"}):
        schemas = [defining("integer", **more), defining("boolean", **more)]
        for name, value, fits in (("f0", 1, True), ("f0", "true", False), ("f1", 1, False), ("f1", "true", True)):
            text = f'{{"name":"{name}","arguments":{{"a":{value},"b":{value}}}}}'
            assert is_call_of(schemas, with_tools, text) == fits, (more, text)
