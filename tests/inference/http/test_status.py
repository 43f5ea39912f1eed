"""The status page: what its data says of a server and of a pool, and that the page loads nothing from elsewhere."""

import re

import pytest

from tests.inference.http.servers import COMPLETIONS, GREEDY, PROMPT, Running
from tests.inference.http.test_pool import BODY, KEY, NAMES, plan_of, serving_pool
from yafsdp_like.inference.text.codec import Codec


def test_a_server_says_how_its_only_model_and_its_memory_stand(plain: Running) -> None:
    assert plain.post(COMPLETIONS, {**GREEDY, "prompt": PROMPT}).status_code == 200
    found = plain.get("/status.json").json()
    assert found["state"] == "serving" and found["problem"] is None and found["device"] == {"name": "CPU"}
    (model,) = found["models"]
    assert model["state"] == "awake" and model["num_tokens_drawn"] == found["figures"]["num_tokens_drawn"] >= 24
    assert {stretch["use"] for stretch in found["memory"]} >= {"weights", "pages", "free"}
    assert found["seconds"]["to the first token"][-1][1] >= 1 and found["seconds"]["of a request"][-1][1] >= 1


def test_the_page_is_one_file_that_asks_only_for_its_data(plain: Running) -> None:
    page = plain.get("/status")
    assert page.headers["content-type"].startswith("text/html") and "<title>yafsdp_like: status</title>" in page.text
    assert re.findall(r"fetch\(\"(.*?)\"", page.text) == ["status.json"]
    assert not re.search(r"https?://|src=|<link|@import|url\(", page.text)


@pytest.mark.parametrize("name", NAMES)
def test_a_pool_says_whose_weights_lie_where(codec: Codec, name: str) -> None:
    with serving_pool(codec, errors={"broken": "no such directory"}) as running:
        assert running.post(COMPLETIONS, {**BODY, "model": name}, headers=KEY).status_code == 200
        found = running.get("/status.json").json()
    states = {model["name"]: model["state"] for model in found["models"]}
    assert states == {other: "awake" if other == name else "asleep" for other in NAMES}
    assert found["failed"] == ["broken"] and "no such directory" not in str(found)
    assert sum(stretch["nbytes"] for stretch in found["memory"]) == plan_of(codec).memory.nbytes
    assert {stretch["owner"] for stretch in found["memory"] if stretch["use"] == "weights"} == {name}
