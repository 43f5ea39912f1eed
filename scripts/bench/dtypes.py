"""Dtypes by the names that command lines take."""

import torch

from bench.help import DTYPE_NAMES

DTYPES = dict(zip(DTYPE_NAMES, (torch.bfloat16, torch.float32), strict=True))
