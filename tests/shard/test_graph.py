"""Whole steps as CUDA graphs: the same numbers as the function they are made of, or the function itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ranks import on_ranks, run_ranks
from tests.training import world_mesh
from yafsdp_like import GraphedStep, MixedPrecisionPolicy, fully_shard
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.optim import AdamW
from yafsdp_like.shard.graph import repeatable_state

CONFIG = DecoderConfig(dim=256, num_layers=4, num_heads=4, num_kv_heads=2, ffn_dim=512, vocab_size=1024)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sharded(device: str, transport: Any = "auto") -> Any:
    with torch.device("meta"):
        model = Decoder(CONFIG)
    for module in (*model.layers, model):
        fully_shard(module, mesh=world_mesh(device), mp_policy=BF16, transport=transport)
    model.to_empty(device=device)
    model.init_weights()
    return model


def forward_backward_of(model: Any) -> Step:
    def forward_backward(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = model(tokens, targets)
        loss.backward()
        return loss.detach()

    return forward_backward


def batch(step: int, seq_len: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + torch.distributed.get_rank())
    tokens = torch.randint(CONFIG.vocab_size, (2, seq_len + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(graphed: bool, fused: bool = True, transport: Any = "auto", micro_steps: int = 1) -> list[float]:
    """Losses and norms of steps at two lengths, with an evaluation in between."""
    model = sharded("cuda", transport)
    step: Step = forward_backward_of(model)
    if graphed:
        step = GraphedStep(step, model)
    optimizer = AdamW(model.parameters(), 1e-3) if fused else torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    seen = []
    for number in range(12):
        for micro in range(micro_steps):
            loss = step(*batch(10 * number + micro, 64 if number % 2 else 96, "cuda"))
            seen.append(loss.item())
        seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item())
        optimizer.step()
        optimizer.zero_grad()
        if number == 7:
            with torch.no_grad():
                seen.append(model(*batch(0, 64, "cuda")).item())
    if isinstance(step, GraphedStep):
        assert step.num_recordings >= 2, "nothing was recorded"
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("transport", ["peer", "process_group"])
def test_a_replayed_step_has_the_bits_of_the_step(transport: str, fused: bool, micro_steps: int) -> None:
    options: dict[str, Any] = {"transport": transport, "fused": fused, "micro_steps": micro_steps}
    plain = run_ranks(train, False, device="cuda", timeout=120, **options)
    assert run_ranks(train, True, device="cuda", timeout=120, **options) == plain


def held_gradient_survives() -> bool:
    """A gradient that the user keeps is not overwritten by a replay."""
    model = sharded("cuda")
    step = GraphedStep(forward_backward_of(model), model)
    for number in range(5):
        step(*batch(number, 64, "cuda"))
        kept = next(model.parameters()).grad
        assert kept is not None
        before = kept.to_local().clone()
        model.zero_grad()
    step(*batch(9, 64, "cuda"))
    return bool(torch.equal(before, kept.to_local()))


@pytest.mark.gpu
def test_a_gradient_that_the_user_keeps_survives_a_replay() -> None:
    assert run_ranks(held_gradient_survives, device="cuda", timeout=120) == [True, True]


@on_ranks()
def test_on_a_cpu_the_function_is_called() -> None:
    model = sharded("cpu")
    step = GraphedStep(forward_backward_of(model), model)
    expected = forward_backward_of(model)(*batch(0, 16, "cpu")).item()
    model.zero_grad()
    assert [step(*batch(0, 16, "cpu")).item() for _ in range(4)] == [expected] * 4
    assert step.num_recordings == 0


@on_ranks()
def test_only_steps_that_start_from_rest_are_repeatable() -> None:
    """What decides whether a step is recorded is the engine's, and can be asked without a GPU."""
    model = sharded("cpu")
    assert repeatable_state(model._engine()) is None, "nothing is built yet"
    forward_backward = forward_backward_of(model)
    forward_backward(*batch(0, 16, "cpu"))
    added = repeatable_state(model._engine())
    model.zero_grad()
    fresh = repeatable_state(model._engine())
    assert added is not None and fresh is not None and added != fresh, "setting gradients is not adding to them"
    parameter = next(model.parameters())
    parameter.grad = torch.zeros_like(parameter)
    assert repeatable_state(model._engine()) is None, "a gradient of the user's own"
    parameter.grad = None
    model.set_requires_gradient_sync(False)
    assert repeatable_state(model._engine()) is None, "gradients stay in their slots"
