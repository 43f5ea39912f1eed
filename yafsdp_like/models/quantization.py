"""How checkpoints store the matrices of a decoder's layers in fewer bits: what `quantization_config` says of them.

Owns the keys of that object, what may stand in them, and which modules it is about. What is not served is refused here
by its name, when the configuration is read. The tensors themselves are hf_quantized.py's.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Layout = Literal["fp8", "awq", "gptq", "packed"]
_PREFIXES = "", "model.", "language_model.model.", "model.language_model."  # of layers; the last two of Llava's
_MAX_GROUP = 1 << 20  # rows or columns
_ANY = object()  # value of a key that changes nothing here


@dataclass(frozen=True)
class Quantization:
    """How each matrix is stored that is not kept as it is: a code an element, and scales of groups of elements.

    A value is (code - zero) * scale, where codes of 8 bits are floats without a zero. Activations are not quantized,
    whatever the checkpoint says of them.
    """

    layout: Layout  # of files: names of tensors, and the order of codes in words
    bits: Literal[4, 8]
    group_rows: int = 1  # that share a scale
    group_columns: int | None = None  # that share a scale; None: all of a row
    has_zeros: bool = False  # each group has its own; else all codes are floats, or 8 is 0
    ordered: bool = False  # columns are grouped in an order of their own (act-order)
    zero_offset: int = 0  # what is added to a stored zero
    scale_dtype: torch.dtype = torch.float32
    kept: tuple[str, ...] = ()  # names of modules, or parts of them, or patterns behind "re:", which are not quantized

    def covers(self, module: str) -> bool:
        """Return whether the module of that name, `layers.0.mlp.up_proj` for one, is quantized."""
        names = [f"{prefix}{module}" for prefix in _PREFIXES]
        return not any(_is_named(name, kept) for kept in self.kept for name in names)

    def covers_all(self, modules: Sequence[str]) -> bool:
        """Return whether modules that are one product, or one stack of experts, are quantized.

        Raises ValueError where only some are.
        """
        covered = [self.covers(module) for module in modules]
        if any(covered) and not all(covered):
            one, other = modules[covered.index(True)], modules[covered.index(False)]
            raise ValueError(
                f"{one}, which is quantized, and {other}, which is not, are one product: all of them must be "
                "quantized, or none"
            )
        return all(covered)

    def rows_that_share(self, sizes: Iterable[int]) -> int:
        """Return how many rows share a scale where matrices of so many rows each are one: a divisor of all."""
        return math.gcd(self.group_rows, *sizes)


def _is_named(module: str, kept: str) -> bool:
    if kept.startswith("re:"):
        return re.match(kept[3:], module) is not None
    return f".{kept}." in f".{module}."


def quantization_of(raw: Mapping[str, Any]) -> Quantization | None:
    """What the content of a `config.json` says of quantized weights; None where they are not.

    Raises ValueError for what is not served, by its name.
    """
    said = _said(raw)
    if said is None:
        return None
    if not isinstance(said, Mapping):
        raise ValueError(f"quantization_config must be an object, found {said!r}")
    method = said.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise ValueError(f"quantized weights are served with quant_method {', '.join(_READERS)}, found {method!r}")
    quantization = _READERS[method](said)
    if said.get("lm_head"):
        raise ValueError(f"quantization_config.lm_head {said['lm_head']!r} is not served: only layers are quantized")
    return quantization


def kv_scales_problem(raw: Mapping[str, Any]) -> str:
    """What keeps the keys and values of a `config.json` out of pages of float8; "" where nothing does.

    They must be fp8 with one scale, if anything is said of them; AutoFP8 says "static" of those.
    """
    said = _said(raw)
    scheme = said.get("kv_cache_scheme") if isinstance(said, Mapping) else None
    if scheme is None or scheme == "static":
        return ""
    served = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True}
    if isinstance(scheme, Mapping) and all(scheme.get(key) in (None, value) for key, value in served.items()):
        return ""
    return f"quantization_config.kv_cache_scheme {scheme!r} is not served, only {served}"


def _said(raw: Mapping[str, Any]) -> Any:
    said = raw.get("quantization_config")
    return raw.get("compression_config") if said is None else said


def _fp8(said: Mapping[str, Any]) -> Quantization:
    """Per tensor or row, or per block as DeepSeek-V3 and Qwen3-FP8 are; scales multiply, whatever their name."""
    _check(said, fmt=("e4m3", "float8_e4m3fn"), is_checkpoint_fp8_serialized=(True,))
    kept = _kept(said, "modules_to_not_convert", "ignored_layers")
    block = said.get("weight_block_size")
    rows, columns = (1, None) if block is None else _block("weight_block_size", block)
    return Quantization("fp8", 8, rows, columns, kept=kept)


def _fbgemm(said: Mapping[str, Any]) -> Quantization:
    return Quantization("fp8", 8, kept=_kept(said, "modules_to_not_convert"))


def _awq(said: Mapping[str, Any]) -> Quantization:
    _check(said, bits=(4,), version=("gemm", "GEMM"), zero_point=(True,), modules_to_fuse=(_ANY,))
    columns = _group(said.get("group_size", 128))
    kept = _kept(said, "modules_to_not_convert")
    return Quantization("awq", 4, group_columns=columns, has_zeros=True, scale_dtype=torch.float16, kept=kept)


def _gptq(said: Mapping[str, Any]) -> Quantization:
    _check(
        said,
        bits=(4,),
        checkpoint_format=("gptq", "gptq_v2"),
        is_marlin_format=(False,),
        modules_in_block_to_quantize=(),
        pack_dtype=("int32",),
    )
    columns = _group(said.get("group_size", 128))
    return Quantization(
        "gptq",
        4,
        group_columns=columns,
        has_zeros=not _flag(said, "sym", True),
        ordered=_flag(said, "desc_act", False) and columns is not None,
        zero_offset=0 if said.get("checkpoint_format") == "gptq_v2" else 1,
        scale_dtype=torch.float16,
        kept=_left_out(said),
    )


def _left_out(said: Mapping[str, Any]) -> tuple[str, ...]:
    """What GPTQModel's ``dynamic`` leaves out: names that match a pattern behind "-:"; others would have other bits."""
    dynamic = said.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(pattern.startswith("-:") for pattern in dynamic):
        raise ValueError(f"quantization_config.dynamic {dynamic!r} is not served, only patterns that begin with '-:'")
    return _checked_patterns(f"re:{pattern[2:]}" for pattern in dynamic)


def _compressed(said: Mapping[str, Any]) -> Quantization | None:
    """compressed-tensors' own formats, of one group of all layers; None where keys and values alone are quantized."""
    _check(said, quantization_status=("compressed", "frozen"), sparsity_config=({}, {"format": "dense"}))
    groups = said.get("config_groups")
    if groups == {} and said.get("kv_cache_scheme"):
        return None
    if not isinstance(groups, Mapping) or len(groups) != 1:
        raise ValueError(f"quantization_config.config_groups is served with one group, found {groups!r}")
    (group,) = groups.values()
    if group.get("targets") != ["Linear"]:
        raise ValueError(f"quantization_config.targets is served as ['Linear'], found {group.get('targets')!r}")
    weights, file_format = group.get("weights") or {}, group.get("format") or said.get("format")
    kept, strategy = _kept(said, "ignore"), weights.get("strategy")
    kind = (file_format, weights.get("type"), weights.get("num_bits"))
    if kind in (("float-quantized", "float", 8), ("naive-quantized", "float", 8)):
        if strategy not in ("tensor", "channel", "block"):
            raise ValueError(f"quantization_config.strategy {strategy!r} is not served for float-quantized weights")
        rows, columns = _block("block_structure", weights.get("block_structure")) if strategy == "block" else (1, None)
        return Quantization("fp8", 8, rows, columns, kept=kept)
    if kind == ("pack-quantized", "int", 4) and strategy in ("group", "channel"):
        return _packed(weights, kept)
    raise ValueError(
        "weights of compressed-tensors are served as float-quantized of 8 bits, or pack-quantized of 4 by group or "
        f"channel, found format {file_format!r}, weights {weights!r}"
    )


def _packed(weights: Mapping[str, Any], kept: tuple[str, ...]) -> Quantization:
    if weights.get("actorder") not in (None, False, "weight", "static"):  # which reorder nothing that is stored
        raise ValueError(f"quantization_config.actorder {weights['actorder']!r} is not served")
    columns = _group(weights.get("group_size")) if weights.get("strategy") == "group" else None
    has_zeros = not _flag(weights, "symmetric", True)
    return Quantization("packed", 4, 1, columns, has_zeros, scale_dtype=torch.float16, kept=kept)


_READERS = {"fp8": _fp8, "fbgemm_fp8": _fbgemm, "compressed-tensors": _compressed, "awq": _awq, "gptq": _gptq}


def _check(said: Mapping[str, Any], **served: tuple[object, ...]) -> None:
    """Raise ValueError where a key is there, is not null, and has none of the values that are served."""
    for key, values in served.items():
        found = said.get(key)
        if found is not None and _ANY not in values and found not in values:
            raise ValueError(f"quantization_config.{key} {found!r} is not served, only {list(values) or [None]}")


def _flag(said: Mapping[str, Any], key: str, default: bool) -> bool:
    found = said.get(key, default)
    if not isinstance(found, bool):
        raise ValueError(f"quantization_config.{key} must be true or false, found {found!r}")
    return found


def _kept(said: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    names: list[str] = []
    for key in keys:
        found = said.get(key) or []
        if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
            raise ValueError(f"quantization_config.{key} must be a list of names, found {found!r}")
        names += found
    return _checked_patterns(names)


def _checked_patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Return names, some of which are patterns behind "re:"; raises ValueError for one that is none."""
    found = tuple(names)
    for name in found:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise ValueError(f"quantization_config: {name!r} is no pattern: {error}") from error
    return found


def _group(size: object) -> int | None:
    """None for -1: all of a row."""
    if size == -1:
        return None
    if not isinstance(size, int) or not 0 < size <= _MAX_GROUP or size % 32:
        raise ValueError(f"quantization_config.group_size is served as -1 or a multiple of 32, found {size!r}")
    return size


def _block(key: str, block: object) -> tuple[int, int]:
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= _MAX_GROUP for n in block):
        rows, columns = block
        if columns % 16 == 0:
            return rows, columns
    raise ValueError(f"quantization_config.{key} is served as [rows, a multiple of 16 columns], found {block!r}")
