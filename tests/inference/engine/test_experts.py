"""Mixtures of experts, served out of directories that transformers wrote: its tokens, and its log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.inference.engine.test_engine import GREEDY, OPTIONS, check_idle, prompts
from tests.models.test_hf import directory_of, theirs
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Completion, Request
from yafsdp_like.inference.options import PoolOptions
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import load, open_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from yafsdp_like.inference.options import AnyMode

FAMILIES = ["mixtral", "qwen3_moe, not normalized", "qwen3_moe, some layers without experts"]
NUM_TOKENS, NUM_LOGPROBS = 6, 5
OWN: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 4, "max_batch_tokens": 16, "page_size": 4}


@cache
def reference(family: str) -> nn.Module:
    return theirs(directory_of(family))


def asked() -> list[Request]:
    texts = prompts(5, longest=25)
    return [Request(str(i), t, GREEDY, max_tokens=NUM_TOKENS, num_logprobs=NUM_LOGPROBS) for i, t in enumerate(texts)]


@torch.no_grad()
def check(family: str, done: Mapping[str, Completion]) -> None:
    """Every token is the most probable one after those before it, and has transformers' log-probabilities."""
    for request in asked():
        completion = done[request.id]
        text = torch.tensor([[*request.prompt, *completion.ids]])
        scores = reference(family)(text).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        assert completion.ids == scores.argmax(-1).tolist()
        assert len(completion.tokens) == NUM_TOKENS
        for token, row in zip(completion.tokens, scores, strict=True):
            best = row.topk(NUM_LOGPROBS)
            assert [index for index, _ in token.top] == best.indices.tolist()
            assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("family", "mode"), [*((family, "resident") for family in FAMILIES), (FAMILIES[2], "streamed")]
)
def test_served_experts_give_the_tokens_and_log_probabilities_of_transformers(family: str, mode: AnyMode) -> None:
    weights = load(open_model(str(directory_of(family))), OPTIONS, dtype=torch.float32, mode=mode)
    it = Engine(weights)
    check(family, it.generate(asked()))
    check_idle(it)


def test_a_pool_serves_experts_beside_others_and_wakes_them() -> None:
    models = {family: open_model(str(directory_of(family))) for family in FAMILIES[:2]}
    own = replace(OPTIONS, kv_nbytes=None, host_kv_nbytes=0)
    pooled = {family: PooledModel(model.config, torch.float32, own) for family, model in models.items()}
    least = plan_pool(pooled, PoolOptions(memory_limit_nbytes=1 << 24))
    pool = ModelPool(least, models)
    done = pool.generate({family: asked() for family in models})
    for family in models:
        check(family, done[family])
