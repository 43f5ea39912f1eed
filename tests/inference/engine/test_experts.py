"""Mixtures of experts, served out of directories that transformers wrote: its tokens, and its log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.inference.engine.test_engine import GREEDY, OPTIONS, TINY, check_idle, engine, prompts
from tests.models.test_hf import theirs, write_family
from yafsdp_like.inference.engine import forward
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Completion, Request
from yafsdp_like.inference.options import PoolOptions
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import load, open_model
from yafsdp_like.kernels.routing import Visits, route
from yafsdp_like.models.moe import ExpertsConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from yafsdp_like.inference.options import AnyMode

BIASED = "llama, biases"
FAMILIES = ["mixtral", "qwen3_moe, not normalized", "qwen3_moe, some layers without experts"]
NUM_TOKENS, NUM_LOGPROBS = 6, 5


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("experts")
    found = {family: scratch / str(number) for number, family in enumerate((*FAMILIES, BIASED))}
    for family, path in found.items():
        write_family(family, path)
    return found


def asked() -> list[Request]:
    texts = prompts(5, longest=25)
    return [Request(str(i), t, GREEDY, max_tokens=NUM_TOKENS, num_logprobs=NUM_LOGPROBS) for i, t in enumerate(texts)]


@torch.no_grad()
def check(directory: Path, done: Mapping[str, Completion]) -> None:
    """Every token is the most probable one after those before it, and has transformers' log-probabilities."""
    reference = theirs(directory)
    for request in asked():
        completion = done[request.id]
        text = torch.tensor([[*request.prompt, *completion.ids]])
        scores = reference(text).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        assert completion.ids == scores.argmax(-1).tolist()
        assert len(completion.tokens) == NUM_TOKENS
        for token, row in zip(completion.tokens, scores, strict=True):
            best = row.topk(NUM_LOGPROBS)
            assert [index for index, _ in token.top] == best.indices.tolist()
            assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("family", "mode"), [*((family, "resident") for family in (*FAMILIES, BIASED)), (FAMILIES[2], "streamed")]
)
def test_served_experts_give_the_tokens_and_log_probabilities_of_transformers(
    family: str, mode: AnyMode, directories: dict[str, Path]
) -> None:
    it = Engine(load(str(directories[family]), OPTIONS, dtype=torch.float32, mode=mode))
    check(directories[family], it.generate(asked()))
    check_idle(it)


def test_the_rows_of_measured_steps_visit_experts_and_store_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: times without the experts, which are most of the bytes that a step reads."""
    it = engine(replace(TINY, experts=ExpertsConfig(8, 2)))
    for pages in it._places.regions.values():
        pages.fill_(7)
    steps: list[tuple[int, int, int]] = []

    def recording(scores: torch.Tensor, count: int, normalize: bool, slots: torch.Tensor, visits: Visits) -> None:
        route(scores, count, normalize, slots, visits)
        starts = visits.starts.tolist()
        steps.append((len(scores), starts[-1], len(set(starts)) - 1))  # rows, visits, experts that are visited

    monkeypatch.setattr(forward, "route", recording)
    assert set(it._runner.measure_decoding()) | set(it._runner.measure_steps()) == {1, 2, 4, 8, 16}
    it._runner.measure()
    assert {rows for rows, _, _ in steps} == {1, 2, 4, 8, 16}
    assert all(visits == 2 * rows for rows, visits, _ in steps)
    assert max(experts for rows, _, experts in steps if rows == 1) == 2
    assert max(experts for rows, _, experts in steps if rows == 16) > 4
    assert all((pages == 7).all() for pages in it._places.regions.values())


def test_a_pool_serves_models_with_experts_beside_each_other(directories: dict[str, Path]) -> None:
    models = {family: open_model(str(directories[family])) for family in FAMILIES[:2]}
    own = replace(OPTIONS, kv_nbytes=None, host_kv_nbytes=0)
    pooled = {family: PooledModel(model.config, torch.float32, own) for family, model in models.items()}
    pool = ModelPool(plan_pool(pooled, PoolOptions(memory_limit_nbytes=1 << 24)), models)
    done = pool.generate({family: asked() for family in models})
    for family in models:
        check(directories[family], done[family])
