"""Models whose matrices are quantized as a published layout says, with random codes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from yafsdp_like.inference.plan.quantized_fields import SCALES, ZEROS
from yafsdp_like.inference.weights.loading import Model, RandomSource
from yafsdp_like.models.decoder import DecoderConfig
from yafsdp_like.models.quantization import Quantization

LAYOUTS = {
    "fp8": Quantization("fp8", 8),
    "fp8-block": Quantization("fp8", 8, group_rows=128, group_columns=128),
    "awq": Quantization("awq", 4, group_columns=128, has_zeros=True, scale_dtype=torch.float16),
    "gptq": Quantization("gptq", 4, group_columns=128, scale_dtype=torch.float16),
}
STD = 0.02  # of values, about: codes times scales
CODES_STD = {8: 1.0, 4: 4.6}  # of normal codes, and of even ones of 0 to 15
_AT_ONCE = 1 << 26  # elements that are drawn in fp32


def quantized_model(name: str, config: DecoderConfig, layout: str) -> Model:
    """A model of that shape with its layers' matrices in a layout of `LAYOUTS`."""
    quantized = replace(config, quantization=LAYOUTS[layout])
    return Model(f"{name}, {layout}", quantized, None, lambda device: RandomCodes.of(quantized, device))


@dataclass(frozen=True)
class RandomCodes:
    """A source of random codes, of scales that are all the same, and of other parameters' random values."""

    bits: int
    others: RandomSource
    generator: torch.Generator

    @classmethod
    def of(cls, config: DecoderConfig, device: torch.device) -> "RandomCodes":
        """Draw on `device`, the same each time."""
        assert config.quantization is not None, "a quantized model"
        others = RandomSource(replace(config, quantization=None), device)
        return cls(config.quantization.bits, others, torch.Generator(device).manual_seed(0))

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill a part of a parameter, as sources do."""
        if name.endswith(f".{SCALES}"):
            out.fill_(STD / CODES_STD[self.bits])
        elif name.endswith(f".{ZEROS}"):
            out.random_(7, 10, generator=self.generator)
        elif out.dtype == torch.uint8:
            out.random_(0, 256, generator=self.generator)
        elif out.dtype == torch.float8_e4m3fn:
            for part in out.split(_AT_ONCE):
                part.copy_(torch.randn(len(part), device=out.device, generator=self.generator))
        else:
            self.others.read_into(name, start, out)
