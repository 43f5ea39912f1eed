"""Safetensors files: what is written is read, by us and by the library, and damaged files are refused by name."""

import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from yafsdp_like.checkpoint import safetensors as safetensors_module
from yafsdp_like.checkpoint.safetensors import TensorSpec, TensorWriter, hold_files, stored_tensors
from yafsdp_like.models import PRESETS, Decoder
from yafsdp_like.models.hf import load_hf_weights, save_hf


def test_the_package_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    written = {f"t{index}": torch.randn(3, index).to(dtype) for index, dtype in enumerate([torch.float32, torch.half])}
    specs = {name: TensorSpec(it.dtype, tuple(it.shape)) for name, it in written.items()}
    with TensorWriter(tmp_path, specs, 1 << 30) as writer:
        for name, tensor in written.items():
            writer.write(name, tensor)
    read = load_file(tmp_path / "model.safetensors")
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor)
        stored = stored_tensors(tmp_path)[name]
        assert torch.equal(stored.read_rows(1, 3), tensor[1:])


def test_a_file_of_many_tensors_is_opened_once_and_again_where_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a header of thousands of experts' tensors that is read for each of them; values of a file that was."""
    opened: list[Path] = []

    def counting(path: Path, **how: Any) -> Any:
        opened.append(path)
        return safe_open(path, **how)

    monkeypatch.setattr(safetensors_module, "safe_open", counting)
    path = tmp_path / "model.safetensors"
    with hold_files():
        for value in (1.0, 2.0):
            save_file({f"t{index}": torch.full((2,), value) for index in range(5)}, path)
            assert [it.read_rows(0, 1).item() for it in stored_tensors(tmp_path).values()] == [value] * 5
            path.unlink()
    assert opened == [path, path]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_files_are_open_and_mapped_while_they_are_held_and_no_longer(tmp_path: Path) -> None:
    """Prevents: the bytes of a deleted checkpoint that stay on the disk, and one handle that loads in threads share."""
    path = tmp_path / "model.safetensors"

    def is_open() -> bool:
        links = (os.path.realpath(each) for each in Path("/proc/self/fd").iterdir())
        return str(path) in links or str(path) in Path("/proc/self/maps").read_text()

    save_file({"t": torch.ones(1 << 16)}, path)
    (stored,) = stored_tensors(tmp_path).values()
    values = stored.read_rows(0, 1).clone()  # what is read is of the mapping itself, which lasts as long
    assert torch.equal(values, torch.ones(1)) and not is_open()
    with ThreadPoolExecutor(1) as thread:
        with hold_files():
            stored.read_rows(0, 1)
            assert is_open()
            assert thread.submit(safetensors_module._opener.get).result() is safetensors_module._file
        assert not is_open()


def test_tensors_out_of_order_and_missing_tensors_are_refused(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.float32, (3,))}
    with pytest.raises(ValueError, match="expected 'a'"), TensorWriter(tmp_path / "1", specs, 1 << 30) as writer:
        writer.write("b", torch.zeros(3))
    with pytest.raises(RuntimeError, match="'b' and what follows"), TensorWriter(tmp_path / "2", specs, 8) as writer:
        writer.write("a", torch.zeros(2))


@pytest.mark.parametrize("num_kept", [0, 7, 100, -1])
def test_a_file_cut_short_is_refused(num_kept: int, tmp_path: Path) -> None:
    model = Decoder(PRESETS["tiny"])
    save_hf(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_kept])
    with pytest.raises(ValueError, match=r"model.safetensors is no whole safetensors file"):
        load_hf_weights(model, tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        [], 3, {"x": 3}, {"x": None}, {"x": {}}, {"x": {"dtype": "F32", "shape": [2]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"x": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 8]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_is_none_names_its_file(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file: "):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"x": 3}}', "[" * 100_000,
     '{"weight_map": {"x": ["model.safetensors"]}}', '{"weight_map": {"x": "../model.safetensors"}}',
     '{"weight_map": {"x": "/etc/passwd"}}', '{"weight_map": {"x": ""}}', '{"weight_map": {"x": ".."}}'],
)  # fmt: skip
def test_an_index_that_is_none_names_its_file(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json is no index of safetensors files: "):
        stored_tensors(tmp_path)


def test_an_index_that_names_absent_files_is_refused(tmp_path: Path) -> None:
    model = Decoder(PRESETS["tiny"])
    save_hf(model, tmp_path, max_file_nbytes=100_000)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"names files that are not there: {gone.name}"):
        load_hf_weights(model, tmp_path)
