"""Serve requests from Python: load an engine, print its memory plan, and generate for several prompts at once.

    python examples/serve_from_python.py

A model is a directory of Hugging Face weights, a checkpoint (``step-N``), or, as here, a preset with random weights.
"""

import torch

from yafsdp_like.inference import Engine, EngineOptions, Request, SamplingParams

device = "cuda" if torch.cuda.is_available() else "cpu"
options = EngineOptions(kv_nbytes=1 << 22, max_batch_size=8, max_batch_tokens=256, max_seq_len=256)
engine = Engine.load("preset:tiny", options, device=device)
print(engine.plan)

# All at once: a batch that is done when every request is.
greedy = SamplingParams(temperature=0.0)
prompts = {"a": (1, 2, 3), "b": (4, 5)}
done = engine.generate([Request(name, prompt, greedy, max_tokens=8) for name, prompt in prompts.items()])
for name, completion in done.items():
    print(f"request {name}: {completion.ids}, {completion.finish.value}")

# As they come: requests may be added between any two steps.
engine.add(Request("c", (6, 7, 8, 9), SamplingParams(temperature=0.8, top_p=0.9, seed=1), max_tokens=4))
tokens = []
while engine.has_work:
    for output in engine.step():
        tokens += [token.id for token in output.tokens]
print(f"request c, step by step: {tokens}")
engine.close()
