"""Hugging Face's Trainer on this runtime: its own FSDP2 settings, and one `with` around `train`.

    torchrun --nproc-per-node 2 examples/ecosystem/hf_trainer.py

Needs transformers and accelerate: pip install 'yafsdp_like[ecosystem]'. Runs on GPUs where there are some.
"""

import tempfile

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from yafsdp_like import in_place_of_fsdp2

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, max_position_embeddings=64, **shape))
rows = [(torch.arange(32) * (3 + row % 5) + row) % 256 for row in range(64)]
texts = [{"input_ids": row, "labels": row} for row in rows]

settings = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    max_steps=12,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    max_grad_norm=1.0,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=not torch.cuda.is_available(),
    fsdp=True,
    fsdp_config={"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
)
if settings.use_cpu:  # Accelerate shards on accelerators only, and would take DistributedDataParallel on CPUs
    PartialState().distributed_type = DistributedType.MULTI_GPU
trainer = Trainer(model=model, args=settings, train_dataset=texts)
with in_place_of_fsdp2():
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
if dist.get_rank() == 0:
    print("wrapped by", type(trainer.model_wrapped).__mro__[1].__module__)
    print("losses:", *losses)
dist.destroy_process_group()
