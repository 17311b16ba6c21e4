"""A weight that stays in its file: the input embedding of a model whose output head is another matrix.

A step needs the rows of its own tokens and no others, some MB of a matrix of hundreds. They are read with pread from
the file that was opened for loading (and stays open: deleting it changes nothing).
"""

import torch
from torch import Tensor

from halfbyte.models.source import ModelSource
from halfbyte.quant import DTYPE_NAMES, Weight


class StoredWeight(Weight):
    """Rows of the tensor `name` of `source`, rounded to `dtype` as a held weight would be. Nothing is held."""

    def __init__(self, source: ModelSource, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        shape = source.info(name).shape
        self.shape = (shape[0], shape[1])
        self.source, self.name, self.dtype = source, name, dtype

    @property
    def format(self) -> str:
        return f"{DTYPE_NAMES[self.dtype]}, in its file"

    @property
    def source_dtype(self) -> torch.dtype:
        return self.dtype

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """As in `Weight`: the rows are read from the file."""
        first, last = self._row_range(rows)
        values = self.source.read_rows(self.name, first, last).to(self.dtype)
        if out is None:
            return values.to(dtype)
        self._check_out(out, dtype, last - first)
        return out.copy_(values)

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """As in `Weight`; each distinct row is read once, neighbouring ones together. IndexError beyond the rows."""
        distinct, places = index.unique(return_inverse=True)
        ids = distinct.tolist()
        if ids and not 0 <= ids[0] <= ids[-1] < self.shape[0]:
            raise IndexError(f"token ids {ids[0]} … {ids[-1]} are not all in a vocabulary of {self.shape[0]} words")
        values = torch.empty(len(ids), self.shape[1], dtype=dtype)
        start = 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or ids[i] != ids[i - 1] + 1:
                values[start:i] = self.source.read_rows(self.name, ids[start], ids[i - 1] + 1).to(self.dtype)
                start = i
        return values.index_select(0, places)
