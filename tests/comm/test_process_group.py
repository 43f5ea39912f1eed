"""How many collectives a process group is asked for, by a double that counts them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from yafsdp_like.comm.process_group import ProcessGroupTransport
from yafsdp_like.comm.transport import Reduction

if TYPE_CHECKING:
    from collections.abc import Callable

GATHERS = "allgather_into_tensor_coalesced", "all_gather_single_coalesced"  # its names before and after torch 2.12
REDUCES = "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"
DTYPES = torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32


class Group:
    """Notes what is asked of it, and has done it at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def note(outputs: Any, inputs: Any, options: Any) -> None:
            assert not options.asyncOp, "on the current stream"
            sizes = [each.numel() for each in inputs] if isinstance(inputs, list) else inputs.numel()
            self.asked.append((name, sizes))

        return note


def transport() -> tuple[Any, Group]:
    """Return a transport of two ranks, and its group."""
    made, group = ProcessGroupTransport.__new__(ProcessGroupTransport), Group()
    made.rank, made.world_size, made._is_threaded = 0, 2, False
    made._gather_group = made._reduce_group = group  # type: ignore[assignment]
    return made, group


def tensors(factor: int, device: str) -> list[torch.Tensor]:
    """Return tensors of 0, 1, 2, ... elements, times a factor."""
    return [torch.zeros(factor * size, dtype=dtype, device=device) for size, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_gather_is_one_collective_a_dtype_and_on_a_cpu_one_a_tensor_of_bytes(device: str) -> None:
    """Prevents: a launch of NCCL's for each parameter, which tests on gloo cannot see. Meta stands for a GPU."""
    made, group = transport()
    made.all_gather(tensors(2, device), tensors(1, device))()
    if device == "cpu":
        assert group.asked == [("_allgather_base", nbytes) for nbytes in (4, 16, 4, 6)]
    else:
        assert [sizes for _, sizes in group.asked] == [[1, 4], [2, 3]]
        assert {name for name, _ in group.asked} <= set(GATHERS)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_reduction_is_one_collective_a_dtype(device: str) -> None:
    made, group = transport()
    outputs, inputs = tensors(1, device), tensors(2, device)
    made.reduce_scatter(outputs, inputs, DTYPES, torch.empty(0))(Reduction(True), False)
    assert [sizes for _, sizes in group.asked] == [[2, 8], [4, 6]]
    assert {name for name, _ in group.asked} <= set(REDUCES)
