"""LoRA of peft on a frozen sharded base: only adapters have gradients, moments and a place in the reduce-scatter.

    torchrun --nproc-per-node 2 examples/ecosystem/peft_lora.py

Writes the adapter as peft does; it loads into an unsharded model, and `python -m launch.serve` takes it as --adapters.
Needs peft and transformers: pip install 'yafsdp_like[ecosystem]'. Runs on GPUs where there are some.
"""

import os
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from yafsdp_like import MixedPrecisionPolicy, fully_shard

device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
dist.init_process_group()


def make_base() -> LlamaForCausalLM:
    """The base model, the same on every rank."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, max_position_embeddings=64, **shape))


base = make_base().to(device)
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in base.model.layers:
    fully_shard(layer, mp_policy=policy)
fully_shard(model, mp_policy=policy)
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=1e-2)

losses = []
for step in range(12):
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    first = torch.randint(256, (4, 1), generator=generator)
    tokens = ((first + 3 * torch.arange(32)) % 256).to(device)
    loss = model(input_ids=tokens, labels=tokens).loss.float()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach()
    dist.all_reduce(mean, dist.ReduceOp.AVG if device == "cuda" else dist.ReduceOp.SUM)
    losses.append(mean.item() / (1 if device == "cuda" else dist.get_world_size()))

values = model.state_dict()
adapter = {name: value.full_tensor() for name, value in values.items() if "lora_" in name}
frozen = {name: value.full_tensor() for name, value in base.named_parameters() if not value.requires_grad}
if dist.get_rank() == 0:
    directory = tempfile.mkdtemp()
    model.save_pretrained(directory, state_dict=adapter)
    plain = PeftModel.from_pretrained(make_base(), directory)
    for name, value in plain.state_dict().items():
        assert "lora_" not in name or torch.equal(value, adapter[name].cpu()), name
    for name, value in plain.get_base_model().named_parameters():
        assert "lora_" in name or torch.equal(value, frozen[name].cpu()), name
    print("wrapped by", type(model).__mro__[1].__module__)
    print("losses:", *losses)
dist.destroy_process_group()
