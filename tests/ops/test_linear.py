"""Linear layers that write their weights' gradients where a sink says, against torch's own."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yafsdp_like.ops import linear as linear_module
from yafsdp_like.ops.linear import attach, install


class Slot:
    """A sink over a tensor of its own; starts with garbage, so that a first write that adds is noticed."""

    def __init__(self, weight: Tensor, dtype: torch.dtype | None = None) -> None:
        self.view = torch.full_like(weight.detach(), 7, dtype=dtype or weight.dtype)
        self.num_opened = 0
        self.is_open = True

    def withdraw(self) -> Tensor | None:
        return None

    def check_readable(self) -> None:
        pass

    def open(self) -> tuple[Tensor, bool] | None:
        if not self.is_open:
            return None
        self.num_opened += 1
        return self.view, self.num_opened > 1


class Block(nn.Module):
    """Linear layers with and without bias, one used twice on different inputs and once more on the same."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim, bias=False)
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.relu(self.up(y))) + self.mix(self.mix(y)) + self.mix(y)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def with_slots(model: nn.Module, dtype: torch.dtype | None = None) -> list[Slot]:
    """Installs every linear layer, each weight with a slot of its own."""
    slots = {}
    for module in linears(model):
        install(module)
        if module.weight not in slots:
            slots[module.weight] = Slot(module.weight, dtype)
            attach(module.weight, slots[module.weight])
    return list(slots.values())


def completions(model: nn.Module) -> list[tuple[str, bool]]:
    """Filled with (name, whether .grad is None) whenever autograd completes a weight's gradient."""
    seen: list[tuple[str, bool]] = []
    for name, param in model.named_parameters():
        if param.dim() == 2:
            param.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad is None)))
    return seen


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, list[Slot]]:
    """The same model as torch runs it, and with slots."""
    torch.manual_seed(0)
    plain = make()
    model = copy.deepcopy(plain)
    return plain, model, with_slots(model)


def assert_same_gradients(plain: nn.Module, model: nn.Module, slots: list[Slot]) -> None:
    weights = {id(module.weight): module.weight for module in linears(plain)}.values()
    torch.testing.assert_close([slot.view for slot in slots], [weight.grad for weight in weights])
    for (name, expected), param in zip(plain.named_parameters(), model.parameters(), strict=True):
        if not any(expected is weight for weight in weights):
            torch.testing.assert_close(param.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")


def layer(bias: bool = True) -> nn.Linear:
    return nn.Linear(6, 5, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (2, 0, 6)])
def test_inputs_of_any_rank_get_the_bits_that_torch_makes(shape: tuple[int, ...], bias: bool) -> None:
    plain, model, (slot,) = pair(lambda: layer(bias))
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = model(y), plain(x)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(y.grad, x.grad)
    assert torch.equal(slot.view, plain.weight.grad)
    assert model.weight.grad is None
    assert not bias or torch.equal(model.bias.grad, plain.bias.grad)


def test_gradients_and_inputs_need_not_be_contiguous() -> None:
    plain, model, slots = pair(layer)
    x = torch.randn(6, 4, 3).permute(1, 2, 0)
    for module in (plain, model):
        module(x).sum().backward()  # an expanded gradient
        module(x).transpose(0, 1).square().sum().backward()
    assert_same_gradients(plain, model, slots)


def test_a_slot_in_fp32_gets_the_rounded_product_of_bf16() -> None:
    torch.manual_seed(0)
    plain = layer().bfloat16()
    model = copy.deepcopy(plain)
    (slot,) = with_slots(model, torch.float32)
    x = torch.randn(3, 6).bfloat16()
    plain(x).sum().backward()
    model(x).sum().backward()
    assert torch.equal(slot.view, plain.weight.grad.float())
    model(x).sum().backward()
    assert torch.equal(slot.view, 2 * plain.weight.grad.float())


def through_checkpoint(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, x: checkpoint(model, x, use_reentrant=reentrant)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: model(x),
        lambda model, x: model(model(x)),
        through_checkpoint(True),
        through_checkpoint(False),
    ],
    ids=["once", "twice", "reentrant", "non-reentrant"],
)
def test_weights_used_several_times_and_recomputed_sum_up_over_backwards(run: Callable[..., Tensor]) -> None:
    plain, model, slots = pair(Block)
    seen = completions(model)
    for _ in range(2):
        x = torch.randn(3, 5, 8, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        seen.clear()
        run(plain, x).square().sum().backward()
        run(model, y).square().sum().backward()
        torch.testing.assert_close(y.grad, x.grad)
        assert sorted(seen) == [("down.weight", True), ("mix.weight", True), ("up.weight", True)]
    assert_same_gradients(plain, model, slots)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def test_a_weight_with_other_uses_is_completed_once_with_what_they_sent() -> None:
    """The slot's part and autograd's part are the gradient together."""
    plain, model, (slot,) = pair(Tied)
    seen = completions(model)
    tokens = torch.tensor([[1, 2, 3], [3, 4, 10]])
    plain(tokens).square().sum().backward()
    model(tokens).square().sum().backward()
    assert seen == [("embed.weight", False)]
    torch.testing.assert_close(slot.view + model.embed.weight.grad, plain.embed.weight.grad)


def test_several_layers_on_one_weight_complete_it_once_without_a_gradient() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
        model[1].weight = model[0].weight
        return model

    plain, model, slots = pair(make)
    seen = completions(model)
    x = torch.randn(3, 6)
    plain(x).square().sum().backward()
    model(x).square().sum().backward()
    assert seen == [("0.weight", True)]
    assert_same_gradients(plain, model, slots)


def test_a_sink_that_is_not_open_leaves_the_gradient_to_autograd() -> None:
    plain, model, (slot,) = pair(layer)
    slot.is_open = False
    x = torch.randn(3, 6)
    plain(x).sum().backward()
    model(x).sum().backward()
    assert torch.equal(model.weight.grad, plain.weight.grad)


def grad_of_input(model: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(model(x).square().sum(), x)[0]


def second_order(model: nn.Module, x: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), model.weight)[0]


def in_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.autograd.grad(model(x).float().sum(), model.weight)[0]


def in_functorch(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda row: model(row).square().sum()))(x)


def of_the_weight(model: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(model(x).square().sum(), model.weight)[0]


@pytest.mark.parametrize("run", [grad_of_input, second_order, in_autocast, in_functorch, of_the_weight])
def test_whatever_is_no_plain_backward_is_as_torch_does_it(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Prevents: a slot that counts gradients which were asked for elsewhere, or not at all."""
    plain, model, (slot,) = pair(layer)
    x = torch.randn(3, 6, requires_grad=True)
    torch.testing.assert_close(run(model, x), run(plain, x))
    assert slot.num_opened == 0


def test_frozen_weights_and_no_grad_write_nothing() -> None:
    _, model, (slot,) = pair(layer)
    with torch.no_grad():
        assert not model(torch.randn(3, 6)).requires_grad
    model.weight.requires_grad_(False)
    model(torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert slot.num_opened == 0
    assert model.weight.grad is None


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_only_torchs_own_forward_is_replaced_and_only_once() -> None:
    plain, scaled, other, overridden = layer(), Scaled(6, 5), nn.LayerNorm(6), layer()
    overridden.forward = lambda x: x
    kept = overridden.forward
    for module in (plain, scaled, other, overridden):
        install(module)
    installed = plain.forward
    install(plain)
    assert plain.forward is installed
    assert installed.__func__ is linear_module.forward
    assert "forward" not in vars(scaled) and "forward" not in vars(other)
    assert overridden.forward is kept


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
def test_an_installed_layer_prints_saves_and_copies_as_before(copied: Callable[[nn.Module], nn.Module]) -> None:
    """Prevents: a copy that computes with the original's weight."""
    plain = Block()
    text, names = str(plain), list(plain.state_dict())
    for module in linears(plain):
        install(module)
    assert (str(plain), list(plain.state_dict())) == (text, names)
    assert all(type(module) is nn.Linear for module in linears(plain))
    twin = copied(plain)
    x = torch.randn(3, 8)
    expected = plain(x)
    with torch.no_grad():
        for param in plain.parameters():
            param.zero_()
    assert torch.equal(twin(x), expected)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def compiles_once() -> Any:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_serves_all_compiled_blocks_of_a_shape(backend: str, compiles_once: None) -> None:
    """Steps, accumulation and blocks called twice before their backward, all without a second compilation."""
    plain, model, slots = pair(Stack)
    seen = completions(model)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    for twice in (False, False, True):
        x = torch.randn(3, 5, 8, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        seen.clear()
        for module, inputs in ((plain, x), (model, y)):
            out = module(module(inputs)) if twice else module(inputs)
            out.square().mean().backward()
        torch.testing.assert_close(y.grad, x.grad)
        assert sorted(seen) == sorted((name, True) for name, p in model.named_parameters() if p.dim() == 2)
    assert_same_gradients(plain, model, slots)
    assert [slot.num_opened for slot in slots] == [4, 4, 12] * 4
    torch.autograd.grad(model(y).sum(), y)
    assert [slot.num_opened for slot in slots] == [4, 4, 12] * 4


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_block_leaves_in_grad_what_its_sink_does_not_take(compiles_once: None) -> None:
    plain, model, slots = pair(Block)
    for slot in slots:
        slot.is_open = False
    seen = completions(model)
    model.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, 8)
    plain(x).square().mean().backward()
    model(x).square().mean().backward()
    assert sorted(seen) == [("down.weight", False), ("mix.weight", False), ("up.weight", False)]
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_a_deleted_weight_leaves_no_number_behind() -> None:
    weight = nn.Parameter(torch.randn(5, 6))
    numbered = len(linear_module._weights)
    attach(weight, Slot(weight))
    assert len(linear_module._weights) == numbered + 1
    F.linear(torch.randn(3, 6), weight)
    del weight
    assert len(linear_module._weights) == numbered
