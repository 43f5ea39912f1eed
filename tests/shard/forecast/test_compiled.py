"""What a forecast of compiled modules assumes: the compiler's partition keeps about what autograd does, or less.

Measured on the partition of forward and backward alone, which is all that decides what is kept; no kernel is built.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from yafsdp_like.models import Decoder, DecoderConfig

TOKENS = torch.zeros(2, 128, dtype=torch.int64)
ROWS = torch.zeros(4, 128, 64)


def decoder() -> nn.Module:
    return Decoder(DecoderConfig(64, 2, 4, 2, 96, 512)).to(torch.bfloat16)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def kept(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes of storages that a forward saves for its backward, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            saved[address] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    nbytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    output.sum().backward()
    return nbytes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, while it compiles
@pytest.mark.parametrize(
    ("make", "args", "most"),
    [(decoder, (TOKENS,), 0.7), (perceptron, (ROWS,), 1.0), (encoder, (ROWS,), 1.1)],
)
def test_a_partition_keeps_little_more_than_autograd_and_of_a_decoder_much_less(
    make: Callable[[], nn.Module], args: tuple[Tensor, ...], most: float
) -> None:
    torch.compiler.reset()
    model = make()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition")
    plain, partitioned = kept(model, lambda: model(*args)), kept(model, lambda: compiled(*args))
    assert 0 < partitioned <= most * plain, partitioned / plain
