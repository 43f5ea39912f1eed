"""Answers that must be JSON, of a schema or of a grammar: they always parse, whatever the model would rather say."""

import json
import random
import re
import sys
from typing import Any

import pytest

from tests.inference.http.servers import CHATS, COMPLETIONS, GREEDY, MODEL, PROMPT, Served
from tests.inference.http.test_fields import completion, parser_of
from yafsdp_like.inference.http.errors import ApiError
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.grammar import MAX_GRAMMAR_LENGTH

pytest.importorskip("llguidance")
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of texts that end soon: every string, list and number is bounded."""
    kinds = ["string", "integer", "boolean", "null", "enum", *(["object", "array", "any"] if depth < 2 else [])]
    match draw.choice(kinds):
        case "string":
            return {"type": "string", "maxLength": draw.randint(0, 4)}
        case "integer":
            low = draw.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 20)}
        case "enum":
            return {"enum": draw.sample(["a", "b c", 1, -2.5, None, True, 'q"'], draw.randint(1, 4))}
        case "object":
            names = draw.sample(["a", "b", "long name", 'odd "name"'], draw.randint(0, 3))
            properties = {name: random_schema(draw, depth + 1) for name in names}
            required = [name for name in names if draw.random() < 0.7]
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        case "array":
            return {"type": "array", "items": random_schema(draw, depth + 1), "maxItems": draw.randint(0, 2)}
        case "any":
            return {"anyOf": [random_schema(draw, depth + 1) for _ in range(2)]}
        case simple:
            return {"type": simple}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of a schema that `random_schema` makes."""
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema:
        return any(value == each and type(value) is type(each) for each in schema["enum"])
    match schema["type"]:
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "array":
            return len(value) <= schema["maxItems"] and all(fits(each, schema["items"]) for each in value)
    return set(schema["required"]) <= value.keys() <= schema["properties"].keys() and all(
        fits(each, schema["properties"][name]) for name, each in value.items()
    )


def check_schemas(served: Served, seed: int, count: int) -> None:
    draw = random.Random(seed)
    for number in range(count):
        schema = random_schema(draw)
        asked = {"model": MODEL, "prompt": "x", "max_tokens": 250, "seed": number, "temperature": 0.7}
        (choice,) = served.running.post(COMPLETIONS, {**asked, "guided_json": schema}).json()["choices"]
        if choice["finish_reason"] == "stop":  # white space between values is the model's
            assert fits(json.loads(choice["text"]), schema), (schema, choice)
        else:
            assert choice["text"].strip() == "" or re.search(r"\s{8}", choice["text"]), (schema, choice)


def test_answers_are_json_of_random_schemas(small: Served) -> None:
    check_schemas(small, seed=0, count=12)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_answers_are_json_of_a_thousand_random_schemas(small: Served) -> None:
    check_schemas(small, seed=1, count=1000)


def test_what_a_chat_must_be_is_said_in_several_ways(small: Served) -> None:
    body = {**GREEDY, **HELLO, "max_tokens": 200}
    as_openai = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    for fields in ({"response_format": as_openai}, {"structured_outputs": {"json": PERSON}}, {"guided_json": PERSON}):
        answer = small.running.post(CHATS, {**body, **fields}).json()
        (choice,) = answer["choices"]
        found = json.loads(choice["message"]["content"])
        assert (found.keys(), choice["finish_reason"]) == ({"name", "age"}, "stop")
    for fields, pattern in (
        ({"guided_regex": "[ab]{3}-[0-9]"}, "[ab]{3}-[0-9]"),
        ({"guided_choice": ["yes", "no way"]}, "yes|no way"),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/ "y"'}}, "x[0-9]y"),
        ({"guided_grammar": 'root ::= "p" | "q"'}, "p|q"),
    ):
        (choice,) = small.running.post(CHATS, {**body, **fields}).json()["choices"]
        assert re.fullmatch(pattern, choice["message"]["content"]), choice


def test_a_client_gets_what_it_can_parse(small: Served) -> None:
    response = small.client.responses.create(
        model=MODEL,
        input="Hi",
        temperature=0,
        max_output_tokens=200,
        text={"format": {"type": "json_schema", "name": "person", "schema": PERSON}},
    )
    assert json.loads(response.output_text).keys() == {"name", "age"}
    chunks = small.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        temperature=0,
        max_tokens=200,
        stream=True,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert json.loads(text).keys() == {"name", "age"}


def test_choices_of_one_grammar_do_not_share_its_state(small: Served) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "n": 6, "temperature": 1.0, "seed": 3, "guided_regex": "[a-z]{4}[0-9]{2}"}
    choices = small.running.post(COMPLETIONS, {**body, "max_tokens": 20}).json()["choices"]
    assert all(re.fullmatch("[a-z]{4}[0-9]{2}", choice["text"]) for choice in choices)
    assert len({choice["text"] for choice in choices}) > 1


def test_what_cannot_be_served_says_what_to_do(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ApiError, match="tensor parallel"):
        completion(parser_of(codec, has_grammars=False), guided_regex="a")
    with pytest.raises(ApiError, match=f"at most {MAX_GRAMMAR_LENGTH} characters"):
        completion(parser_of(codec), guided_regex="a" * (MAX_GRAMMAR_LENGTH + 1))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ApiError, match=r"pip install 'yafsdp_like\[structured\]'"):
        completion(parser_of(codec), response_format={"type": "json_object"})
