"""Running out of memory: every rank says where it was, who holds what and what to change; the error stays the same."""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from yafsdp_like import explain_out_of_memory, fully_shard
from yafsdp_like.optim import AdamW
from yafsdp_like.shard import memory_report, oom_letter

MIB = 1 << 20
ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines that nobody needs"


class Full(torch.autograd.Function):
    """An operation without room, in the phase that is planted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, phase: str) -> Tensor:
        ctx.phase = phase
        if phase == "forward":
            raise torch.OutOfMemoryError(ERROR)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.phase == "backward":
            raise torch.OutOfMemoryError(ERROR)
        return grad, None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)
        self.phase = ""

    def forward(self, x: Tensor) -> Tensor:
        return Full.apply(self.mlp(x), self.phase)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).sum()

    def train_step(self) -> None:
        """As modules of trainers do: their own frame is around both phases."""
        self(torch.ones(2, 8)).backward()


def run_out_of_memory(phase: str, directory: str) -> tuple[str, list[str], bool]:
    """Train until the planted error; then whether the model can still be trained."""
    model = Net()
    for module in (*model.blocks, model):
        fully_shard(module)
    optimizer = AdamW(model.parameters())

    def step() -> None:
        model.train_step()
        if phase == "update" and planted:
            with mock.patch.object(AdamW, "_advance", side_effect=torch.OutOfMemoryError(ERROR)):
                optimizer.step()
        optimizer.zero_grad()

    planted = False
    step()
    model.blocks[1].phase, planted = phase, True
    letters = explain_out_of_memory(model, optimizer, directory=directory)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as found, letters:
        step()
    model.blocks[1].phase, planted = "", False
    optimizer.zero_grad()
    step()
    return str(found.value), found.value.__notes__, all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("phase", "where"),
    [("forward", "in blocks.1 (forward)"), ("backward", "in blocks.1 (backward)"), ("update", "in the update")],
)
def test_every_rank_writes_a_letter_and_raises_the_same_error(phase: str, where: str, tmp_path: Path) -> None:
    found = run_ranks(run_out_of_memory, phase, str(tmp_path / "letters"))
    for rank, (message, notes, goes_on) in enumerate(found):
        path = tmp_path / "letters" / f"oom-rank{rank}.txt"
        text = path.read_text()
        assert message == ERROR and goes_on
        assert notes[0].startswith(f"rank {rank} ran out of memory {where}; most is held by ")
        assert notes[1] == f"{path} says who holds what, and what to change"
        assert text.startswith(notes[0]) and "more lines" not in text
        assert "memory plan of one rank of 2" in text and "main shards" in text
        assert re.search(r"the cheapest changes\n  1\. \S", text), text


def test_a_model_that_is_not_sharded_and_a_directory_that_cannot_be_made_are_told(tmp_path: Path) -> None:
    model = Net()
    model.blocks[2].phase = "forward"
    (tmp_path / "file").touch()
    letters = explain_out_of_memory(model, directory=tmp_path / "file" / "below")
    with pytest.raises(torch.OutOfMemoryError) as found, letters:
        model(torch.ones(1, 8))
    first, second = found.value.__notes__
    assert first.startswith("rank 0 ran out of memory in blocks.2 (forward)")
    assert "no part of this model is sharded" in second and "could not be written" in second


def test_changes_that_are_given_come_first_and_a_mistake_in_them_hides_no_error(tmp_path: Path) -> None:
    model = Net()
    model.blocks[0].phase = "forward"
    for changes, words in ((lambda: ["a", "b", "c", "d"], "  3. c\n"), (lambda: 1 / 0, "(no changes could be worked")):
        letters = explain_out_of_memory(model, directory=tmp_path, changes=changes)
        with pytest.raises(torch.OutOfMemoryError), letters:
            model(torch.ones(1, 8))
        text = (tmp_path / "oom-rank0.txt").read_text()
        assert words in text and "4. d" not in text


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    letters = explain_out_of_memory(Net(), directory=tmp_path)
    with pytest.raises(RuntimeError, match="something else") as found, letters:
        raise RuntimeError("something else")
    assert not hasattr(found.value, "__notes__") and not list(tmp_path.iterdir())


def held_on_a_device() -> tuple[dict[str, int], int]:
    model = Net()
    fully_shard(model)
    optimizer = AdamW(model.parameters())
    model(torch.ones(1, 8)).backward()
    optimizer.step()
    arenas = sum(region.nbytes for region in memory_report.regions_of(model))
    device = {
        "memory_allocated": arenas + 50 * MIB,
        "memory_reserved": arenas + 60 * MIB,
        "mem_get_info": (100 * MIB, arenas + 200 * MIB),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_report, "device_of", lambda _: torch.device("cuda", 0))
        for name, value in device.items():
            patch.setattr(torch.cuda, name, lambda _, value=value: value)
        return memory_report.holders_of(model, optimizer), arenas


def test_what_the_device_holds_is_all_in_one_category_each() -> None:
    """Gradients and moments are on the CPU here, so that they are nothing of the device's."""
    ((held, arenas),) = run_ranks(held_on_a_device, world_size=1)
    rest = {memory_report.ACTIVATIONS: 50 * MIB, memory_report.OTHER: 40 * MIB, memory_report.CACHE: 10 * MIB}
    assert {name: held.pop(name) for name in rest} == rest
    assert sum(held.values()) == arenas > 0 and "main shards" in held


def gradients_in_forward() -> tuple[list[int], int]:
    model = Net()
    fully_shard(model)
    found = []
    for _ in range(2):
        output = model(torch.ones(1, 8))  # the root stays unsharded until its backward, and has gradients beside
        found.append(memory_report.holders_of(model, None).get(memory_report.GRADIENTS, 0))
        output.backward()
    return found, sum(p.grad.to_local().untyped_storage().nbytes() for p in model.parameters())


def test_gradients_of_units_that_are_unsharded_count_as_gradients() -> None:
    """Prevents: gradients that are added up over several forwards, and counted as activations in the second one."""
    ((found, nbytes),) = run_ranks(gradients_in_forward, world_size=1)
    assert found == [0, nbytes] and nbytes > 0


def test_suggestions_are_ordered_by_their_cost_and_say_what_they_free() -> None:
    held = {
        "main shards": 8 * MIB,
        "compute shards": 4 * MIB,
        memory_report.ACTIVATIONS: 8 * MIB,
        "gradient shards": MIB,
    }
    words = oom_letter.cheap_changes(held, None)
    assert words[0].startswith("fully_shard(..., split_master=True)") and words[0].endswith("frees about 4.00 MiB")
    assert "half the sequences" in words[1] and words[-1].startswith("twice the ranks")
    assert not any("moments" in w for w in words)


@pytest.mark.parametrize("offload_moments", [False, True])
def test_moments_on_the_host_are_not_suggested_again_and_free_what_their_buffers_take(offload_moments: bool) -> None:
    param = nn.Parameter(torch.ones(1 << 18))
    optimizer = AdamW([param], offload_moments=offload_moments)
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = {memory_report.STATES: MIB if offload_moments else 2 * MIB}
    words = "\n".join(oom_letter.cheap_changes(held, optimizer))
    assert ("offload_moments=True" in words) is not offload_moments
    assert f"rounded moments; frees about {'512.00 KiB' if offload_moments else '1.00 MiB'}" in words
