"""Code written for FSDP2, libraries' and torch's own: it runs, or an error names the method that is not supported."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as stock
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import yafsdp_like as ours
from tests.ranks import on_ranks, run_ranks
from tests.training import full, world_mesh
from tests.zoo import FEATURES, Block

both_transports = pytest.mark.parametrize("transport", ["process_group", "peer"])


@on_ranks()
def test_a_sharded_module_is_an_fsdp_module_of_torchs_too() -> None:
    """Prevents: libraries that ask isinstance and do nothing, or shard it again."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ours.fully_shard(model[0], mesh=world_mesh())
    ours.fully_shard(model, mesh=world_mesh())
    for module in (model, model[0]):
        assert isinstance(module, stock.FSDPModule) and isinstance(module, ours.FSDPModule)
        assert type(module).__mro__[2] in (nn.Sequential, nn.Linear)  # where torch looks for the original class
        assert stock.fully_shard.state(module) is ours.fully_shard.state(module) is not None  # type: ignore[attr-defined]
    assert not isinstance(model[1], stock.FSDPModule)
    assert type(model[:1]) is nn.Sequential
    with pytest.raises(AssertionError, match="can only be applied to a module once"):
        stock.fully_shard(model, mesh=world_mesh())


@on_ranks(1)
def test_names_are_where_torch_has_them() -> None:
    """Prevents: an ImportError where a script takes its names from here."""
    for name in dir(stock):
        if name in ("CPUOffloadPolicy", "DataParallelMeshDims", "register_fsdp_forward_method", "share_comm_ctx"):
            assert hasattr(ours, name)


@on_ranks(1)
def test_fsdp2s_log_has_each_phase_of_each_unit() -> None:
    """Prevents: TORCH_LOGS="+fsdp" that shows nothing of what runs."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for module in (*model, model):
        ours.fully_shard(module, mesh=world_mesh())
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("torch.distributed.fsdp")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        model(torch.ones(1, 2)).sum().backward()
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert lines[0] == "FSDP::root_pre_forward" and lines[-1] == "FSDP::root_post_backward"
    assert [line for line in lines if line.endswith(("(0)", "(1)"))] == [
        "FSDP::pre_forward (0)",
        "FSDP::post_forward (0)",
        "FSDP::pre_forward (1)",
        "FSDP::post_forward (1)",
        "FSDP::pre_backward (1)",
        "FSDP::post_backward (1)",
        "FSDP::pre_backward (0)",
        "FSDP::post_backward (0)",
    ]


@on_ranks(1)
def test_every_method_of_fsdp2_is_there() -> None:
    """Prevents: torch's own method running on what is not its module."""
    model: Any = ours.fully_shard(nn.Linear(2, 2), mesh=world_mesh())
    for name in dir(stock.FSDPModule):
        if not name.startswith("_"):
            assert getattr(type(model), name) is not getattr(stock.FSDPModule, name), name
    model.set_separate_reduce_scatter_group()
    model.set_allocate_memory_from_process_group_for_comm(False)
    with pytest.warns(UserWarning, match=r"group\(False\) does nothing here: reductions always have"):
        model.set_separate_reduce_scatter_group(False)
    with pytest.warns(UserWarning, match="for_comm does nothing here: collectives work on planned memory"):
        model.set_allocate_memory_from_process_group_for_comm(True)
    with pytest.warns(UserWarning, match='does nothing here: .* already .transport="peer"'):
        model.set_symm_mem_for_comm()
    with pytest.raises(ValueError, match="expected backend to be \"NCCL\", found 'CUDA'"):
        model.set_symm_mem_for_comm("CUDA")
    model.set_reduce_scatter_divide_factor(4.0)
    assert ours.fully_shard.state(model).unit.policy.gradient_divisor == 4.0  # type: ignore[attr-defined]
    for wrong, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="max_input_buffers must be"):
            model.set_reduce_scatter_max_input_buffers(wrong)
    for call in (model.set_modules_to_forward_prefetch, model.set_modules_to_backward_prefetch):
        with pytest.raises(ValueError, match="Expects FSDPModule but got"):
            call([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="should be a bool"):
        model.set_reshard_after_forward(2)
    ours.share_comm_ctx([model, model])
    stock.share_comm_ctx([model, model])
    with pytest.raises(ValueError, match="expects modules that fully_shard returned, found Linear"):
        ours.share_comm_ctx([nn.Linear(2, 2)])


@on_ranks(1)
def test_methods_of_torchs_main_branch_that_are_not_here_say_what_to_do() -> None:
    """Prevents: an AttributeError, or torch's own method where the installed torch has it."""
    model: Any = ours.fully_shard(nn.Linear(2, 2), mesh=world_mesh())
    for name in ("get_pending_gradients", "synchronize_gradients"):
        with pytest.raises(NotImplementedError, match=rf"{name} of FSDPLinear is not supported: .*finalize_backward"):
            getattr(model, name)()


# --- other methods as forwards ---


class Coder(nn.Module):
    """Computes by methods of other names, one of which calls the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()
        self.scale = nn.Parameter(torch.full((FEATURES,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale

    def encode(self, x: torch.Tensor, *, power: int = 1) -> torch.Tensor:
        return self.inner(x) * self.scale**power

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return self(self(x)) * self.scale

    def fail(self, x: torch.Tensor) -> torch.Tensor:
        self(x)
        raise KeyError("as asked for")


def coder(register: Callable[[nn.Module, str], None], transport: str, **options: Any) -> tuple[Any, Any]:
    plain, model = Coder(), Coder()
    model.load_state_dict(plain.state_dict())
    ours.fully_shard(model.inner, mesh=world_mesh(), transport=transport, **options)
    ours.fully_shard(model, mesh=world_mesh(), transport=transport, **options)
    for name in ("encode", "twice", "fail"):
        register(model, name)
    return model, plain


registers = pytest.mark.parametrize(
    "register", [ours.register_fsdp_forward_method, stock.register_fsdp_forward_method], ids=["ours", "torch"]
)


@both_transports
@registers
def test_a_registered_method_is_a_forward(register: Any, transport: str) -> None:
    """Prevents: a method that stays a plain one, and fails on sharded weights, and one that may not call the module."""
    run_ranks(call_methods, register, transport)


def call_methods(register: Any, transport: str) -> None:
    model, plain = coder(register, transport)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, plain)]
    calls: list[Callable[[Any, torch.Tensor], torch.Tensor]] = [
        lambda m, x: m.encode(x, power=2),
        lambda m, x: m.twice(x),
        lambda m, x: m.inner(x) + m.encode(x),
        lambda m, x: m(x),
        lambda m, x: m.twice(m.encode(x)),
    ]
    for step, call in enumerate(calls):
        x = torch.ones(2, FEATURES) * 0.1 * (step + 1)
        with torch.no_grad():
            torch.testing.assert_close(call(model, x), call(plain, x))
            assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            call(m, x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(KeyError, match="as asked for"):
            model.fail(x)
    for sharded, whole in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(sharded), whole.detach())


@on_ranks()
def test_a_registered_method_casts_as_forward_does() -> None:
    """Prevents: methods that compute on parameters in bf16 and inputs in fp32."""
    policy = ours.MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32)
    model, _ = coder(ours.register_fsdp_forward_method, "process_group", mp_policy=policy)
    seen: list[torch.dtype] = []
    model.inner.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert model.encode(torch.ones(2, FEATURES)).dtype is torch.float32
    assert seen == [torch.bfloat16]


@on_ranks(1)
def test_registering_what_is_no_method_is_an_error_and_of_a_plain_module_is_nothing() -> None:
    """Prevents: code that also runs unsharded needing a case of its own."""
    plain = Coder()
    ours.register_fsdp_forward_method(plain, "encode")
    assert "encode" not in vars(plain)
    model = ours.fully_shard(Coder(), mesh=world_mesh())
    with pytest.raises(ValueError, match="does not have a method nothing"):
        ours.register_fsdp_forward_method(model, "nothing")


@both_transports
def test_a_method_that_is_no_forward_says_how_to_make_it_one(transport: str) -> None:
    """Prevents: an error about mixed tensors, which names neither the method nor what to do."""
    run_ranks(call_unregistered, transport)


def call_unregistered(transport: str) -> None:
    model, _ = coder(lambda module, name: None, transport)
    x = torch.ones(2, FEATURES)
    with pytest.raises(RuntimeError, match=r"FSDPCoder.encode.* register_fsdp_forward_method\(module, 'encode'\) once"):
        model.encode(x)
    with pytest.raises(KeyError, match="as asked for"):
        model.fail(x)
    ours.register_fsdp_forward_method(model, "encode")
    assert model.encode(x).shape == x.shape


class Delegating(Coder):
    """Its forward calls other methods, which must stay as fast as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.helped(x) for _ in range(2)]).sum(0)

    def helped(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x)

    def unshard(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x


@on_ranks(1)
def test_methods_that_forward_calls_are_left_alone() -> None:
    """Prevents: one Python call more for each call inside of forward; and FSDP2's methods hidden by a model's own."""
    model: Any = ours.fully_shard(Delegating(), mesh=world_mesh())
    assert {name for name in vars(type(model)) if not name.startswith("_")} == {"twice", "fail"}
    assert type(model).encode is Coder.encode
    assert type(model).unshard is ours.FSDPModule.unshard


# --- state dicts ---


@on_ranks()
def test_a_state_dict_that_does_not_fit_says_what_differs_first() -> None:
    """Prevents: a list of all keys, twice, to be compared by eye; and whole tensors refused without a way to load."""
    model, plain = coder(lambda module, name: None, "process_group")
    own = model.state_dict()
    wrapped = {f"module.{name}": value for name, value in own.items()}
    with pytest.raises(RuntimeError, match=r"first key that differs: the model has '(.*)', the state dict 'module.\1'"):
        model.load_state_dict(wrapped)
    assert model.load_state_dict(wrapped, strict=False).unexpected_keys == list(wrapped)
    with pytest.raises(RuntimeError, match=r"whole tensors, and the model's are sharded: load it by .*full_state_dict"):
        model.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        model.load_state_dict(own | {"scale": torch.ones(FEATURES + 1)})
    assert not model.load_state_dict(dict(reversed(own.items()))).missing_keys


# --- pipelining ---


@pytest.mark.filterwarnings("ignore")  # of torch.distributed.pipelining's own calls
@both_transports
def test_torchs_pipelining_reduces_what_microbatches_left(transport: str) -> None:
    """Prevents: stages whose gradients stay in their slots, or a crash when the schedule asks for them."""
    run_ranks(pipeline, transport, world_size=4)


def pipeline(transport: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    torch.manual_seed(0)
    layers = [nn.Sequential(Block(), Block()) for _ in range(2)]
    batches = torch.randn(2, 4, FEATURES).unbind()  # one for each replica
    index, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    for batch in batches:
        for half in batch.chunk(2):
            layers[1](layers[0](half)).square().mean().backward()
    stage = layers[index]
    expected = {name: p.grad / 4 for name, p in stage.named_parameters()}
    stage.zero_grad()
    for module in (*stage, stage):
        ours.fully_shard(module, mesh=mesh["dp"], transport=transport)
    placed = PipelineStage(stage, index, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    schedule = ScheduleGPipe(placed, n_microbatches=2, loss_fn=lambda y, target: (y - target).square().mean())
    for _ in range(2):
        if index == 0:
            schedule.step(batches[replica])
        else:
            schedule.step(target=torch.zeros(4, FEATURES))
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(full(parameter.grad), expected[name])
        stage.zero_grad()
    dist.barrier()
