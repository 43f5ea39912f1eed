"""/tokenize, /detokenize, embeddings and responses, as clients ask for them."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.inference.http.servers import (
    CHATS,
    GREEDY,
    JSON,
    MODEL,
    PROMPT,
    Running,
    Served,
    make_decoder,
    make_engine,
    serving,
)
from yafsdp_like.inference.text.codec import Codec

USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("named", [True, False])
def test_texts_become_tokens_and_tokens_texts(small: Served, named: bool) -> None:
    model = {"model": MODEL} if named else {}
    ids = list(small.codec.encode(PROMPT))
    answer = small.running.post("/tokenize", {**model, "prompt": PROMPT, "return_token_strs": True}).json()
    assert answer == {
        "count": len(ids),
        "max_model_len": 256,
        "tokens": ids,
        "token_strs": [small.codec.name_of(token) for token in ids],
    }
    text = small.running.post("/detokenize", {**model, "tokens": ids}).json()["prompt"]
    assert text == small.codec.decode(ids, skip_special_tokens=False)
    of_chat = small.running.post("/tokenize", {**model, "messages": [USER]}).json()
    assert (of_chat["tokens"], of_chat["token_strs"]) == (list(small.codec.encode_chat([USER])), None)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"model": "other", "prompt": "x"}, 404, "model"),
        ("/tokenize", {"prompt": "fox " * 300}, 400, "prompt"),
        ("/tokenize", [1], 400, None),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"model": "other", "tokens": [1]}, 404, "model"),
        ("/tokenize", {"prompt": ["x", "y"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [USER]}, 400, "prompt"),
        ("/v1/embeddings", {"model": MODEL}, 400, "input"),
        ("/v1/embeddings", {"model": MODEL, "input": []}, 400, "input"),
        ("/v1/embeddings", {"model": MODEL, "input": "fox " * 300}, 400, "input"),
        ("/v1/embeddings", {"model": MODEL, "input": ["x"] * 17}, 400, "input"),
        ("/v1/embeddings", {"model": MODEL, "input": "x", "n": 2}, 400, "n"),
        ("/v1/embeddings", {"model": MODEL, "input": "x", "echo": True}, 400, "echo"),
        ("/v1/embeddings", {"model": MODEL, "prompt": "x"}, 400, "prompt"),
        ("/v1/embeddings", {"model": MODEL, "input": "x", "encoding_format": "hex"}, 400, "encoding_format"),
        ("/v1/embeddings", {"model": MODEL, "input": "x", "dimensions": 8}, 400, "dimensions"),
        ("/v1/responses", {"model": MODEL}, 400, "input"),
        ("/v1/responses", {"model": MODEL, "input": "x", "previous_response_id": "y"}, 400, "previous_response_id"),
        ("/v1/responses", {"model": MODEL, "input": [{"type": "computer_call"}]}, 400, "input"),
        ("/v1/responses", {"model": MODEL, "input": "x", "background": True}, 400, "background"),
        ("/v1/responses", {"model": "other", "input": "x"}, 404, "model"),
        ("/v1/responses", {"model": MODEL, "input": "x", "n": 2}, 400, "n"),
        ("/v1/responses", {"model": MODEL, "input": "x", "max_tokens": 2}, 400, "max_tokens"),
        ("/v1/responses", {"model": MODEL, "input": "x", "max_output_tokens": -2}, 400, "max_output_tokens"),
        ("/v1/responses", {"model": MODEL, "input": "a b " * 500}, 400, "input"),
        ("/v1/responses", {"model": MODEL, "input": "x", "return_token_ids": True}, 400, "return_token_ids"),
        ("/v1/responses", {"model": MODEL, "input": "x", "user": "\ud800"}, 400, "user"),
        ("/v1/responses", {"model": MODEL, "input": "x", "user": 5}, 400, "user"),
        ("/v1/responses", {"model": MODEL, "input": "x", "metadata": {"x": "\ud800"}}, 400, "metadata"),
        ("/v1/responses", {"model": MODEL, "input": "x", "metadata": {"x": 5}}, 400, "metadata"),
        ("/v1/responses", {"model": MODEL, "input": "x", "metadata": []}, 400, "metadata"),
    ],
)
def test_what_these_routes_cannot_do_is_refused_by_name(
    plain: Running, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = plain.post(path, content=json.dumps(body), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_an_embedding_is_the_last_hidden_state_at_length_one(small: Served) -> None:
    texts = [PROMPT, "The lazy dog"]
    with torch.no_grad():
        hidden = list[torch.Tensor]()
        decoder = make_decoder(small.codec)
        decoder.lm_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0, -1]))
        for text in texts:
            decoder(torch.tensor([small.codec.encode(text)]))
    expected = [F.normalize(vector, dim=0).tolist() for vector in hidden]
    answer = small.client.embeddings.create(model=MODEL, input=texts)  # the client asks for base64
    as_floats = small.client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    for data in (answer.data, as_floats.data):
        assert [each.index for each in data] == [0, 1]
        for each, vector in zip(data, expected, strict=True):
            assert each.embedding == pytest.approx(vector, abs=1e-4)
    assert answer.usage.total_tokens == sum(len(small.codec.encode(text)) for text in texts)


def test_a_response_is_the_text_of_the_same_chat(small: Served) -> None:
    chat = small.running.post(CHATS, {**GREEDY, "messages": [{"role": "system", "content": "Brief."}, USER]}).json()
    text = chat["choices"][0]["message"]["content"]
    asked: dict[str, Any] = {"model": MODEL, "instructions": "Brief.", "temperature": 0, "max_output_tokens": 24}
    whole = small.client.responses.create(input="Hi", **asked)
    assert (whole.output_text, whole.instructions) == (text, "Brief.")
    is_cut = chat["choices"][0]["finish_reason"] == "length"
    status = "incomplete" if is_cut else "completed"
    assert (whole.status, whole.output[0].status) == (status, status)
    one: Any = small.client.responses.create(input="Hi", **{**asked, "max_output_tokens": 1})
    assert (one.status, one.output[0].status) == ("incomplete", "incomplete")
    assert whole.usage is not None and whole.usage.total_tokens == chat["usage"]["total_tokens"]
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    assert small.client.responses.create(input=parts, **asked).output_text == text


def test_events_of_a_response_tell_its_text_piece_by_piece(small: Served) -> None:
    events = list(
        small.client.responses.create(model=MODEL, input="Hi", temperature=0, max_output_tokens=24, stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == last.response.output_text
    assert kinds.count("response.output_text.delta") > 1


def test_the_routes_need_the_key_that_others_need(codec: Codec) -> None:
    with serving(make_engine(codec), codec, api_key="sesame") as running:
        for path in ("/tokenize", "/detokenize", "/v1/embeddings", "/v1/responses"):
            assert running.post(path, {"prompt": "x"}).status_code == 401
