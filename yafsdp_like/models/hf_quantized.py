"""Quantized matrices in the safetensors files of Hugging Face directories: their tensors, and what these mean.

Owns the names and the order of codes of each published layout. What a configuration says is quantization.py's; how
matrices lie in memory and are multiplied, kernels/quantized_matrix.py's and kernels/quantized.py's.

[Note: published layouts]
Of a module of N rows and K columns, with G groups of columns; words are int32, of 8 codes, the first in the low bits:

    fp8      weight (N, K) float8, weight_scale or weight_scale_inv (1), (N), (N, 1) or (blocks of rows, blocks of
             columns): values are codes times scales under either name
    awq      qweight (K, N / 8), qzeros (G, N / 8), scales (G, N); words hold columns 0 2 4 6 1 3 5 7 of each 8
    gptq     qweight (K / 8, N), qzeros (G, N / 8), scales (G, N), g_idx (K): the group of each column
    packed   weight_packed (N, K / 8), weight_scale (N, G), weight_zero_point (N / 8, G), weight_shape

GPTQ's zeros are stored less 1 (``Quantization.zero_offset``). Its modules may have a bias of zeros, which is left out.

[Note: act-order]
With act-order g_idx is not sorted. Columns are then stored here in the order of their groups, and the product takes the
rows' columns in that order. Each group must have as many columns as the others, and projections that are one matrix
must have one order, as those have that were quantized with the same inputs. Every matrix of experts has its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from yafsdp_like.checkpoint.safetensors import StoredTensor
from yafsdp_like.kernels.codes import SYMMETRIC_ZERO
from yafsdp_like.kernels.quantized_matrix import packed_codes, run_of
from yafsdp_like.models.quantization import Quantization

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of columns in a word
_IN_ORDER = tuple(range(8))
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_CODES = {"fp8": "weight", "awq": "qweight", "gptq": "qweight", "packed": "weight_packed"}
_SCALES = {"fp8": ("weight_scale", "weight_scale_inv"), "packed": ("weight_scale",)}
_ZEROS = {"awq": "qzeros", "gptq": "qzeros", "packed": "weight_zero_point"}
_UNUSED = ("input_scale", "input_scale_ub", "activation_scale", "weight_shape", "input_zero_point")
_FIRST_OF_ONE = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # of projections that are one matrix
_CHUNK_NUMEL = 1 << 24  # codes that are unpacked at a time


@dataclass(frozen=True)
class StoredMatrix:
    """The tensors of one module; checked, not read."""

    module: str  # with the name that it has in files
    shape: tuple[int, int]  # N, K
    quantization: Quantization
    tensors: Mapping[str, StoredTensor]  # by the ends of their names

    @property
    def num_groups(self) -> int:
        """G."""
        columns = self.quantization.group_columns
        return 1 if columns is None else -(-self.shape[1] // columns)

    @property
    def scales(self) -> StoredTensor:
        """Of the one name, or the other."""
        names = _SCALES.get(self.quantization.layout, ("scales",))
        return next(self.tensors[name] for name in names if name in self.tensors)

    def problems(self) -> Iterator[str]:
        """Yield what is missing, of another shape, or of another dtype."""
        layout, scale_names = self.quantization.layout, _SCALES.get(self.quantization.layout, ("scales",))
        if not any(name in self.tensors for name in scale_names):
            yield f"missing {self.module}.{scale_names[0]}"
        else:
            spec, shapes = self.scales.spec, self._scale_shapes()
            dtypes = _FLOATS if self.quantization.bits == 8 else (self.quantization.scale_dtype,)
            if spec.shape not in shapes or spec.dtype not in dtypes:
                yield f"{self.scales.name} of {spec.shape} {spec.dtype}, expected {shapes} of {dtypes}"
        for name, (shape, dtype) in self._expected().items():
            found = self.tensors.get(name)
            if found is None:
                yield f"missing {self.module}.{name}"
            elif (found.spec.shape, found.spec.dtype) != (shape, dtype):
                yield f"{self.module}.{name} of {found.spec.shape} {found.spec.dtype}, expected {shape} {dtype}"
        if self.quantization.bits == 4 and not self._is_whole():
            yield f"{self.module} of {self.shape} is no whole number of words, or of groups of {layout}"

    def _is_whole(self) -> bool:
        rows, columns = self.shape
        return rows % 8 == 0 and columns % (self.quantization.group_columns or 32) == 0

    def _scale_shapes(self) -> list[tuple[int, ...]]:
        rows, quantization = self.shape[0], self.quantization
        if quantization.layout == "packed":
            return [(rows, self.num_groups)]
        if quantization.bits == 4:
            return [(self.num_groups, rows)]
        if quantization.group_columns is None:
            return [(), (1,), (1, 1), (rows,), (rows, 1)]
        return [(-(-rows // quantization.group_rows), self.num_groups)]

    def _expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of all but scales."""
        (rows, columns), groups, word = self.shape, self.num_groups, torch.int32
        layout, quantization = self.quantization.layout, self.quantization
        if layout == "fp8":
            return {"weight": (self.shape, torch.float8_e4m3fn)}
        if layout == "packed":
            zeros = {"weight_zero_point": ((rows // 8, groups), word)} if quantization.has_zeros else {}
            return {"weight_packed": ((rows, columns // 8), word), **zeros}
        codes = (columns, rows // 8) if layout == "awq" else (columns // 8, rows)
        order = {"g_idx": ((columns,), word)} if quantization.ordered or "g_idx" in self.tensors else {}
        return {"qweight": (codes, word), "qzeros": ((groups, rows // 8), word), **order}

    # --- values ---

    def read_codes(self, start: int, out: Tensor) -> None:
        """Read elements from ``start`` on of the codes as they lie in memory, (N, K) or (N, K / 2)."""
        rows, columns = self.shape
        if self.quantization.bits == 8:
            first, stop = start // columns, -(-(start + len(out)) // columns)
            codes = _all(self.tensors["weight"], first, stop).view(torch.uint8).flatten()
            out.view(torch.uint8).copy_(codes[start - first * columns :][: len(out)])
            return
        is_whole = len(out) == rows * columns // 2
        whole = out if is_whole else torch.empty(rows * columns // 2, dtype=torch.uint8, device=out.device)
        self._pack(whole.view(rows, columns // 2))
        if not is_whole:
            out.copy_(whole[start : start + len(out)])

    def _pack(self, out: Tensor) -> None:
        rows, columns = self.shape
        run = run_of(self.quantization.group_columns or columns)
        words = _all(self.tensors[_CODES[self.quantization.layout]]).to(out.device)
        order = self.order()
        order = torch.arange(columns, device=out.device) if order is None else order.long().to(out.device)
        at_once = max(_CHUNK_NUMEL // rows // (2 * run), 1) * 2 * run  # columns
        for first in range(0, columns, at_once):
            chosen = order[first : first + at_once]
            if self.quantization.layout == "awq":
                codes = _unpacked(words[chosen], _AWQ_PLACES).T
            elif self.quantization.layout == "gptq":
                codes = (words[chosen // 8] >> 4 * (chosen % 8)[:, None] & 15).T
            else:
                codes = words[:, chosen // 8] >> 4 * (chosen % 8) & 15
            out[:, first // 2 : (first + len(chosen)) // 2] = packed_codes(codes, run)

    def read_scales(self, rows_per_scale: int) -> Tensor:
        """Return the scales as they lie in memory, (N / rows_per_scale, G)."""
        scales = _all(self.scales)
        if self.quantization.bits == 4:
            return scales if self.quantization.layout == "packed" else scales.T
        if self.quantization.group_columns is None:
            return scales.float().reshape(-1, 1).expand(self.shape[0], 1)
        repeats = self.quantization.group_rows // rows_per_scale
        return scales.float().repeat_interleave(repeats, 0)[: self.shape[0] // rows_per_scale]

    def read_zeros(self) -> Tensor:
        """Return the code of 0 of each group, (N, G) integers."""
        words = _all(self.tensors[_ZEROS[self.quantization.layout]])
        if self.quantization.layout == "packed":
            return _unpacked(words.T, _IN_ORDER).T
        places = _AWQ_PLACES if self.quantization.layout == "awq" else _IN_ORDER
        return (_unpacked(words, places) + self.quantization.zero_offset).T

    def order(self) -> Tensor | None:
        """Return the columns in the order of their groups, (K,), see [Note: act-order]; None: as they are stored.

        Raises ValueError for groups of several sizes, or columns that are not sorted and should be.
        """
        stored, columns = self.tensors.get("g_idx"), self.quantization.group_columns
        if stored is None or columns is None:
            return None
        groups = _all(stored).long()
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], torch.arange(len(groups)) // columns):
            raise ValueError(
                f"{self.module}.g_idx has groups of other sizes than {columns} columns, which is not served"
            )
        if self.quantization.ordered:
            return order
        if not torch.equal(order, torch.arange(len(order))):
            raise ValueError(f"{self.module}.g_idx reorders columns, though quantization_config.desc_act is false")
        return None

    def check_values(self) -> None:
        """Raise ValueError as ``order`` does, and for zeros of a symmetric layout that are not where it has them."""
        self.order()
        if self.quantization.layout == "gptq" and not self.quantization.has_zeros:
            zeros = self.read_zeros()
            if not torch.all(zeros == SYMMETRIC_ZERO):
                raise ValueError(
                    f"{self.module}.qzeros are not {SYMMETRIC_ZERO}, though quantization_config.sym is true"
                )


def _all(stored: StoredTensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Return rows of a tensor, or all of one that may have no dimension."""
    return (
        stored.read_rows(start, (stored.spec.shape[0] if stop is None else stop))
        if stored.spec.shape
        else stored.read()
    )


def _unpacked(words: Tensor, places: tuple[int, ...]) -> Tensor:
    """Return the codes of words (rows, columns / 8), as (rows, columns); ``places[i]`` is where column i of 8 is."""
    shifts = torch.tensor(places, dtype=torch.int32, device=words.device) * 4
    return (words[:, :, None] >> shifts & 15).flatten(1)


def stored_matrices(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    quantization: Quantization,
    stored: Mapping[str, StoredTensor],
) -> dict[str, StoredMatrix]:
    """Find the tensors of each quantized module, by its name in files; ``shapes`` are those of their matrices.

    Raises ValueError, with names, for tensors that are missing or not as the layout has them.
    """
    found: dict[str, StoredMatrix] = {}
    ends = (*_UNUSED, "g_idx", _CODES[quantization.layout], *_SCALES.get(quantization.layout, ("scales",)))
    ends = (*ends, *((_ZEROS[quantization.layout],) if quantization.layout in _ZEROS else ()))
    for module, (rows, columns) in shapes.items():
        tensors = {end: stored[f"{module}.{end}"] for end in ends if f"{module}.{end}" in stored}
        found[module] = StoredMatrix(module, (rows, columns), quantization, tensors)
    problems = [problem for matrix in found.values() for problem in matrix.problems()]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the quantized weights in {directory} do not fit the model; {'; '.join(problems[:4])}{more}")
    for matrix in found.values():
        matrix.check_values()
    _check_orders(found)
    return found


def names_of(matrices: Iterable[StoredMatrix]) -> set[str]:
    """The names in files of all tensors of quantized modules."""
    return {tensor.name for matrix in matrices for tensor in matrix.tensors.values()}


def zero_biases(matrices: Iterable[StoredMatrix], stored: Mapping[str, StoredTensor]) -> set[str]:
    """The names in files of biases of modules in GPTQ's layout that are all 0, which its tools write for every module.

    They are read, to be sure of it.
    """
    names = [f"{matrix.module}.bias" for matrix in matrices if matrix.quantization.layout == "gptq"]
    return {name for name in names if name in stored and not torch.any(_all(stored[name]))}


def scale_dtype_of(quantization: Quantization, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype in which scales are kept: float32, or of 4 bits the files' own."""
    ends = _SCALES.get(quantization.layout, ("scales",))
    dtypes = {tensor.spec.dtype for name, tensor in stored.items() if name.endswith(tuple(f".{end}" for end in ends))}
    if quantization.bits == 8 or len(dtypes) != 1 or not dtypes <= set(_FLOATS):
        return quantization.scale_dtype
    return dtypes.pop()


def _check_orders(matrices: Mapping[str, StoredMatrix]) -> None:
    """Raise ValueError for projections that are one matrix and have several orders."""
    for module, matrix in matrices.items():
        parent, _, name = module.rpartition(".")
        first = _FIRST_OF_ONE.get(name)
        is_alone = first is None or ".experts." in module or f"{parent}.{first}" not in matrices
        if not matrix.quantization.ordered or is_alone:
            continue
        order, other = matrix.order(), matrices[f"{parent}.{first}"].order()
        assert order is not None and other is not None, "columns are ordered"
        if not torch.equal(order, other):
            raise ValueError(
                f"{module} and {parent}.{first} are one matrix, and group columns in two orders (desc_act), which is "
                "not served"
            )
