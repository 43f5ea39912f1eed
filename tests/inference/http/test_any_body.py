"""Bodies drawn at random: none breaks the server."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.inference.http.servers import CHATS, COMPLETIONS, JSON, MODEL, Running

# --- whatever comes ---

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30, 1e308, 0.5, -1.5, "", "x", "fox \U0001f642", "\ud83d", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "role", "x"]), inner),
    max_leaves=6,
)
FIELDS = {
    "model": st.sampled_from([MODEL, "other"]),
    "n": st.integers(-1, 4),
    "max_tokens": st.integers(-1, 12),
    "stop": st.sampled_from(["a", ["e", "th"], [], "\n"]),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "seed": st.integers(-(2**63), 2**63),
    "temperature": st.floats(-0.5, 2.5),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 400),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-3, 3),
    "ignore_eos": st.booleans(),
    "cache_salt": st.text(max_size=3),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "top_logprobs": st.integers(-1, 21),
    "echo": st.booleans(),
    "prompt": st.text(max_size=30)
    | st.lists(st.text(min_size=1, max_size=5), max_size=3)
    | st.lists(st.integers(0, 320), max_size=40),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=9)}
        ),
        max_size=3,
    ),
}
LIKELY = {"model": st.just(MODEL), "n": st.integers(1, 3), "max_tokens": st.integers(1, 8)}


def bodies(needed: str, unlikely: str) -> st.SearchStrategy[dict[str, Any]]:
    """Mostly such as could be sent by someone, with a field or two that could not."""
    optional = {name: values for name, values in FIELDS.items() if name not in (needed, unlikely, *LIKELY)}
    sound = st.fixed_dictionaries({**LIKELY, needed: FIELDS[needed]}, optional=optional)
    odd = st.dictionaries(st.sampled_from([*FIELDS, "suffix", "tools", "logit_bias", "zzz"]), VALUES, max_size=1)
    return st.builds(lambda body, more: {**body, **more}, sound, odd)


STATUSES = {200, 400, 404}


# The same few in every run; many others for `make test-all`.
FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=400, derandomize=False)


@FEW
@given(body=bodies("prompt", "messages") | VALUES)
def test_no_body_of_a_completion_breaks_the_server(plain: Running, body: Any) -> None:
    check_answer(plain, COMPLETIONS, body)


@FEW
@given(body=bodies("messages", "prompt") | VALUES)
def test_no_body_of_a_chat_breaks_the_server(plain: Running, body: Any) -> None:
    check_answer(plain, CHATS, body)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("path", "fields"), [(COMPLETIONS, ("prompt", "messages")), (CHATS, ("messages", "prompt"))])
def test_many_bodies_do_not_either(plain: Running, path: str, fields: tuple[str, str]) -> None:
    MANY(given(body=bodies(*fields) | VALUES)(lambda body: check_answer(plain, path, body)))()


def check_answer(running: Running, path: str, body: Any) -> None:
    """An answer or an error that says which field; never a failure, and nothing is left behind."""
    answer = running.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code in STATUSES, answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif body.get("stream"):
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        assert all("error" not in json.loads(line) for line in lines[:-1])
    else:
        prompts = body.get("prompt", "")
        num_prompts = len(prompts) if isinstance(prompts, list) and isinstance(prompts[0], str) else 1
        assert len(answer.json()["choices"]) == num_prompts * (body["n"] or 1)
    running.check_idle()
