"""Where the values of quantized matrices come from: files in a published layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yafsdp_like.inference.plan.quantized_fields import CODES, ORDER, SCALES, ZEROS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from yafsdp_like.models.hf_quantized import StoredMatrix


class QuantizedSource:
    """Codes, scales, zeros and orders of matrices, and from another source all else."""

    def __init__(
        self,
        matrices: Mapping[str, StoredMatrix],
        rows_per_scale: int,
        read_others: Callable[[str, int, Tensor], None],
    ) -> None:
        """``read_others`` is the other source's ``read_into``."""
        self._matrices, self._rows_per_scale, self._read_others = matrices, rows_per_scale, read_others

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read a part of a field's parameter; of all but codes, the whole parameter is read and a part is kept."""
        module, _, end = name.rpartition(".")
        matrix = self._matrices.get(module)
        if matrix is None or end not in (CODES, SCALES, ZEROS, ORDER):
            self._read_others(name, start, out)
        elif end == CODES:
            matrix.read_codes(start, out)
        else:
            out.copy_(self._values(matrix, end).flatten()[start : start + len(out)])

    def _values(self, matrix: StoredMatrix, end: str) -> Tensor:
        if end == SCALES:
            return matrix.read_scales(self._rows_per_scale)
        if end == ZEROS:
            return matrix.read_zeros()
        order = matrix.order()
        assert order is not None, "a matrix in order has no field for it"
        return order
