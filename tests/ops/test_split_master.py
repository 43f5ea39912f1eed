"""A float32 tensor on two halves behaves as the tensor of its values, to the bit."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from yafsdp_like.kernels.split import join, split
from yafsdp_like.memory.layout import contiguous_stride
from yafsdp_like.ops import split_master
from yafsdp_like.ops.split_master import SplitTensor, SplitValues


def all_kinds_of_values() -> Tensor:
    """Every exponent and sign with mantissas about the ties, infinities, denormals; no NaN."""
    high = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (high[:, None] + low).flatten().view(torch.float32)
    return values[~values.isnan()]


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def split_tensor(values: Tensor) -> SplitTensor:
    shape = tuple(values.shape)
    return SplitTensor(SplitValues(*split(values.flatten())), shape, contiguous_stride(shape))


def test_halves_make_the_value_again_bit_for_bit() -> None:
    values = all_kinds_of_values()
    assert torch.equal(bits(join(*split(values))), bits(values))


def test_the_upper_half_is_the_nearest_bfloat16() -> None:
    values = all_kinds_of_values()
    high, low = split(values)
    is_tie = low == -(1 << 15)
    assert torch.equal(high[~is_tie], values[~is_tie].bfloat16())
    finite = is_tie & values.isfinite() & high.isfinite()
    away, even = high[finite].double() - values[finite].double(), values[finite].bfloat16().double() - values[finite]
    assert torch.equal(away.abs(), even.abs())


def test_a_nan_stays_one_in_both() -> None:
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    high, low = split(nans)
    assert high.isnan().all()
    assert join(high, low).isnan().all()


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(0.3),
        lambda t: t.add_(torch.ones(6, 4), alpha=0.1),
        lambda t: t.copy_(torch.arange(24.0).view(6, 4) / 7),
        lambda t: t[1:3].zero_(),
        lambda t: t.view(-1)[5:9].fill_(0.7),
        lambda t: t.t()[2].add_(3.3),
        lambda t: t.detach().add_(0.123),
        lambda t: t.data.add_(0.123),
        lambda t: [chunk.mul_(i + 0.1) for i, chunk in enumerate(t.chunk(2))],
        lambda t: torch.add(torch.ones(6, 4), 0.7, out=t),
        lambda t: torch._foreach_mul_([t, t.new_ones(3)], 0.3),
        lambda t: t.normal_(generator=torch.Generator().manual_seed(3)),
        lambda t: t.clamp_(min=0.1),
        lambda t: t.__setitem__((slice(None), 1), 5.5),
    ],
)
def test_writes_in_place_are_those_of_a_plain_tensor(write: object) -> None:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    tensor, plain = split_tensor(values), values.clone()
    version = tensor._version
    write(tensor)  # type: ignore[operator]
    write(plain)  # type: ignore[operator]
    assert torch.equal(bits(tensor.joined()), bits(plain))
    assert tensor._version > version or not torch.equal(plain, values)


def test_a_write_in_place_returns_the_tensor_itself_and_counts() -> None:
    tensor = split_tensor(torch.randn(5))
    before = tensor._version
    assert tensor.mul_(2) is tensor
    assert tensor._version == before + 1


def test_what_reads_gets_plain_values() -> None:
    values = torch.randn(6, 4)
    tensor = split_tensor(values)
    for result, expected in [
        (tensor + 1, values + 1),
        (tensor.clone(), values),
        (tensor @ values.t(), values @ values.t()),
        (tensor.to(torch.float64), values.double()),
        (tensor.bfloat16(), values.bfloat16()),
        (torch.stack([tensor, tensor]), torch.stack([values, values])),
        (tensor.norm(), values.norm()),
        (copy.deepcopy(tensor), values),
    ]:
        assert type(result) is Tensor
        assert torch.equal(result, expected)
    assert tensor.tolist() == values.tolist()
    assert torch.equal(torch.from_numpy(tensor.numpy(force=True)), values)


def test_it_is_saved_as_a_plain_tensor() -> None:
    values, file = torch.randn(6, 4), io.BytesIO()
    torch.save({"w": split_tensor(values)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["w"]
    assert type(loaded) is Tensor
    assert torch.equal(loaded, values)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_torchs_optimizers_update_it_as_a_plain_tensor(options: dict[str, bool]) -> None:
    values = torch.randn(6, 4)
    params = [torch.nn.Parameter(split_tensor(values)), torch.nn.Parameter(values.clone())]
    optimizers = [torch.optim.AdamW([p], lr=0.01, **options) for p in params]
    for step in range(5):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.sin(values * step)
            optimizer.step()
    joined = params[0].data.joined()  # type: ignore[attr-defined]
    assert torch.equal(bits(joined), bits(params[1].data))


def test_a_write_leaves_the_halves_alone_until_it_is_settled() -> None:
    """Prevents: values that change in a compute shard while peers read it."""
    values = torch.randn(6, 4)
    tensor = split_tensor(values)
    halves = tensor.split_values
    high, low = halves.high.clone(), halves.low.clone()
    row = tensor[2]
    tensor.mul_(2)
    row.add_(1)
    expected = values * 2
    expected[2] += 1
    assert torch.equal(halves.high, high)
    assert torch.equal(halves.low, low)
    assert torch.equal(tensor.joined(), expected)
    assert torch.equal(row.joined(), expected[2])
    assert halves.settle()
    assert not halves.settle()
    assert torch.equal(halves.high, split(expected.flatten())[0])
    assert torch.equal(tensor.joined(), expected)
    assert torch.equal(row.joined(), expected[2])


def test_what_was_written_is_settled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: three times a parameter's memory in the cache of a stream that needs it once."""
    monkeypatch.setattr(split_master, "CHUNK", 5)
    sizes: list[int] = []
    monkeypatch.setattr(split_master, "split", lambda values: (sizes.append(values.numel()), split(values))[1])
    values = torch.randn(3, 4)
    tensor = split_tensor(values)
    tensor.mul_(2)
    assert tensor.split_values.settle() and sizes == [5, 5, 2]
    assert torch.equal(tensor.joined(), values * 2)


def test_reading_writes_nothing() -> None:
    tensor = split_tensor(torch.randn(6, 4))
    tensor.detach().t()[1].sum()
    tensor.view(2, 12) @ tensor.view(12, 2)
    assert tensor.split_values.written is None


@pytest.mark.parametrize(
    "like", [torch.zeros_like, torch.empty_like, torch.ones_like, lambda t, **k: torch.full_like(t, 2, **k)]
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_like_it_is_made_without_its_values(
    like: Callable[..., Tensor], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: as much memory again as a parameter has, where an optimizer makes its moments."""
    monkeypatch.setattr(SplitTensor, "joined", None)
    for values in (torch.randn(6, 4), torch.randn(6, 4).t()):
        tensor = split_tensor(values.t()).t() if values.stride(0) == 1 else split_tensor(values)
        found, expected = like(tensor, dtype=dtype), like(values, dtype=dtype)
        assert type(found) is Tensor
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert like is torch.empty_like or torch.equal(found, expected)


def test_its_upper_half_moves_without_its_values() -> None:
    values = torch.randn(6)
    tensor, place = split_tensor(values), torch.zeros(6, dtype=torch.bfloat16)
    tensor.split_values.move_high(place)
    tensor.mul_(2)
    assert torch.equal(tensor.joined(), values * 2)
    tensor.split_values.settle()
    assert torch.equal(place, split(values * 2)[0])


def test_bits_of_another_dtype_cannot_be_viewed() -> None:
    with pytest.raises(NotImplementedError, match="two halves"):
        split_tensor(torch.randn(4)).view(torch.int32)


def test_a_dtensor_on_it_works_as_on_a_plain_one(tmp_path: object) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        values = torch.randn(6, 4)
        param = torch.nn.Parameter(DTensor.from_local(split_tensor(values), mesh, [Shard(0)], run_check=False))
        with torch.no_grad():
            param.mul_(0.5).clamp_(max=0.2)
        expected = (values * 0.5).clamp(max=0.2)
        assert torch.equal(param.full_tensor(), expected)
        assert torch.equal(param.detach().to_local().clone(), expected)
        assert isinstance(param.to_local(), SplitTensor)
        assert isinstance(param.data.to_local(), SplitTensor)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("change", ["t_", "squeeze_", "resize_", "set_"])
def test_its_shape_cannot_be_changed_in_place(change: str) -> None:
    """Prevents: a call that does nothing, and a program that goes on as if it had."""
    arguments = {"resize_": (2,), "set_": (torch.zeros(4, 1),)}.get(change, ())
    with pytest.raises(NotImplementedError, match="fixed"):
        getattr(split_tensor(torch.randn(4, 1)), change)(*arguments)


@pytest.mark.parametrize("share", [lambda t: t.share_memory_(), torch.from_dlpack])
def test_memory_that_has_no_values_is_not_shared(share: Callable[[torch.Tensor], Any]) -> None:
    """Prevents: a null pointer, read."""
    with pytest.raises(TypeError, match="two halves"):
        share(split_tensor(torch.randn(4)))
