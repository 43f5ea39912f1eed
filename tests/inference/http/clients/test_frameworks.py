"""Frameworks that people build on, as their own documents say to call them: litellm, langchain, llama-index and others.

Each test is skipped where its package is not installed: `pip install -e '.[clients]'`.
"""

from __future__ import annotations

import asyncio
import gc
import json
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.inference.http.servers import MODEL, PROMPT, SECONDS, Served, served_with
from tests.inference.http.test_tools import ADD, TEMPLATE
from tests.inference.text.test_codec import write_tokenizer
from yafsdp_like.inference.text.codec import Codec

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]  # packages warn as they please
HELLO = "Hi"
SHORT = 12  # tokens of an answer
LONG = 200  # of one that a schema ends


class Sum(BaseModel):
    """What is to be added, and nothing else, so that a random model comes to an end."""

    model_config = ConfigDict(extra="forbid")
    a: int = Field(ge=0, le=9)
    b: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A small model whose chat template knows of tools."""
    codec = Codec.load(write_tokenizer(tmp_path_factory.mktemp("clients"), TEMPLATE))
    with served_with(codec) as served:
        yield served


@pytest.fixture(autouse=True)
def what_clients_leave_open() -> Iterator[None]:
    """Closed where warnings are not errors."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def url(served: Served) -> str:
    return f"{served.running.url}/v1"


def answer_of(served: Served, text: str = HELLO, **fields: Any) -> str:
    """What the engine says to a chat, asked directly."""
    return served.ask(served.codec.encode_chat([{"role": "user", "content": text}]), max_tokens=SHORT, **fields)[1]


def test_litellm_completes_streams_calls_tools_and_embeds(
    served: Served, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # asks nobody for prices
    litellm = pytest.importorskip("litellm")
    called = {"model": f"openai/{MODEL}", "api_base": url, "api_key": "none", "timeout": SECONDS}
    chat = {**called, "messages": [{"role": "user", "content": HELLO}], "temperature": 0}
    whole = litellm.completion(**chat, max_tokens=SHORT)
    assert whole.choices[0].message.content == answer_of(served)
    assert whole.usage.completion_tokens == SHORT
    chunks = litellm.completion(**chat, max_tokens=SHORT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer_of(served)
    text = litellm.text_completion(**called, prompt=PROMPT, temperature=0, max_tokens=SHORT)
    assert text.choices[0].text == served.ask(served.codec.encode(PROMPT), max_tokens=SHORT)[1]
    vectors = litellm.embedding(**called, input=[PROMPT, HELLO]).data
    assert len({len(each["embedding"]) for each in vectors}) == 1 and len(vectors) == 2
    pytest.importorskip("llguidance")
    call = litellm.completion(**chat, max_tokens=LONG, tools=[ADD], tool_choice="required")
    (found,) = call.choices[0].message.tool_calls
    assert (found.function.name, call.choices[0].finish_reason) == ("add", "tool_calls")
    assert 0 <= json.loads(found.function.arguments)["a"] <= 9
    with pytest.raises(litellm.BadRequestError, match="max_tokens"):
        litellm.completion(**chat, max_tokens=-1)


def test_langchain_answers_streams_and_gives_objects(served: Served, url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    called: dict[str, Any] = {"base_url": url, "api_key": "none", "model": MODEL, "temperature": 0, "timeout": SECONDS}
    chat = langchain.ChatOpenAI(**called, max_completion_tokens=SHORT)
    assert chat.invoke([("user", HELLO)]).content == answer_of(served)
    assert "".join(chunk.content for chunk in chat.stream([("user", HELLO)])) == answer_of(served)
    assert asyncio.run(chat.ainvoke([("user", HELLO)])).content == answer_of(served)
    plain = langchain.OpenAI(**called, max_tokens=SHORT)
    assert plain.invoke(PROMPT) == served.ask(served.codec.encode(PROMPT), max_tokens=SHORT)[1]
    embedded = langchain.OpenAIEmbeddings(
        base_url=url, api_key="none", model=MODEL, check_embedding_ctx_length=False
    ).embed_documents([PROMPT, HELLO])
    assert len(embedded) == 2 and abs(sum(value * value for value in embedded[0]) - 1) < 1e-4
    pytest.importorskip("llguidance")
    patient = langchain.ChatOpenAI(**called, max_completion_tokens=LONG)
    for method in ("json_schema", "function_calling"):
        found = patient.with_structured_output(Sum, method=method).invoke([("user", HELLO)])
        assert isinstance(found, Sum), method
    (call,) = patient.bind_tools([ADD], tool_choice="required").invoke([("user", HELLO)]).tool_calls
    assert call["name"] == "add" and 0 <= call["args"]["a"] <= 9


def test_llama_index_completes_chats_and_streams(served: Served, url: str) -> None:
    module = pytest.importorskip("llama_index.llms.openai_like")
    called: dict[str, Any] = {"model": MODEL, "api_base": url, "api_key": "none", "temperature": 0, "max_retries": 0}
    chat = module.OpenAILike(**called, is_chat_model=True, max_tokens=SHORT, timeout=SECONDS)
    asked = [pytest.importorskip("llama_index.core.llms").ChatMessage(role="user", content=HELLO)]
    assert chat.chat(asked).message.content == answer_of(served)
    assert "".join(part.delta or "" for part in chat.stream_chat(asked)) == answer_of(served)
    text = module.OpenAILike(**called, is_chat_model=False, max_tokens=SHORT, timeout=SECONDS)
    assert text.complete(PROMPT).text == served.ask(served.codec.encode(PROMPT), max_tokens=SHORT)[1]
    pytest.importorskip("llguidance")
    caller = module.OpenAILike(
        **called, is_chat_model=True, is_function_calling_model=True, max_tokens=LONG, timeout=SECONDS
    )
    assert isinstance(caller.as_structured_llm(Sum).chat(asked).raw, Sum)


def test_instructor_gives_objects_in_each_of_its_modes(served: Served, url: str) -> None:
    instructor = pytest.importorskip("instructor")
    pytest.importorskip("llguidance")
    modes = instructor.Mode
    for mode in (modes.TOOLS, modes.JSON_SCHEMA):
        client = instructor.from_openai(served.running.client(), mode=mode)
        asked: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": HELLO}],
            "temperature": 0,
            "max_tokens": LONG,
            "max_retries": 0,
        }
        assert isinstance(client.chat.completions.create(response_model=Sum, **asked), Sum), mode
        partial = list(client.chat.completions.create_partial(response_model=Sum, **asked))
        assert all(0 <= number <= 9 for number in (partial[-1].a, partial[-1].b)), mode


def test_pydantic_ai_gives_objects_by_tools_and_by_schemas_and_streams(served: Served, url: str) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    pytest.importorskip("llguidance")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")

    async def main() -> None:
        provider = providers.OpenAIProvider(base_url=url, api_key="none")
        model = models.OpenAIChatModel(MODEL, provider=provider)
        settings = {"temperature": 0.0, "timeout": SECONDS}
        plain = pydantic_ai.Agent(model, model_settings={**settings, "max_tokens": SHORT})
        assert (await plain.run(HELLO)).output == answer_of(served)
        async with plain.run_stream(HELLO) as streamed:
            assert await streamed.get_output() == answer_of(served)
        for kind in (pydantic_ai.ToolOutput, pydantic_ai.NativeOutput):
            agent = pydantic_ai.Agent(model, output_type=kind(Sum), model_settings={**settings, "max_tokens": LONG})
            assert isinstance((await agent.run(HELLO)).output, Sum), kind

    asyncio.run(asyncio.wait_for(main(), 4 * SECONDS))
