"""Scales of keys and values in the safetensors files of Hugging Face directories, for pages of float8.

Owns their names. A key or value is what a page holds times its layer's scale, as `KVPages` has it; pages of other
dtypes hold keys and values as they are, and need no scale.

[Note: names of scales]
Below `model.layers.N.self_attn.`, as tools have written them over time: `k_scale` and `v_scale`, or one `kv_scale`
for both (compressed-tensors, AutoFP8), the same below `attn.` (vLLM's own modules), `k_proj.k_scale` and
`v_proj.v_scale` (ModelOpt), `k_proj.output_scale` and `v_proj.output_scale` (older compressed-tensors). Beside them
there may be scales of queries and of attention's probabilities, which are not rounded here.
"""

import math
import re
from collections.abc import Mapping

from yafsdp_like.checkpoint.safetensors import StoredTensor

KVScales = tuple[tuple[float, float], ...]  # of each layer's keys, and of its values

_OF_PAGES = re.compile(r"model\.layers\.\d+\.self_attn\.(?:(?:[kqv]|qkv)_proj\.|attn\.)?(?:[kqv]|kv|prob|output)_scale")
_KEYS = "k_scale", "attn.k_scale", "k_proj.k_scale", "qkv_proj.k_scale", "k_proj.output_scale"
_VALUES = "v_scale", "attn.v_scale", "v_proj.v_scale", "qkv_proj.v_scale", "v_proj.output_scale"
_BOTH = "kv_scale", "attn.kv_scale"


def without_kv_scales(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return all tensors but scales of queries, keys, values and probabilities."""
    return {name: tensor for name, tensor in stored.items() if not _OF_PAGES.fullmatch(name)}


def kv_scales_of(stored: Mapping[str, StoredTensor], num_layers: int) -> KVScales | None:
    """Read the scales of all layers' keys and values; None where there are none.

    Raises ValueError, with names, where only some layers have them, where they are not one number for a layer's keys
    and one for its values, and for numbers that are not above 0.
    """
    found = [[_tensor(stored, layer, names) for names in (_KEYS, _VALUES)] for layer in range(num_layers)]
    if not any(tensor for pair in found for tensor in pair):
        return None
    for layer, pair in enumerate(found):
        for tensor, name in zip(pair, (_KEYS[0], _VALUES[0]), strict=True):
            if tensor is None:
                raise ValueError(f"missing {_prefix(layer)}{name}, while other scales of keys and values are stored")
    return tuple((_value(keys), _value(values)) for keys, values in found if keys is not None and values is not None)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def _tensor(stored: Mapping[str, StoredTensor], layer: int, names: tuple[str, ...]) -> StoredTensor | None:
    return next((stored[n] for end in (*names, *_BOTH) if (n := f"{_prefix(layer)}{end}") in stored), None)


def _value(tensor: StoredTensor) -> float:
    if math.prod(tensor.spec.shape) != 1 or not tensor.spec.dtype.is_floating_point:
        raise ValueError(
            f"{tensor.name} of {tensor.spec.shape} {tensor.spec.dtype} is not served: a layer's keys have one scale, "
            "and its values one"
        )
    value = float(tensor.read().float().item())
    if not 0 < value < math.inf:
        raise ValueError(f"{tensor.name} must be above 0, found {value}")
    return value
