"""The decoder against small references: what it computes, what it counts, how it starts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.ranks import run_ranks
from yafsdp_like.models import IGNORE_INDEX, PRESETS, Decoder, DecoderConfig
from yafsdp_like.models.decoder import Attention, apply_rope, rope_tables

TINY = PRESETS["tiny"]
ODD = DecoderConfig(dim=36, num_layers=3, num_heads=3, num_kv_heads=1, ffn_dim=100, vocab_size=101)


def tokens_of(config: DecoderConfig, batch_size: int, seq_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(config.vocab_size, (batch_size, seq_len), generator=generator)


@pytest.mark.parametrize("config", [TINY, ODD, PRESETS["1b"], PRESETS["3b"], PRESETS["8b"]])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_num_params_counts_what_the_model_holds(config: DecoderConfig, tie_embeddings: bool) -> None:
    config = dataclasses.replace(config, tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(param.numel() for param in model.parameters()) == config.num_params
    assert sum(param.numel() for param in model.layers[0].parameters()) == config.block_num_params


def test_presets_have_their_published_sizes() -> None:
    assert PRESETS["8b"].num_params == 8_030_261_248
    assert PRESETS["3b"].num_params == 3_212_749_824
    assert PRESETS["1b"].num_params == 1_235_814_400


def test_train_flops_are_two_per_multiply_add_forward_and_four_backward() -> None:
    batch_size, seq_len = 2, 8
    kv_dim = TINY.num_kv_heads * TINY.head_dim
    matrices = [(TINY.dim, TINY.dim)] * 2 + [(TINY.dim, kv_dim)] * 2 + [(TINY.dim, TINY.ffn_dim)] * 3
    multiply_adds = batch_size * seq_len * sum(rows * cols for rows, cols in matrices) * TINY.num_layers
    multiply_adds += batch_size * seq_len * TINY.dim * TINY.vocab_size
    scores_and_values = 2 * batch_size * TINY.num_layers * seq_len * seq_len * TINY.dim
    assert TINY.train_flops(batch_size, seq_len) == 6 * (multiply_adds + scores_and_values // 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_heads": 5}, "multiple of 2 \\* num_heads"), ({"num_kv_heads": 3}, "multiple of num_kv_heads")],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("config", [TINY, ODD])
def test_a_token_changes_no_logit_before_it(config: DecoderConfig) -> None:
    model = Decoder(config)
    tokens = tokens_of(config, 2, 12)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(dim=-1).any()


def test_grouped_queries_equal_repeated_keys_and_values() -> None:
    """A kv head that met the wrong query heads would still train, only worse."""
    grouped = Attention(TINY)
    full = Attention(dataclasses.replace(TINY, num_kv_heads=TINY.num_heads))
    repeats = TINY.num_heads // TINY.num_kv_heads
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = state[name].unflatten(0, (TINY.num_kv_heads, TINY.head_dim))
        state[name] = heads.repeat_interleave(repeats, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 9, TINY.dim)
    cos, sin = rope_tables(TINY, x)
    torch.testing.assert_close(grouped(x, cos, sin), full(x, cos, sin))


def test_rope_scores_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, TINY.head_dim).unbind()
    cos, sin = rope_tables(TINY, torch.empty(1, 40, TINY.dim))
    queries = apply_rope(query.expand(1, 1, 40, -1), cos, sin)
    keys = apply_rope(key.expand(1, 1, 40, -1), cos, sin)
    scores = (queries @ keys.transpose(-1, -2))[0, 0]  # (T, T)
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[0, 0], query @ key)


def test_loss_is_the_cross_entropy_of_the_logits_without_ignored_targets() -> None:
    model = Decoder(TINY)
    tokens, targets = tokens_of(TINY, 2, 17)[:, :-1], tokens_of(TINY, 2, 17)[:, 1:].clone()
    targets[0, :4] = IGNORE_INDEX
    reference = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(model(tokens, targets), reference)


def test_loss_of_a_bf16_model_is_averaged_in_fp32() -> None:
    model = Decoder(TINY).to(torch.bfloat16)
    assert model(tokens_of(TINY, 1, 8), tokens_of(TINY, 1, 8)).dtype == torch.float32


def test_training_lowers_the_loss_to_nothing_on_one_batch() -> None:
    model = Decoder(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = tokens_of(TINY, 2, 17)
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_meta_then_init_weights_equals_building_directly(tie_embeddings: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu").init_weights()
    direct = Decoder(config)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tie_embeddings
    for (name, param), expected in zip(model.named_parameters(), direct.parameters(), strict=True):
        assert torch.equal(param, expected), name
    tokens = tokens_of(config, 1, 8)
    assert torch.equal(model(tokens), direct(tokens))


def test_init_weights_have_the_documented_statistics() -> None:
    model = Decoder(dataclasses.replace(TINY, vocab_size=3000))
    residual_std = 0.02 / (2 * TINY.num_layers) ** 0.5
    for name, param in model.named_parameters():
        if param.dim() == 1:
            assert torch.equal(param, torch.ones_like(param)), name
            continue
        std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert param.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(param.mean().item()) < 5 * std / param.numel() ** 0.5, name
    drawn = [param[0, :16] for param in model.parameters() if param.dim() == 2]
    drawn += [model.embed_tokens.weight[1024, :16], model.embed_tokens.weight[2048, :16]]
    correlations = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.95, "two matrices, or two parts of one, repeat each other"


def test_init_weights_on_the_meta_device_names_the_fix() -> None:
    with torch.device("meta"):
        model = Decoder(TINY)
    with pytest.raises(RuntimeError, match=r"'embed_tokens.weight' is on the meta device: call to_empty"):
        model.init_weights()


def full_weights_of_a_sharded_model(config: DecoderConfig) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with torch.device("meta"):
        model = Decoder(config)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.init_weights()
    return {name: param.full_tensor().detach() for name, param in model.state_dict().items()}


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_init_has_the_bits_of_the_unsharded_one(world_size: int, tie_embeddings: bool) -> None:
    """Ranks that drew their shards from equal generators would repeat each other's rows.

    With 2500 rows a rank's share is no multiple of the rows drawn at once, and with 3 ranks shares differ.
    """
    config = dataclasses.replace(ODD, vocab_size=2500, tie_embeddings=tie_embeddings)
    direct = Decoder(config).state_dict()
    for sharded in run_ranks(full_weights_of_a_sharded_model, config, world_size=world_size):
        assert list(sharded) == list(direct)
        for name, weight in direct.items():
            assert torch.equal(sharded[name], weight), name
