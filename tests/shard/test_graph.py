"""Whole steps as CUDA graphs: the same numbers as the function they are made of, or the function itself."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from tests.ranks import on_ranks, run_ranks
from tests.training import world_mesh
from yafsdp_like import GraphedStep, MixedPrecisionPolicy, fully_shard
from yafsdp_like.models import Decoder, DecoderConfig
from yafsdp_like.optim import AdamW
from yafsdp_like.shard import graph
from yafsdp_like.shard.graph import repeatable_state

CONFIG = DecoderConfig(dim=256, num_layers=4, num_heads=4, num_kv_heads=2, ffn_dim=512, vocab_size=1024)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sharded(device: str, transport: Any = "auto", config: DecoderConfig = CONFIG, **options: Any) -> Any:
    with torch.device("meta"):
        model = Decoder(config)
    for module in (*model.layers, model):
        fully_shard(module, mesh=world_mesh(device), mp_policy=BF16, transport=transport, **options)
    model.to_empty(device=device)
    model.init_weights()
    return model


def forward_backward_of(model: Any) -> Step:
    def forward_backward(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = model(tokens, targets)
        loss.backward()
        return loss.detach()

    return forward_backward


def batch(step: int, seq_len: int, device: str, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + torch.distributed.get_rank())
    tokens = torch.randint(CONFIG.vocab_size, (size, seq_len + 1), generator=generator).to(device)
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


LARGE = DecoderConfig(dim=1024, num_layers=6, num_heads=8, num_kv_heads=4, ffn_dim=2816, vocab_size=8192)


def train_in_order(lengths: list[int], graphed: bool = True) -> tuple[int, list[float]]:
    """Bytes that the allocator reserved at most, beside what it had before, and losses: five steps of each length."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = sharded("cuda", config=LARGE)
    function = forward_backward_of(model)
    step = GraphedStep(function, model) if graphed else function
    optimizer = AdamW(model.parameters(), 1e-3)
    torch.cuda.reset_peak_memory_stats()
    losses = []
    for number in range(5 * len(lengths)):
        losses.append(step(*batch(number, lengths[number // 5], "cuda", size=8)).item())
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(step, GraphedStep):
        assert step.num_recordings == len(lengths)
    return torch.cuda.max_memory_reserved() - before, losses


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[512, 1024, 2048], [2048, 1024, 512], [1024, 2048, 512]])
def test_recordings_of_several_lengths_take_the_memory_of_the_longest(lengths: list[int]) -> None:
    options: dict[str, Any] = {"world_size": 1, "device": "cuda", "timeout": 120}
    [(_, plain)] = run_ranks(train_in_order, lengths, False, **options)
    [(alone, _)] = run_ranks(train_in_order, [max(lengths)], **options)
    [(together, losses)] = run_ranks(train_in_order, lengths, **options)
    assert together == pytest.approx(alone, rel=0.02)
    assert losses == pytest.approx(plain, rel=1e-3)  # at these lengths attention's backward is not deterministic


def keep_and_fail() -> None:
    """The function keeps a tensor of each call, and fails once."""
    model, kept, fails = sharded("cuda"), [], False

    def function(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = model(tokens, targets)
        kept.append(torch.full((1 << 20,), float(len(kept)), device="cuda"))
        if fails:
            raise ArithmeticError("as asked")
        loss.backward()
        return loss.detach()

    step = GraphedStep(function, model)
    for number in range(4):
        step(*batch(number, 96, "cuda"))
        model.zero_grad()
    assert step.num_recordings == 1
    fails = True
    with pytest.raises(ArithmeticError, match="as asked"):
        step(*batch(4, 64, "cuda"))
    fails = False
    assert step.num_recordings == 0, "it may write to what the function has kept since"
    for number in range(5, 15):
        step(*batch(number, 64 if number % 2 else 96, "cuda"))
        model.zero_grad()
    assert step.num_recordings == 2
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(kept)), "a replay has written to a kept tensor"


@pytest.mark.gpu
def test_replays_spare_what_calls_before_a_recording_have_kept() -> None:
    run_ranks(keep_and_fail, device="cuda", timeout=120)


def end_a_group_behind_a_step() -> int:
    group = torch.distributed.new_group(backend="nccl")
    model: Any = torch.nn.Linear(64, 64, device="cuda")
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cuda"), transport="process_group")

    def forward_backward(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    step = GraphedStep(forward_backward, model)
    for _ in range(4):
        step(torch.ones(2, 64, device="cuda"))
        model.zero_grad()
    torch.cuda.synchronize()
    num_recordings = step.num_recordings
    step.close()
    torch.distributed.destroy_process_group(group)
    return num_recordings


@pytest.mark.gpu
def test_a_process_group_ends_behind_a_step_that_was_closed() -> None:
    """Prevents: waiting for CUDA graphs that have its collectives."""
    assert run_ranks(end_a_group_behind_a_step, device="cuda", timeout=60) == [1, 1]


class Recorder:
    """Stands for ``StepRecorder`` on a CPU: a replay finds what the recorded call has computed.

    Activations of every call in the pool are noise wherever a recording has had gradients.
    """

    works_on = staticmethod(lambda device: True)

    def __init__(self) -> None:
        self.log: list[str] = []
        self.blocks: set[tuple[int, int]] = set()
        self.gradients: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # places and values, of each recording

    def overwrite(self) -> None:
        for place, _ in (pair for recorded in self.gradients for pair in recorded):
            place.fill_(127)

    @contextmanager
    def in_pool(self) -> Iterator[None]:
        self.log.append("in pool")
        self.overwrite()
        yield

    def keep(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        values = torch.empty(0, dtype=torch.uint8).set_(storage).clone()
        place = values.clone()
        self.gradients[-1].append((place, values))
        return place.untyped_storage()

    def live(self) -> set[tuple[int, int]]:
        return set(self.blocks)

    def record(self, work: Callable[[], Any]) -> Any:
        self.log.append("record")
        result = work()
        computed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.gradients.append(computed)

        def replay() -> None:
            self.log.append("replay")
            self.overwrite()
            for place, values in computed:
                place.copy_(values)

        return SimpleNamespace(result=result, replay=replay)


@on_ranks()
def test_steps_before_a_recording_run_in_its_pool_and_those_that_leave_memory_there_end_earlier_recordings() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "StepRecorder", Recorder)
        model = sharded("cpu")
        leaves = False

        def function(tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            loss = model(tokens, targets)
            loss.backward()
            if leaves:
                recorder.blocks.add((len(recorder.blocks), 512))
            return {"loss": loss}

        step = GraphedStep(function, model)

        def losses(seq_len: int, calls: int) -> list[float]:
            found = []
            for _ in range(calls):
                loss = step(*batch(0, seq_len, "cpu"))["loss"]
                assert not loss.requires_grad, "a copy"
                found.append(loss.item())
                assert all(p.grad is not None for p in model.parameters())
                model.zero_grad()
            return found

        function(*batch(0, 16, "cpu"))  # slots are made
        model.zero_grad()
        assert len(set(losses(16, 4))) == 1
        recorder = step._recorder
        assert isinstance(recorder, Recorder)
        assert recorder.log == ["in pool", "in pool", "record", "replay", "replay"]
        leaves = True
        losses(32, 1)
        assert step.num_recordings == 0, "it may write to what the other length has left"
        leaves = False
        losses(32, 2)
        losses(16, 1)
        assert recorder.log[5:] == ["in pool", "in pool", "record", "replay", "record", "replay"]
        assert step.num_recordings == 2
        step.close()
        assert step.num_recordings == 0
        losses(16, 3)
        assert recorder.log[11:] == ["in pool", "in pool", "record", "replay"]


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


@pytest.mark.parametrize("fused", [True, False])
@on_ranks()
def test_a_step_behind_a_write_to_a_split_master_is_not_recorded(fused: bool) -> None:
    """Prevents: a replay that writes the master again as it was when the step was recorded."""
    model = sharded("cpu", split_master=True)
    optimizer = AdamW(model.parameters()) if fused else torch.optim.AdamW(model.parameters())
    for number in range(2):
        forward_backward_of(model)(*batch(number, 16, "cpu"))
        optimizer.step()
        optimizer.zero_grad()
        assert (repeatable_state(model._engine()) is not None) == fused, "torch's writes wait for the next forward"
