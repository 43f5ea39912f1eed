"""Where the values of quantized matrices come from: files in a published layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.inference.plan.quantized_fields import CODES, ORDER, SCALES, ZEROS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from yafsdp_like.models.hf_quantized import StoredMatrix


def parts_of_each(start: int, out: Tensor, numel: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield what ``out`` has of tensors of ``numel`` elements that lie one behind the other.

    ``out`` has elements from ``start`` on of all. Of each tensor: its index, the first of its elements, and its part of
    ``out``.
    """
    stop = start + len(out)
    for index in range(start // numel, -(-stop // numel)):
        first, last = max(start, index * numel), min(stop, (index + 1) * numel)
        yield index, first - index * numel, out[first - start : last - start]


class QuantizedSource:
    """Codes, scales, zeros and orders of matrices and of experts' stacks, and from another source all else."""

    def __init__(
        self,
        matrices: Mapping[str, Sequence[StoredMatrix]],
        rows_per_scale: int,
        read_others: Callable[[str, int, Tensor], None],
    ) -> None:
        """``matrices`` are those of each module: one, or experts'; ``read_others`` is the other's ``read_into``."""
        self._matrices, self._rows_per_scale, self._read_others = matrices, rows_per_scale, read_others

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read a part of a field's parameter; of all but codes, all of a matrix's are read and a part is kept."""
        module, _, end = name.rpartition(".")
        matrices = self._matrices.get(module)
        if matrices is None or end not in (CODES, SCALES, ZEROS, ORDER):
            self._read_others(name, start, out)
            return
        for index, first, part in parts_of_each(start, out, self._numel(matrices[0], end)):
            if end == CODES:
                matrices[index].read_codes(first, part)
            else:
                part.copy_(self._values(matrices[index], end).flatten()[first : first + len(part)])

    def _numel(self, matrix: StoredMatrix, end: str) -> int:
        """Elements of that field of one matrix."""
        rows, columns = matrix.shape
        of_groups = rows // self._rows_per_scale * matrix.num_groups
        bits = matrix.quantization.bits
        return {CODES: rows * columns * bits // 8, SCALES: of_groups, ZEROS: of_groups, ORDER: columns}[end]

    def _values(self, matrix: StoredMatrix, end: str) -> Tensor:
        if end == SCALES:
            return matrix.read_scales(self._rows_per_scale)
        if end == ZEROS:
            return matrix.read_zeros()
        order = matrix.order()
        assert order is not None, "a matrix in order has no field for it"
        return order
