"""Supervised fine-tuning with TRL's SFTTrainer on this runtime: one `with` around `train`.

    torchrun --nproc-per-node 2 examples/ecosystem/trl_sft.py

Needs trl, with transformers, accelerate and datasets: pip install 'yafsdp_like[ecosystem]'. Runs on GPUs where there
are some. TRL's other trainers are Trainers too, and take the same line.
"""

import itertools
import tempfile

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from yafsdp_like import in_place_of_fsdp2

WORDS = ["<pad>", "<end>", "<unk>", "What", "follows", "?", "one", "two", "three", "four", "five", "six", "seven"]

words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
numbers = WORDS[6:]
pairs = [(f"What follows {this} ? ", following) for this, following in itertools.pairwise(numbers)]
texts = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs] * 8)

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_hidden_layers=4, **shape, **ids))

settings = SFTConfig(
    output_dir=tempfile.mkdtemp(),
    max_steps=12,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    bf16=False,
    gradient_checkpointing=False,
    use_cpu=not torch.cuda.is_available(),
    fsdp=True,
    fsdp_config={"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
)
if settings.use_cpu:  # Accelerate shards on accelerators only, and would take DistributedDataParallel on CPUs
    PartialState().distributed_type = DistributedType.MULTI_GPU
trainer = SFTTrainer(model=model, args=settings, train_dataset=texts, processing_class=tokenizer)
with in_place_of_fsdp2():
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
if dist.get_rank() == 0:
    print("wrapped by", type(trainer.model_wrapped).__mro__[1].__module__)
    print("losses:", *losses)
dist.destroy_process_group()
