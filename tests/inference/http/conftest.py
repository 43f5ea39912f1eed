"""A tokenizer, and servers that tests of one file share."""

from collections.abc import Iterator

import pytest

from tests.inference.http.servers import Running, Served, make_engine, served_with, serving
from tests.inference.text.test_codec import needs_smollm2, smollm2_in, write_tokenizer
from yafsdp_like.inference.text.codec import Codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def small(codec: Codec) -> Iterator[Served]:
    """With a small vocabulary, for what does not depend on it."""
    with served_with(codec) as served:
        yield served


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_with(Codec.load(smollm2_in(tmp_path_factory))) as served:
        yield served


@pytest.fixture(params=["small", pytest.param("smollm2", marks=needs_smollm2)])
def served(request: pytest.FixtureRequest) -> Served:
    """With a small vocabulary and with SmolLM2's."""
    found: Served = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def plain(codec: Codec) -> Iterator[Running]:
    with serving(make_engine(codec), codec, max_body_nbytes=100_000, max_choices=16) as running:
        yield running
        running.check_idle()
