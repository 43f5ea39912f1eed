"""Blocks, models and steps under torch.compile: stock's losses, bit for bit, and no graph break that stock has not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.fsdp as stock
from torch._dynamo.utils import counters

from tests.ranks import on_ranks
from tests.training import ours, world_mesh
from tests.zoo import FEATURES, Block, Chain

Step = Callable[[torch.Tensor], torch.Tensor]


def compiled_blocks(model: Any, step: Step) -> Step:
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return step


def compiled_model(model: Any, step: Step) -> Step:
    model.compile(backend="aot_eager")
    return step


def compiled_step(model: Any, step: Step) -> Step:
    return torch.compile(step, backend="aot_eager")


def losses_and_graph_breaks(fully_shard: Any, compiled: Callable[[Any, Step], Step], **options: Any) -> Any:
    """Train three steps; return their losses, and how often graphs broke."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Chain([Block() for _ in range(3)])
    step = compiled(model, lambda x: model(x).square().mean())
    for module in (*model.layers, model):
        fully_shard(module, mesh=world_mesh(), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = step(torch.randn(4, FEATURES))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert counters["stats"]["unique_graphs"] > 0
    return losses, counters["graph_break"].total()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["process_group", "peer"])
@pytest.mark.parametrize("compiled", [compiled_blocks, compiled_model, compiled_step])
@on_ranks()
def test_what_is_compiled_trains_as_with_stock_and_its_graphs_break_no_more(
    compiled: Callable[[Any, Step], Step], transport: str
) -> None:
    """Prevents: hooks that are traced, or that break the graph of each block in the middle."""
    losses, breaks = losses_and_graph_breaks(ours.fully_shard, compiled, transport=transport)
    expected, allowed = losses_and_graph_breaks(stock.fully_shard, compiled)
    assert losses == expected and breaks <= allowed
