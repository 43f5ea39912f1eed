"""A training loop of Accelerate on this runtime: its FSDP2 plugin, and one `with` around `prepare`.

    torchrun --nproc-per-node 2 examples/ecosystem/accelerate_loop.py

Saves its state on the way, as sharded checkpoints of torch, and goes on from it to the same losses. Needs transformers
and accelerate: pip install 'yafsdp_like[ecosystem]'. Runs on GPUs where there are some.
"""

import tempfile

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from yafsdp_like import in_place_of_fsdp2

if not torch.cuda.is_available():  # Accelerate shards on accelerators only, and would take DDP on CPUs
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
)
accelerator = Accelerator(
    cpu=not torch.cuda.is_available(), fsdp_plugin=plugin, mixed_precision="bf16", gradient_accumulation_steps=2
)

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, max_position_embeddings=64, **shape))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
rows = [(torch.arange(32) * (3 + row % 5) + row) % 256 for row in range(64)]
loader = DataLoader(rows, batch_size=2)
with in_place_of_fsdp2():
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)


def train() -> list[float]:
    """The losses of one pass over the rows, each the mean of all ranks."""
    losses = []
    for tokens in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses


directories = [tempfile.mkdtemp() if accelerator.is_main_process else ""]
dist.broadcast_object_list(directories, src=0)
first = train()
accelerator.save_state(directories[0])
second = train()
accelerator.load_state(directories[0])
again = train()

accelerator.print("wrapped by", type(model).__mro__[1].__module__)
accelerator.print("losses:", *first, *second)
assert again == second, (again, second)
accelerator.end_training()
