"""Long answers: written in a thread, a part at a time, and what short ones say."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.inference.http.servers import CHATS, COMPLETIONS, GREEDY, MODEL, PROMPT, Running
from yafsdp_like.inference.http import long_answers
from yafsdp_like.inference.http.long_answers import PART, SHORT_VALUES, written

if TYPE_CHECKING:
    from collections.abc import Callable

EMBEDDINGS = "/v1/embeddings"
USER = {"role": "user", "content": "Hi"}
SCORED = {**GREEDY, "max_tokens": 3, "ignore_eos": True, "prompt_logprobs": 2}


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        "é\n",
        {"x": {}, "y": [], "z": None, "a": [{"b": [[1.5, None], []]}, {}], '"': True},
        {"x": [{str(index): {"logprob": -index / 3}} for index in range(2 * PART + 1)], "y": [*range(PART + 1)]},
        [[*range(3 * PART)], [*range(PART)]],
    ],
    ids=lambda value: repr(value)[:24],
)
def test_parts_of_an_answer_are_the_json_of_the_whole(content: Any) -> None:
    expected = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    assert written(content) == written(content, SHORT_VALUES + 1) == expected


def test_no_number_is_written_that_json_has_not() -> None:
    for count in (0, SHORT_VALUES + 1):
        with pytest.raises(ValueError, match="JSON compliant"):
            written({"x": [float("nan")]}, count)


def scrubbed(text: str) -> Any:
    """What an answer says, whole or as a stream, but for who it is and when."""
    found = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    return [{name: each[name] for name in each.keys() - {"id", "created"}} for each in found or [json.loads(text)]]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {**SCORED, "prompt": PROMPT, "logprobs": 1, "echo": True, "return_token_ids": True}),
        (COMPLETIONS, {**SCORED, "prompt": PROMPT, "n": 2, "stream": True}),
        (CHATS, {**SCORED, "messages": [USER]}),
        (EMBEDDINGS, {"model": MODEL, "input": [PROMPT, "x"]}),
    ],
    ids=["completion", "stream", "chat", "embeddings"],
)
def test_a_long_answer_is_written_beside_the_event_loop_and_says_what_a_short_one_does(
    plain: Running, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: an event loop that answers nobody while one answer of seconds is written."""
    threads = set[str]()

    def spied(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def spy(value: Any) -> Any:
            threads.add(threading.current_thread().name.partition("_")[0])
            return function(value)

        return spy

    monkeypatch.setattr(long_answers, "_parts", spied(long_answers._parts))
    short = scrubbed(plain.post(path, body).text)
    assert not threads
    monkeypatch.setattr(long_answers, "SHORT_VALUES", 1)
    assert scrubbed(plain.post(path, body).text) == short
    assert threads == {"long answers"}
