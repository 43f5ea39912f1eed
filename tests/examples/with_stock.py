"""Run an example with torch's own FSDP2 in place of this package: what its losses are compared with.

torchrun --nproc-per-node 2 tests/examples/with_stock.py examples/ecosystem/NAME.py
"""

import contextlib
import runpy
import sys

import torch.distributed.fsdp

import yafsdp_like

if __name__ == "__main__":
    vars(yafsdp_like).update(in_place_of_fsdp2=contextlib.nullcontext, fully_shard=torch.distributed.fsdp.fully_shard)
    runpy.run_path(sys.argv[1], run_name="__main__")
