"""What may stand in bodies, in the words of OpenAI's clients.

Owns the fields of bodies and their values. What a body may cost is body_limits.py's, what becomes of it protocol.py's.
Needs pydantic, which comes with FastAPI.

[Note: fields]
A field is honoured, harmless, refused, or ignored. Harmless fields say nothing about the text; what OpenAI's protocol
has and this server has not is refused by name where it would change the text. Of fields that nobody knows here
foreign_fields.py says which ask for nothing; the others are ignored, and the answer's header names them, or they are
refused where the server is strict.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from yafsdp_like.inference.http.content_parts import IMAGE, as_content, for_template
from yafsdp_like.inference.http.errors import UNSUPPORTED, invalid, shorten
from yafsdp_like.kernels.sampling_params import MAX_BIASES, MAX_LOGPROBS, SamplingParams

MAX_STOP_STRINGS, MAX_STOP_STRING_LENGTH = 16, 256
TEXT_KINDS = "json", "regex", "choice", "grammar"
HARMLESS_OUTPUTS = "whitespace_pattern", "disable_any_whitespace", "disable_fallback", "disable_additional_properties"
MAX_BIAS, MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH = 100, 256, 256
MAX_STOP_TOKENS, MAX_TOOLS, MAX_TOOL_CALLS, MAX_TEMPLATE_KWARGS = 128, 128, 128, 32
SAMPLED = {item.name for item in fields(SamplingParams)} - {"seed"}


# --- values of fields ---


def _unsupported(instead: str, *harmless: Any) -> AfterValidator:
    """[Note: fields] What is not honoured: what to do instead, and the values that say what is done anyway."""

    def check(value: Any) -> Any:
        if value is not None and value not in harmless:
            raise PydanticCustomError(UNSUPPORTED, "{instead}", {"instead": instead})
        return value

    return AfterValidator(check)


def _as_prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value) or all(_are_ids(item) for item in value):
            return value
    raise ValueError("expected a string, a list of strings, a list of token ids or a list of such lists, none empty")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int}


def _as_stops(value: Any) -> list[str]:
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if (
        isinstance(strings, list)
        and len(strings) <= MAX_STOP_STRINGS
        and all(isinstance(string, str) and 0 < len(string) <= MAX_STOP_STRING_LENGTH for string in strings)
    ):
        if any("\ud800" <= character <= "\udfff" for string in strings for character in string):
            raise ValueError("must be Unicode, found half a surrogate pair")
        return strings
    raise ValueError(
        f"expected a string or at most {MAX_STOP_STRINGS} strings, of 1 to {MAX_STOP_STRING_LENGTH} characters each"
    )


def _as_biases(value: Any) -> dict[int, float]:
    """By token, of which JSON has only the name."""
    if value is None:
        return {}
    if isinstance(value, dict) and len(value) <= MAX_BIASES:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            biases = {int(token): bias + 0.0 for token, bias in value.items()}
            if all(abs(bias) <= MAX_BIAS for bias in biases.values()):
                return biases
    raise ValueError(f"expected at most {MAX_BIASES} token ids, each with a bias from -{MAX_BIAS} to {MAX_BIAS}")


def _as_format(value: Any) -> Any:
    """None for plain text."""
    if value is None or value == {"type": "text"}:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_object":
        return value
    if kind == "json_schema":
        described = value.get("json_schema", value)  # /v1/responses has no object inside
        if isinstance(described, dict) and isinstance(described.get("schema"), dict):
            return {"type": kind, "schema": described["schema"]}
        raise ValueError("expected an object `schema` in json_schema")
    raise ValueError(f"expected a type text, json_object or json_schema, found {shorten(kind)}")


# --- bodies ---


class Body(BaseModel):
    """JSON is taken at its word: "1" is no number. Fields that are not known were left out before."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Any = None  # harmless: there is none


def _call_schema(index: int, function: dict[str, Any]) -> dict[str, Any]:
    """A call of a function. Its schema gets an id of its own, so that `#` in a `$ref` is still that schema.

    The draft that it names is left out: all are read alike, but the oldest has another name for ids.
    """
    arguments = {**function.get("parameters", {"type": "object"}), "$id": f"urn:tool:{index}"}
    arguments.pop("$schema", None)
    properties = {"name": {"const": function["name"]}, "arguments": arguments}
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


class AnyBody(Body):
    """What completions and chats have in common. None is what a field is that was not sent."""

    model: str
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=0)
    stop: Annotated[list[str], BeforeValidator(_as_stops)] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    # Beyond OpenAI's.
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)  # prefixes are shared with those who know it
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_TOKENS)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)  # to the last ones; -1: to what fits
    add_special_tokens: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), lt=2**31)  # lower first, as vLLM has it
    return_token_ids: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_as_biases)] = {}
    min_tokens: int | None = Field(None, ge=0)
    bad_words: list[str] | None = Field(None, max_length=MAX_BAD_WORDS)
    allowed_token_ids: list[int] | None = None
    # [Note: fields] Harmless.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    # What the text must be, one of these.
    response_format: Annotated[dict[str, Any] | None, BeforeValidator(_as_format)] = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """Functions of which the answer must be a call."""
        return []

    @property
    def num_each(self) -> int:
        """Choices of one prompt."""
        return self.n or 1

    def check(self) -> None:
        """What no single field can tell. Raises ApiError for a combination that is not served."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "is only for stream: true")
        if self.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens", "must be -1 or at least 1, found 0")
        if self.allowed_token_ids == []:
            raise invalid("allowed_token_ids", "must have at least one token, found none")
        if any(not 0 < len(word) <= MAX_BAD_WORD_LENGTH for word in self.bad_words or ()):
            raise invalid("bad_words", f"a word must have from 1 to {MAX_BAD_WORD_LENGTH} characters")

    def wanted_text(self) -> tuple[str, str, Any] | None:
        """(the field that says what the text must be, what kind of description it is, the description), if any does.

        Raises ApiError for several, or one that is not understood.
        """
        found = list[tuple[str, str, Any]]()
        if self.response_format is not None:
            found.append(("response_format", "json", self.response_format.get("schema", {"type": "object"})))
        for kind in TEXT_KINDS:
            if (value := getattr(self, f"guided_{kind}")) is not None:
                found.append((f"guided_{kind}", kind, value))
        for kind, value in (self.structured_outputs or {}).items():
            if value is None or value is False or kind in HARMLESS_OUTPUTS:
                continue
            if kind not in (*TEXT_KINDS, "json_object"):
                raise invalid("structured_outputs", f"expected one of {', '.join(TEXT_KINDS)}, found {shorten(kind)}")
            as_schema = {"type": "object"} if kind == "json_object" else value
            found.append(("structured_outputs", "json" if kind == "json_object" else kind, as_schema))
        if forced := self.forced_tools:
            found.append(("tool_choice", "json", {"anyOf": [_call_schema(*each) for each in enumerate(forced)]}))
        if len(found) > 1:
            raise invalid(found[1][0], f"and {found[0][0]} both say what the text must be: set one")
        return found[0] if found else None

    def sampling(self, choice: int, defaults: SamplingParams) -> SamplingParams:
        """How the choice of this index is drawn: with `seed` the same each time, and unlike its neighbours."""
        seed = secrets.randbits(63) if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63
        given = self.model_dump(include=SAMPLED, exclude_none=True)
        if self.top_k == -1:
            given["top_k"] = 0
        return replace(defaults, **given, seed=seed)


class CompletionBody(AnyBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: Annotated[Any, _unsupported("the model only continues a prompt; leave it out", "")] = None
    best_of: Any = None  # harmless where it is n

    def check(self) -> None:
        """Raise ApiError for a combination that is not served."""
        super().check()
        if self.best_of is not None and self.best_of != self.num_each:
            raise invalid("best_of", "answers are not ranked; leave it out, or say what n says", UNSUPPORTED)
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise invalid("max_tokens", "0 generates nothing, which only echo and prompt_logprobs make an answer of")

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Of the most probable tokens at each place of a prompt; None: nothing is told of it."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


class ToolFunction(Body):
    """What an assistant called, and with which arguments: JSON, as a text or as it is."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Body):
    """One call of a tool, as clients send it back."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None  # harmless: of a stream
    function: ToolFunction

    def for_template(self) -> dict[str, Any]:
        """Return what templates expect: arguments as an object, if they are one."""
        arguments = self.function.arguments
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                parsed = json.loads(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
        call = {"type": self.type, "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | list[dict[str, Any]] | None, BeforeValidator(as_content)] = None
    name: str | None = None  # of a tool; harmless elsewhere: templates do not show it
    tool_call_id: str | None = None
    # What assistants said, as clients send it back.
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS)] | None = None
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None

    @property
    def images(self) -> list[str]:
        """URLs of the images in it, in order."""
        parts = self.content if isinstance(self.content, list) else []
        return [part["url"] for part in parts if part["type"] == IMAGE]

    def for_template(self) -> dict[str, Any]:
        """Return what a template is given, which knows the older of two names of a role."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": for_template(self.content),
        }
        if self.role == "tool":
            more = {"name": self.name, "tool_call_id": self.tool_call_id}
            message |= {name: value for name, value in more.items() if value is not None}
        if self.role == "assistant" and self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


NO_TOOLS = "is the old name of tools; use these"
TEXT_ONLY = "only text is written; leave it out"


class ChatBody(AnyBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=MAX_TEMPLATE_KWARGS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    parallel_tool_calls: Any = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    # [Note: fields] Refused.
    functions: Annotated[Any, _unsupported(NO_TOOLS, [])] = None
    function_call: Annotated[Any, _unsupported(NO_TOOLS, "none", "auto")] = None
    modalities: Annotated[Any, _unsupported(TEXT_ONLY, ["text"])] = None
    audio: Annotated[Any, _unsupported(TEXT_ONLY)] = None
    prediction: Annotated[Any, _unsupported("nothing is predicted; leave it out")] = None
    reasoning_effort: Annotated[Any, _unsupported("there is no effort to choose; leave it out", "none")] = None
    verbosity: Annotated[Any, _unsupported("there is none to choose; leave it out", "medium")] = None
    web_search_options: Annotated[Any, _unsupported("nothing is searched; leave it out")] = None

    def check(self) -> None:
        """Raise ApiError for a combination that is not served."""
        super().check()
        for index, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                raise invalid(f"messages[{index}].content", "Field required")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid("continue_final_message", "and add_generation_prompt exclude each other")
        if 0 in (self.max_tokens, self.max_completion_tokens) and self.prompt_logprobs is None:
            raise invalid("max_tokens", "0 generates nothing, which only prompt_logprobs makes an answer of")
        self._check_tools()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid("max_tokens", "differs from max_completion_tokens, which replaces it: set only that one")

    def _check_tools(self) -> None:
        for index, tool in enumerate(self.tools or ()):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict):
                raise invalid(f"tools[{index}]", "expected an object of type function, and a function in it")
            if not isinstance(function.get("name"), str) or not isinstance(function.get("parameters", {}), dict):
                raise invalid(f"tools[{index}].function", "expected a name, and parameters as a schema")
        if self.tool_choice not in (None, "none", "auto") and not self.forced_tools:
            raise invalid("tool_choice", "names no function that is in tools")

    @property
    def images(self) -> list[str]:
        """URLs of all images, in order."""
        return [url for message in self.messages for url in message.images]

    @property
    def given_tools(self) -> list[dict[str, Any]]:
        """Tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """Functions of which the answer must be a call; [] where it need not be one."""
        functions = [tool["function"] for tool in self.tools or ()]
        if self.tool_choice == "required":
            return functions
        if not isinstance(self.tool_choice, dict):
            return []
        chosen = self.tool_choice.get("function")
        name = chosen.get("name") if isinstance(chosen, dict) else None
        return [function for function in functions if function["name"] == name]
