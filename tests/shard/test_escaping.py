"""What a unit returns keeps its values when the unit's slot goes to others; debug mode finds views kept elsewhere."""

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributions import Independent, Normal
from torch.utils.checkpoint import checkpoint

from tests.ranks import on_ranks
from tests.shard.test_optimizer_step import TRANSPORTS
from tests.training import full, ours, world_mesh
from tests.twins import Twins, spilling
from tests.zoo import FEATURES, Batch, Chain, Specimen, blocks, layers_of, vectors

transports = pytest.mark.parametrize("transport", TRANSPORTS)


def views(q: nn.Parameter) -> dict[str, Any]:
    return {
        "itself": q,
        "expanded": q.expand(3, *q.shape),
        "slice": q[1:],
        "reshaped": q.reshape(-1),
        "transposed": q.t(),
        "nested": {"deep": [(q.unsqueeze(0),)]},
        "twice": (q, q[:2]),
        "detached": q.detach(),
    }


class Slotted:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


HOLDERS = {
    "object": lambda q: SimpleNamespace(held=q),
    "slots": Slotted,
    "deque": lambda q: deque([q[1:]]),
    "list of objects": lambda q: [SimpleNamespace(held=[SimpleNamespace(held=q.expand(2, *q.shape))])],
    "distribution": lambda q: Normal(q, torch.ones_like(q)),
    "nested distribution": lambda q: Independent(Normal(q.expand(2, *q.shape), torch.ones(())), 1),
}


def held(value: Any) -> torch.Tensor:
    """The one tensor that a holder was made of."""
    while not isinstance(value, torch.Tensor):
        if isinstance(value, (list, deque)):
            value = value[0]
        elif isinstance(value, Independent):
            value = value.base_dist
        else:
            value = value.loc if isinstance(value, Normal) else value.held
    return value


class Queries(nn.Module):
    """Returns its parameter beside its input, as DETR's queries and learned positions are returned."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.linspace(-1, 1, FEATURES * FEATURES).view(FEATURES, FEATURES))
        self.kind = kind

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return x, views(self.q)[self.kind]


class Uses(nn.Module):
    """Blocks that pass on and use what came before them."""

    def __init__(self, kind: str, recomputes: str = "") -> None:
        super().__init__()
        self.first, self.layers = Queries(kind), nn.ModuleList(blocks(4))
        self.recomputes = recomputes

    def forward(self, x: torch.Tensor) -> Any:
        if self.recomputes:
            return checkpoint(self.run, x, use_reentrant=self.recomputes == "reentrant")
        return self.run(x)

    def run(self, x: torch.Tensor) -> Any:
        x, given = self.first(x)
        for layer in self.layers:
            x = layer(x + sum(t.mean() for t in flat(given)))
        return x


class Holds(nn.Module):
    """A unit returns its parameter inside an object, other units run, and the object is looked at."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.layers = Holder(kind), nn.ModuleList(blocks(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x, held(given)


class Holder(Queries):
    def __init__(self, kind: str) -> None:
        super().__init__(kind="itself")
        self.holder = HOLDERS[kind]

    def forward(self, x: torch.Tensor) -> Any:
        return self.holder(self.q)


@pytest.mark.slow(unless=lambda kind, transport: transport == "peer" or kind == "object")
@transports
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", sorted(HOLDERS))
@on_ranks()
def test_a_parameter_that_a_unit_returns_inside_an_object_keeps_its_values(
    kind: str, inference: bool, transport: Any
) -> None:
    """Prevents: the bytes of a later unit in a distribution, or in an object of the user's own class."""
    torch.manual_seed(0)
    model = Holds(kind)
    right = held(model.first(None)).detach().clone()
    for layer in (model.first, *model.layers, model):
        ours.fully_shard(layer, mesh=world_mesh(), transport=transport)
    with torch.inference_mode(inference):
        for _ in range(2):
            assert torch.equal(model(torch.ones(2, FEATURES))[1], right)


class Actor(nn.Module):
    """A policy whose forward returns a distribution, as in reinforcement learning."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(2, 2, bias=False)
        self.std = nn.Parameter(torch.ones(2))
        nn.init.ones_(self.mean.weight)

    def forward(self, x: torch.Tensor) -> Normal:
        return Normal(self.mean(x), self.std.expand(len(x), 2))


@transports
@pytest.mark.parametrize("reshards", [None, True])
@on_ranks()
def test_a_model_that_returns_a_distribution_trains(reshards: bool | None, transport: Any) -> None:
    """Prevents: a backward whose start is not noticed, and which leaves no gradient.

    At mean 2 and std 1, the log-density at 5 has the slopes 3 and 3 * 3 - 1 = 8.
    """
    model = ours.fully_shard(Actor(), mesh=world_mesh(), transport=transport, reshard_after_forward=reshards)
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(1, 2)).log_prob(torch.full((1, 2), 5.0)).sum().backward()
        assert full(model.std.grad).tolist() == [8.0, 8.0]
        assert full(model.mean.weight.grad).tolist() == [[3.0, 3.0], [3.0, 3.0]]


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in (value.values() if isinstance(value, dict) else value) for t in flat(v)]


def using(kind: str, recomputes: str = "") -> Specimen:
    def batch(generator: torch.Generator, step: int) -> Batch:
        return Batch((torch.randn(3, FEATURES, generator=generator, requires_grad=recomputes == "reentrant"),))

    return Specimen(lambda: Uses(kind, recomputes), batch, lambda model: [model.first, *model.layers])


@pytest.mark.slow(unless=lambda kind, transport: transport == "peer" or kind in ("itself", "slice"))
@transports
@pytest.mark.parametrize("kind", sorted(views(nn.Parameter(torch.zeros(2, 2)))))
@on_ranks()
def test_a_unit_may_return_its_parameter_and_any_view_of_it(kind: str, transport: Any) -> None:
    """Prevents: units that come later computing on the bytes of whatever was gathered in the returned one's place."""
    twins = Twins(using(kind), transport=transport)
    twins.train(0, 1)
    with torch.no_grad():
        twins.losses(2)
    with torch.inference_mode():
        twins.losses(3)


@pytest.mark.filterwarnings("ignore::yafsdp_like.SpillWarning")  # whole forwards are recomputed in backward
@pytest.mark.parametrize("recomputes", ["reentrant", "not reentrant"])
@on_ranks()
def test_a_returned_parameter_is_right_in_recomputation(recomputes: str) -> None:
    """Prevents: a recomputed forward saving what the first one did not, or handing out a slot."""
    Twins(using("expanded", recomputes)).train(0, 1)


@transports
@on_ranks()
def test_what_the_root_returns_stays_as_it_was_when_weights_change(transport: Any) -> None:
    """Prevents: an output of an earlier step showing the weights of a later one."""
    model = Queries("itself")
    ours.fully_shard(model, mesh=world_mesh(), transport=transport)
    _, returned = model(torch.ones(2, FEATURES))
    before = returned.detach().clone()
    returned.sum().backward()
    with torch.no_grad():
        model.q.mul_(100.0)
    with torch.no_grad():
        model(torch.ones(2, FEATURES))
    assert torch.equal(returned, before)
    assert torch.equal(full(model.q.grad), torch.ones(FEATURES, FEATURES))


@on_ranks()
def test_an_output_that_shows_no_slot_is_returned_as_it_is() -> None:
    """Prevents: copies of outputs that need none."""
    model = ours.fully_shard(nn.Linear(FEATURES, FEATURES), mesh=world_mesh())
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output), prepend=True)
    with torch.no_grad():
        output = model(torch.ones(2, FEATURES))
    assert output is seen[0]


# --- debug mode ---


class Keeps(nn.Linear):
    """Keeps a view of its weight where others find it."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        super().__init__(FEATURES, FEATURES)
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(self.weight.detach().view(-1))
        return super().forward(x)


class Reads(nn.Linear):
    """Adds what another layer has kept."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        super().__init__(FEATURES, FEATURES)
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.kept[-1].sum()


@transports
@pytest.mark.filterwarnings("ignore::yafsdp_like.SpillWarning")  # the error holds the failed forward's graph
@pytest.mark.parametrize("after_a_step", [False, True])
@on_ranks()
def test_debug_mode_names_the_unit_that_reads_a_view_kept_elsewhere(after_a_step: bool, transport: Any) -> None:
    kept: list[torch.Tensor] = []
    layers = [Keeps(kept), nn.Linear(FEATURES, FEATURES), Reads(kept), nn.Linear(FEATURES, FEATURES)]
    model: Any = Chain(layers)
    for unit in (*layers, model):
        ours.fully_shard(unit, mesh=world_mesh(), transport=transport)
    if after_a_step:
        model(torch.ones(2, FEATURES)).sum().backward()
    model.set_debug_mode(True)
    with pytest.raises(RuntimeError, match=rf"output of 'layers\.2' holds NaN[\s\S]*rank {dist.get_rank()}"):
        model(torch.ones(2, FEATURES))
    model.set_debug_mode(False)
    model(torch.ones(2, FEATURES)).sum().backward()  # the failed forward has left nothing behind


@transports
@on_ranks()
def test_debug_mode_changes_no_number(transport: Any) -> None:
    twins = Twins(using("expanded"), transport=transport)
    twins.sharded.set_debug_mode(True)
    twins.train(0, 1, 2)
    twins.compare_parameters()


# --- backward that enters a unit unseen ---


@dataclass(eq=False)
class Record:
    x: torch.Tensor


class Wrapping(nn.Module):
    """Returns what it computes inside an object of its own class, or leaves it in an attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(FEATURES, FEATURES), how

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(self.linear(x))
        if self.how == "attribute":
            self.left = y
            return x
        return Record(y) if self.how == "dataclass" else SimpleNamespace(x=y)


class Unwrapping(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Wrapping(how), *blocks(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layers[0](x)
        x = self.layers[0].left if self.layers[0].how == "attribute" else out.x
        for layer in self.layers[1:]:
            x = layer(x)
        return x


@transports
@pytest.mark.parametrize("how", ["dataclass", "attribute", "object"])
@on_ranks()
def test_a_backward_that_enters_a_released_unit_unseen_is_an_error(how: str, transport: Any) -> None:
    """Prevents: gradients computed with the parameters of whatever unit was gathered last."""
    twins = Twins(Specimen(lambda: Unwrapping(how), vectors(FEATURES), layers_of), transport=transport)
    if how == "dataclass":
        twins.train(0, 1)
        return
    with pytest.raises(RuntimeError, match=r"gradient of .layers\.0\.linear\.\w+. came while .layers\.0. was released"):
        twins.backward(0)


class Regularizing(nn.Module):
    """Leaves a term of the loss, which reads its weight, in an attribute; its input takes no gradient further down."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.tanh(self.linear(x.detach()))
        self.term = self.linear.weight.square().sum() + y.mean()
        return y


class SumOfTerms(Chain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        terms = [self.layers[k].term for k in (0, 3, 5)]
        return out + torch.stack(terms).sum()  # type: ignore[arg-type]


@spilling
@transports
@on_ranks()
def test_a_backward_that_reads_a_released_unit_before_it_enters_is_an_error(transport: Any) -> None:
    """Prevents: a term's gradient computed with another unit's weights, and the rest of the unit's with its own."""
    build = lambda: SumOfTerms([Regularizing() for _ in range(8)])  # noqa: E731
    twins = Twins(Specimen(build, vectors(FEATURES), layers_of), transport=transport)
    loss, _ = twins.losses(0)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()
    kept = Twins(Specimen(build, vectors(FEATURES), layers_of), transport=transport, reshard_after_forward=False)
    kept.train(0, 1)
    kept.compare_parameters()
