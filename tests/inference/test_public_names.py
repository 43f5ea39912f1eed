"""What a user imports from `yafsdp_like.inference`: all of it is there, and nothing is loaded before it is used."""

import subprocess
import sys

import pytest

from yafsdp_like import inference
from yafsdp_like.inference import Completion, Engine, EngineOptions, FinishReason, Request, SamplingParams


def test_one_import_loads_a_model_and_serves_it() -> None:
    options = EngineOptions(kv_nbytes=1 << 22, max_seq_len=256, max_batch_tokens=256)
    engine = Engine.load("preset:tiny", options)
    request = Request("a", prompt=(1, 2, 3), sampling=SamplingParams(temperature=0.0), max_tokens=4)
    completion = engine.generate([request])["a"]
    engine.close()
    assert isinstance(completion, Completion)
    assert (len(completion.ids), completion.finish) == (4, FinishReason.LENGTH)


def test_every_public_name_is_found_and_others_are_not() -> None:
    assert all(getattr(inference, name).__name__ == name for name in inference.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Scheduler'"):
        inference.Scheduler  # noqa: B018


def test_options_are_imported_without_torch() -> None:
    """Prevents: a command line that waits for torch before it says that an option is wrong."""
    code = "import sys; from yafsdp_like.inference.options import EngineOptions; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
