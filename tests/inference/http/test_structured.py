"""Answers that must be JSON, of a schema or of a grammar: they always parse, whatever the model would rather say."""

import json
import random
import re
import sys
from typing import Any

import pytest

from tests.inference.http.servers import CHATS, COMPLETIONS, GREEDY, MODEL, PROMPT, Served
from tests.inference.http.test_fields import completion, parser_of
from yafsdp_like.inference.engine.request import GrammarError
from yafsdp_like.inference.http.errors import ApiError
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.text.grammar import MAX_GRAMMAR_LENGTH, MatcherState

pytest.importorskip("llguidance")
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


SCALARS: tuple[Any, ...] = ("a", "b c", 1, -2.5, None, True, 'q"', "é\\n")


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of texts that end soon: every string, list and number is bounded."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    match draw.choice([*kinds, *(["object", "array", "any", "map"] if depth < 2 else [])]):
        case "string":
            least = draw.randint(0, 2)
            return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 3)}
        case "pattern":
            return {"type": "string", "pattern": draw.choice(["^[ab]{1,3}$", "^x?[0-9]{2}$", "^(yes|no)$"])}
        case "integer":
            low = draw.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 20)}
        case "number":
            return {"type": "number", "minimum": -1.5, "maximum": 9.25}
        case "enum":
            return {"enum": draw.sample(SCALARS, draw.randint(1, 4))}
        case "const":
            return {"const": draw.choice(SCALARS)}
        case "object":
            names = draw.sample(["a", "b", "long name", 'odd "name"', "é\n"], draw.randint(0, 3))
            properties = {name: random_schema(draw, depth + 1) for name in names}
            required = [name for name in names if draw.random() < 0.7]
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        case "map":
            return {"type": "object", "additionalProperties": random_schema(draw, 2)}
        case "array":
            least = draw.randint(0, 1)
            items = random_schema(draw, depth + 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + draw.randint(0, 2)}
        case "any":
            return {"anyOf": [random_schema(draw, depth + 1) for _ in range(2)]}
        case simple:
            return {"type": simple}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of a schema that `random_schema` makes."""
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        wanted = schema.get("enum", [schema.get("const")])
        return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in wanted)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match schema["type"]:
        case "string":
            least, most = schema.get("minLength", 0), schema.get("maxLength", 99)
            is_string = isinstance(value, str) and least <= len(value) <= most
            return is_string and ("pattern" not in schema or re.search(schema["pattern"], value) is not None)
        case "integer" | "number":
            is_kind = is_number and (schema["type"] == "number" or value == int(value))
            return is_kind and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "array":
            is_array = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
            return is_array and all(fits(each, schema["items"]) for each in value)
    if not isinstance(value, dict):
        return False
    properties, others = schema.get("properties", {}), schema["additionalProperties"]
    return set(schema.get("required", ())) <= value.keys() and all(
        fits(each, properties[name]) if name in properties else others is not False and fits(each, others)
        for name, each in value.items()
    )


def check_schemas(served: Served, seed: int, count: int) -> None:
    """Where the model comes to an end; a text may be cut off within a map, a string of one, or white space."""
    draw, num_whole = random.Random(seed), 0
    for number in range(count):
        schema = random_schema(draw)
        asked = {"model": MODEL, "prompt": "x", "max_tokens": 250, "seed": number, "temperature": 0.7}
        answer = served.running.post(COMPLETIONS, {**asked, "guided_json": schema})
        assert answer.status_code == 200, (schema, answer.text)
        (choice,) = answer.json()["choices"]
        if choice["finish_reason"] == "stop":
            num_whole += 1
            assert fits(json.loads(choice["text"]), schema), (schema, choice)
        else:
            has_map = '"additionalProperties": {' in json.dumps(schema)
            is_long = re.search(r"\s{8}|[0-9]{20}", choice["text"])
            assert has_map or is_long or choice["text"].strip() == "", (schema, choice)
    assert num_whole > 0.8 * count


def test_answers_are_json_of_random_schemas(small: Served) -> None:
    check_schemas(small, seed=0, count=12)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_answers_are_json_of_a_thousand_random_schemas(small: Served) -> None:
    check_schemas(small, seed=1, count=1000)


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_too_complex_is_an_error_of_its_request_and_no_failure(small: Served, stream: bool) -> None:
    """Prevents: a server that fails for all because one client asks for one of thousands of texts, word by word."""
    texts = [f"choice number {number}" for number in range(2400)]
    body = {**GREEDY, "prompt": "x", "stream": stream}
    rules = "start: " + " | ".join(json.dumps(text) for text in texts)
    answer = small.running.post(COMPLETIONS, {**body, "guided_grammar": rules})
    assert answer.status_code == (200 if stream else 400)
    error = json.loads(answer.text.split("data: ")[-2] if stream else answer.text)["error"]
    assert error["code"] == "grammar_too_complex" and "max is 1000" in error["message"]
    (choice,) = small.running.post(COMPLETIONS, {**GREEDY, "prompt": "x", "guided_choice": texts}).json()["choices"]
    assert choice["text"] in texts
    small.running.check_idle()


def test_a_draft_behind_which_a_grammar_is_too_complex_is_not_reached_and_fails_no_request() -> None:
    class Broken:
        """A matcher that has run out of what it may do."""

        def deep_copy(self) -> Any:
            return self

        def is_stopped(self) -> bool:
            return False

        def consume_token(self, _: int) -> bool:
            return True

        def compute_bitmask(self) -> bytes:
            return bytes(4)

        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "too much\nand more"

    state = MatcherState(Broken())
    assert state.allowed_after([1]) is None
    with pytest.raises(GrammarError, match=r"too much$"):
        state.allowed()


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
