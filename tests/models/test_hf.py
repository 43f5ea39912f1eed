"""Hugging Face directories: the same numbers as transformers, from every family, there and back, sharded and not."""

import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from launch.config import ModelOptions
from launch.recipe import recipe_of
from tests.ranks import RankError, run_ranks
from yafsdp_like import fully_shard
from yafsdp_like.checkpoint.safetensors import StoredTensor, TensorSpec, TensorWriter, stored_tensors
from yafsdp_like.inference.weights import loading
from yafsdp_like.models import IGNORE_INDEX, PRESETS, Decoder, DecoderConfig
from yafsdp_like.models.hf import load_hf_config, load_hf_weights, save_hf
from yafsdp_like.models.hf_config import config_from_hf, config_to_hf
from yafsdp_like.models.rope import LinearScaling, YarnScaling

transformers = pytest.importorskip("transformers")

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied, llama3 rope": ("Llama", {"tie_word_embeddings": True, "rope_theta": 500.0, "rope_scaling": LLAMA3}),
    "llama, linear rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, yarn rope": ("Llama", {"rope_scaling": YARN, "rms_norm_eps": 1e-3}),
    "llama, yarn rope, not truncated": ("Llama", {"rope_scaling": YARN | {"truncate": False, "attention_factor": 1.2}}),
    "llama, dynamic rope": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, multi-query, wide heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_theta": 1000.0}),
    "qwen2, a window in later layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe, not normalized": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 3}),
    "qwen3_moe, some layers without experts": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
        | {"num_hidden_layers": 4, "moe_intermediate_size": 24},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
}
NUM_TOKENS = 24  # more than any window, and than the lengths that scaled positions were made for


@functools.cache
def directory_of(family: str) -> Path:
    path = scratch() / str(len(list(scratch().rglob("config.json"))))
    write_family(family, path)
    return path


def write_family(family: str, path: Path) -> None:
    """Have transformers write a directory: a random model whose every weight matters."""
    name, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**(SHAPE | changes)))
    with torch.no_grad():
        for param_name, param in model.named_parameters():
            if param.dim() == 1:  # made of ones or zeros, which would hide a norm or bias that was not loaded
                param.normal_(std=0.3).add_(0.0 if param_name.endswith("bias") else 1.0)
    model.save_pretrained(path)


@functools.cache
def scratch() -> Path:
    scratch_directory = tempfile.TemporaryDirectory(prefix="hf-")
    KEPT.append(scratch_directory)
    return Path(scratch_directory.name)


KEPT: list[tempfile.TemporaryDirectory[str]] = []


@pytest.fixture(scope="module", autouse=True)
def _without_leftovers() -> Iterator[None]:
    yield
    for kept in KEPT:
        kept.cleanup()


def tokens() -> Tensor:
    return torch.randint(SHAPE["vocab_size"], (2, NUM_TOKENS), generator=torch.Generator().manual_seed(3))


def theirs(directory: Path) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def ours(directory: Path, loss_chunk_size: int = 7) -> Decoder:
    config = dataclasses.replace(load_hf_config(directory), loss_chunk_size=loss_chunk_size)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    load_hf_weights(model, directory)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_loss_are_those_of_transformers_there_and_back(family: str, tmp_path: Path) -> None:
    directory = directory_of(family)
    model, reference = ours(directory), theirs(directory)
    expected = reference(tokens()).logits
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-5, atol=1e-5)
    targets = tokens().roll(-1, dims=1)
    targets[:, -1] = IGNORE_INDEX
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(model(tokens(), targets), loss)
    save_hf(model, tmp_path / "back")
    again = theirs(tmp_path / "back")
    assert type(again) is (transformers.LlamaForCausalLM if family == "mistral, no window" else type(reference))
    assert torch.equal(again(tokens()).logits, expected)
    assert load_hf_config(tmp_path / "back") == load_hf_config(directory)


@torch.no_grad()
def test_every_weight_of_a_checkpoint_changes_the_logits() -> None:
    """Prevents: a name that is accepted and read by nobody."""
    model = ours(directory_of("qwen2"))
    before = model(tokens())
    for name, param in model.named_parameters():
        kept = param.clone()
        param.mul_(1.1)
        assert not torch.equal(model(tokens()), before), name
        param.copy_(kept)


def test_a_window_shorter_than_the_text_matters() -> None:
    """The families' tests would pass with windows ignored if none of them hid anything."""
    windowed = ours(directory_of("mistral"))
    unlimited = Decoder(dataclasses.replace(windowed.config, sliding_window=None))
    unlimited.load_state_dict(windowed.state_dict())
    assert not torch.allclose(windowed(tokens())[:, 6:], unlimited(tokens())[:, 6:], atol=1e-3)


@pytest.mark.parametrize("old_keys", [False, True])
def test_both_spellings_of_rotary_positions_are_read(old_keys: bool) -> None:
    raw = {"model_type": "llama", **SHAPE}
    raw |= (
        {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
        if old_keys
        else {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}
    )
    config = config_from_hf(raw)
    assert (config.rope_theta, config.rope_scaling) == (7.0, LinearScaling(2.0))


def test_yarn_scales_of_deepseek_become_one_amplitude() -> None:
    rope = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}
    scaling = config_from_hf({"model_type": "llama", **SHAPE, "rope_scaling": rope}).rope_scaling
    assert isinstance(scaling, YarnScaling)
    log_factor = torch.tensor(4.0).log().item()
    assert scaling.amplitude == pytest.approx((0.1 * log_factor + 1) / (0.05 * log_factor + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one of llama, mistral, mixtral, qwen2"),
        ({"hidden_act": "gelu"}, "expected hidden_act 'silu', found 'gelu'"),
        ({"model_type": "mistral", "attention_bias": True}, "expected attention_bias False, found True"),
        ({"model_type": "qwen3", "mlp_bias": True}, "expected mlp_bias False, found True"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers must be a list of layers .*, found 3"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "unscaled, or by linear, dynamic, llama3 or yarn"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are served with quant_method fp8, "),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number from 1 to .*, found '32'"),
        ({"hidden_size": 32.0}, "hidden_size must be a whole number"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": 10**40}, "hidden_size must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 10000"),
        ({"model_type": "mixtral", "num_local_experts": 10**6}, "num_local_experts must be a whole number from 1 to"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": 2.0}, "rope_scaling must be an object, found 2.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "rope_scaling.factor must be a number"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type must be a name"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"model_type": ["llama"]}, "model_type .* is not one of"),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": 3}, "layer_types must be a list"),
    ],
)
def test_a_configuration_that_the_decoder_is_no_equal_of_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    raw = {"model_type": "llama", **SHAPE, **change}
    raw = {key: value for key, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    "content", [b"[1]", b"3", b"null", b"{", b"", b"\xff\xfe", b"[" * 100_000, b'"x"', b"9" * 5000]
)
def test_a_configuration_that_is_no_object_names_its_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_hf_config(tmp_path)


def test_a_directory_that_is_none_of_theirs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a Hugging Face directory, but .* has no config.json"):
        load_hf_config(tmp_path)
    with pytest.raises(ValueError, match=r"expected a Hugging Face directory, but .*away does not exist"):
        load_hf_config(tmp_path / "away")
    with pytest.raises(ValueError, match=r"expected model.safetensors or other safetensors files"):
        load_hf_weights(Decoder(PRESETS["tiny"]), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"qkv_bias": True, "qk_norm": True},
        {"sliding_window": 4, "windowed_layers": (0,)},
        {"o_bias": True},
        {"ffn_bias": True, "qk_norm": True},
    ],
)
def test_a_model_without_an_equal_in_transformers_is_not_written(change: dict[str, Any], tmp_path: Path) -> None:
    model = Decoder(dataclasses.replace(PRESETS["tiny"], **change))
    with pytest.raises(ValueError, match="no family of transformers has"):
        save_hf(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_preset_has_an_equal_in_transformers() -> None:
    for config in PRESETS.values():
        back = config_from_hf(config_to_hf(config))
        assert back == dataclasses.replace(config, loss_chunk_size=back.loss_chunk_size)


def test_one_error_names_what_is_missing_unexpected_and_misshapen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Decoder(PRESETS["tiny"])
    save_hf(model, tmp_path / "whole")
    entries = {name: stored.spec for name, stored in stored_tensors(tmp_path / "whole").items()}
    del entries["model.norm.weight"]
    entries["model.layers.0.self_attn.rotary_emb.inv_freq"] = TensorSpec(torch.float32, (8,))  # old files have it
    entries["model.layers.0.self_attn.q_proj.bias"] = TensorSpec(torch.float32, (64,))
    entries["lm_head.weight"] = TensorSpec(torch.float32, (500, 64))
    with TensorWriter(tmp_path / "odd", entries, 1 << 30) as writer:
        for name, spec in entries.items():
            writer.write(name, torch.zeros(spec.shape))
    with pytest.raises(ValueError, match="missing: ") as caught:
        load_hf_weights(model, tmp_path / "odd")
    assert str(caught.value).split("; ")[1:] == [
        "missing: model.norm.weight",
        "unexpected: model.layers.0.self_attn.q_proj.bias",
        "of another shape: lm_head.weight (expected (512, 64), found (500, 64))",
    ]


# --- what is stored beside what is loaded ---


def store(directory: Path, tensors: dict[str, Tensor], file_name: str = "model.safetensors") -> None:
    """A file of the package `safetensors`."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / file_name)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: stored.read_rows(0, stored.spec.shape[0]) for name, stored in stored_tensors(directory).items()}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A tied model that transformers wrote, to be changed."""
    shutil.copytree(directory_of("llama, tied, llama3 rope"), tmp_path / "tied")
    return tmp_path / "tied"


@pytest.mark.parametrize("where", ["all", "one element of the last row"])
def test_a_head_that_is_stored_with_other_values_than_the_embedding_counts(where: str, tied: Path) -> None:
    """It was left out in silence, with logits off by 12.5: transformers takes it, in spite of the configuration."""
    tensors = tensors_of(tied)
    head = tensors["model.embed_tokens.weight"].clone()
    if where == "all":
        head += torch.randn_like(head)
    else:
        head[-1, -1] += 1
    store(tied, tensors | {"lm_head.weight": head})
    config = load_hf_config(tied)
    assert not config.tie_embeddings
    model = Decoder(config)
    load_hf_weights(model, tied)
    assert torch.equal(model.lm_head.weight, head)
    tokens = torch.arange(NUM_TOKENS)[None]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tied, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"tied to its embedding, .* stores lm_head.weight with other values"):
        load_hf_weights(Decoder(dataclasses.replace(config, tie_embeddings=True)), tied)
    opened = loading.open_model(str(tied))
    assert not opened.config.tie_embeddings
    read = torch.empty(head.numel())
    opened.source(torch.device("cpu")).read_into("lm_head.weight", 0, read)
    assert torch.equal(read.view_as(head), head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_that_is_stored_once_more_stays_tied(dtype: torch.dtype, tied: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(tied).items()}
    store(tied, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    config = load_hf_config(tied)
    assert config.tie_embeddings
    model = Decoder(config)
    load_hf_weights(model, tied)
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_one_byte_floats_are_refused_since_their_scales_are_not_known(
    dtype: torch.dtype, tied: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = tensors_of(tied)
    store(tied, tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(ValueError, match=rf"of one-byte floats, which mean nothing without scales .*: {name}"):
        load_hf_weights(Decoder(load_hf_config(tied)), tied)
    with pytest.raises(ValueError, match="of one-byte floats"):
        loading.open_model(str(tied))


@pytest.mark.parametrize("num_files", [1, 3])
def test_weights_of_other_formats_and_adapters_beside_a_model_are_left_alone(num_files: int, tmp_path: Path) -> None:
    model = Decoder(PRESETS["tiny"])
    model.init_weights(0)
    save_hf(model, tmp_path, max_file_nbytes=1 << 30 if num_files == 1 else 200_000)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "extra.safetensors"):
        store(tmp_path, {"layers.0.attention.wq.weight": torch.ones(2)}, name)
    (tmp_path / "consolidated.safetensors.index.json").write_text("{}")
    loaded = Decoder(PRESETS["tiny"])
    load_hf_weights(loaded, tmp_path)
    assert torch.equal(loaded.layers[0].mlp.up_proj.weight, model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("file_name", "told"),
    [
        ("adapter_model.safetensors", "found only an adapter, adapter_model.safetensors: merge it"),
        ("adapter_model.bin", "found only an adapter, adapter_model.bin: merge it"),
        ("consolidated.safetensors", "found only consolidated.safetensors, with names of another format"),
        ("pytorch_model.bin", "found pytorch_model.bin, a pickle, which is not read"),
    ],
)
def test_a_directory_without_a_model_says_what_is_there_instead(file_name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / file_name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"expected model.safetensors .*{told}"):
        load_hf_weights(Decoder(PRESETS["tiny"]), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter: merge it"):
        loading.open_model(str(tmp_path))


def test_loading_into_the_meta_device_names_the_fix() -> None:
    directory = directory_of("llama")
    with torch.device("meta"):
        model = Decoder(load_hf_config(directory))
    with pytest.raises(RuntimeError, match=r"is on the meta device: call to_empty"):
        load_hf_weights(model, directory)


# --- sharded ---


def sharded(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model.to_empty(device="cpu")


def load_sharded(directory: Path) -> tuple[Decoder, int]:
    """A sharded model filled from `directory`, and the bytes that this rank read of its weights."""
    model = sharded(load_hf_config(directory))
    read: list[int] = []
    read_rows = StoredTensor.read_rows

    def spy(stored: StoredTensor, start: int, stop: int) -> Tensor:
        rows = read_rows(stored, start, stop)
        read.append(rows.nbytes)
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredTensor, "read_rows", spy)
        load_hf_weights(model, directory)
    return model, sum(read)


def own_nbytes(model: Decoder) -> int:
    """Bytes of this rank's rows."""
    return sum(param.to_local().nbytes for param in model.parameters())


def load_and_save_sharded(directory: Path, back: Path) -> tuple[Tensor, int, int]:
    """Logits after loading, bytes read of weights, and bytes of this rank's rows; saved again after a forward."""
    model, read_nbytes = load_sharded(directory)
    logits = model(tokens()).detach()  # leaves the root gathered: what is saved is the shards all the same
    save_hf(model, back, max_file_nbytes=20_000)
    return logits, read_nbytes, own_nbytes(model)


@pytest.mark.slow(unless=lambda family, world_size: (family in ("qwen2", "mixtral")) == (world_size == 2))
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_a_sharded_load_equals_a_plain_one_and_reads_own_bytes(family: str, world_size: int, tmp_path: Path) -> None:
    directory = directory_of(family)
    plain = ours(directory)
    results = run_ranks(load_and_save_sharded, directory, tmp_path / "back", world_size=world_size)
    for logits, read_nbytes, needed_nbytes in results:
        torch.testing.assert_close(logits, plain(tokens()), rtol=1e-6, atol=1e-6)
        assert read_nbytes == needed_nbytes
    assert sum(read_nbytes for _, read_nbytes, _ in results) == sum(p.nbytes for p in plain.parameters())
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        torch.testing.assert_close(theirs(tmp_path / "back")(tokens()).logits, theirs(directory)(tokens()).logits)


def save_sharded(directory: Path) -> None:
    model = sharded(PRESETS["tiny"])
    model.init_weights()
    save_hf(model, directory)
    dist.barrier()


@pytest.mark.slow
def test_a_save_that_fails_on_rank_0_leaves_no_rank_in_a_gather(tmp_path: Path) -> None:
    """The failing rank gathers to the end before it raises; the others wait at the barrier that the test put there."""
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RankError) as caught:
        run_ranks(save_sharded, tmp_path)
    kind, message = caught.value.errors[0]
    assert kind == "FileExistsError" and "already holds weights: model.safetensors" in message


# --- precision and files ---


@torch.no_grad()
def test_bf16_files_load_into_fp32_and_fp32_models_save_in_bf16(tmp_path: Path) -> None:
    model = ours(directory_of("llama"))
    save_hf(model, tmp_path, dtype=torch.bfloat16, extra={"eos_token_id": 5})
    assert {stored.spec.dtype for stored in stored_tensors(tmp_path).values()} == {torch.bfloat16}
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["torch_dtype"], raw["eos_token_id"]) == ("bfloat16", 5)
    again = ours(tmp_path)
    for param, rounded in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(param.bfloat16().float(), rounded)
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert native.dtype == torch.bfloat16 and native.config.eos_token_id == 5


# --- models of transformers, sharded by us ---


def save_pretrained_sharded(directory: Path, how: str, tied: bool) -> list[str]:
    """What each rank was told, and rank 0's directory in the end."""
    torch.manual_seed(0)
    raw = {**SHAPE, "tie_word_embeddings": tied}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(torch.arange(8)[None]).logits.sum().backward()
    told: list[str] = []
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    given: dict[str, Any] = {"nothing": {}, "parts": {"state_dict": model.state_dict()}, "whole": {"state_dict": state}}
    if how != "whole" or dist.get_rank() == 0:
        try:
            model.save_pretrained(directory, **given[how])
        except RuntimeError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_sharded_model_of_transformers_is_saved_whole_or_says_how(tied: bool, tmp_path: Path) -> None:
    """It died in safetensors with "invalid python storage", after it had made the directory."""
    for how in ("nothing", "parts"):
        for (words,) in run_ranks(save_pretrained_sharded, tmp_path / how, how, tied):
            assert "model.save_pretrained(directory, state_dict=state)" in words
            assert "full_state_dict=True" in words
        assert not (tmp_path / how).exists()
    assert run_ranks(save_pretrained_sharded, tmp_path / "whole", "whole", tied) == [[], []]
    assert run_ranks(save_pretrained_sharded, tmp_path / "alone", "nothing", tied, world_size=1) == [[]]
    torch.manual_seed(0)
    raw = {**SHAPE, "tie_word_embeddings": tied}
    expected = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).state_dict()
    for name in ("whole", "alone"):
        found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("there", [True, False])
def test_what_training_exports_carries_the_generation_config(there: bool, tied: Path, tmp_path: Path) -> None:
    content = b'{"temperature": 0.6, "eos_token_id": [1, 2]}\n'
    (tied / "generation_config.json").unlink(missing_ok=True)
    if there:
        (tied / "generation_config.json").write_bytes(content)
    recipe = recipe_of(ModelOptions(preset=None, hf_dir=str(tied)), seed=0)
    model = Decoder(load_hf_config(tied))
    load_hf_weights(model, tied)
    recipe.exporter()(model.state_dict(), tmp_path / "hf", {"eos_token_id": 2})
    written = tmp_path / "hf" / "generation_config.json"
    assert written.is_file() == there
    assert not there or written.read_bytes() == content


def test_two_ways_of_scaling_positions_that_differ_are_refused() -> None:
    raw = {**config_to_hf(PRESETS["tiny"]), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert config_from_hf({**raw, "rope_scaling": {"rope_type": "default"}}).rope_scaling is None
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters differ, remove one"):
        config_from_hf({**raw, "rope_scaling": {"rope_type": "linear", "factor": 4.0}})
