"""The decoder against small references: what it computes, what it counts, how it starts."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard as stock_fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ranks import run_ranks
from yafsdp_like import fully_shard
from yafsdp_like.models import IGNORE_INDEX, PRESETS, Decoder, DecoderConfig, ExpertsConfig
from yafsdp_like.models.decoder import Attention, apply_rope, attend, window_mask
from yafsdp_like.models.moe import MixtureOfExperts
from yafsdp_like.models.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from yafsdp_like.ops.linear import attach
from yafsdp_like.ops.loss import linear_cross_entropy

TINY = PRESETS["tiny"]
ODD = DecoderConfig(dim=36, num_layers=3, num_heads=3, num_kv_heads=1, ffn_dim=100, vocab_size=101)
RICH = dataclasses.replace(
    ODD, custom_head_dim=16, qkv_bias=True, qk_norm=True, sliding_window=4, windowed_layers=(0, 2), loss_chunk_size=5
)
MIXED = dataclasses.replace(TINY, ffn_dim=24, experts=ExpertsConfig(num_experts=5, experts_per_token=2))


def tokens_of(config: DecoderConfig, batch_size: int, seq_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(config.vocab_size, (batch_size, seq_len), generator=generator)


@pytest.mark.parametrize("config", [ODD, RICH, MIXED, *PRESETS.values()])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_num_params_counts_what_the_model_holds(config: DecoderConfig, tie_embeddings: bool) -> None:
    config = dataclasses.replace(config, tie_embeddings=tie_embeddings)
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(param.numel() for param in model.parameters()) == config.num_params
    assert sum(param.numel() for param in model.layers[0].parameters()) == config.block_num_params


def test_presets_have_their_published_sizes() -> None:
    assert PRESETS["70b"].num_params == 70_553_706_496
    assert PRESETS["8b"].num_params == 8_030_261_248
    assert PRESETS["3b"].num_params == 3_212_749_824
    assert PRESETS["1b"].num_params == 1_235_814_400
    assert PRESETS["0.6b"].num_params == 596_049_920
    assert PRESETS["135m"].num_params == 134_515_008
    assert PRESETS["30b-a3b"].num_params == 30_532_122_624


def test_train_flops_are_two_per_multiply_add_forward_and_four_backward() -> None:
    batch_size, seq_len = 2, 8
    kv_dim = TINY.num_kv_heads * TINY.head_dim
    matrices = [(TINY.dim, TINY.dim)] * 2 + [(TINY.dim, kv_dim)] * 2 + [(TINY.dim, TINY.ffn_dim)] * 3
    multiply_adds = batch_size * seq_len * sum(rows * cols for rows, cols in matrices) * TINY.num_layers
    multiply_adds += batch_size * seq_len * TINY.dim * TINY.vocab_size
    scores_and_values = 2 * batch_size * TINY.num_layers * seq_len * seq_len * TINY.dim
    assert TINY.train_flops(batch_size, seq_len) == 6 * (multiply_adds + scores_and_values // 2)


def test_a_token_pays_for_the_experts_it_visits() -> None:
    alone = dataclasses.replace(MIXED, experts=None)
    router = MIXED.dim * 5
    one_more_ffn = 3 * MIXED.dim * MIXED.ffn_dim
    assert MIXED.train_flops(1, 8) - alone.train_flops(1, 8) == 6 * 8 * MIXED.num_layers * (router + one_more_ffn)


def test_experts_equal_a_sum_over_all_of_them_weighted_by_the_router() -> None:
    torch.manual_seed(0)
    moe = MixtureOfExperts(16, 24, ExpertsConfig(num_experts=5, experts_per_token=2))
    for param in moe.parameters():
        torch.nn.init.normal_(param, std=0.3)
    x = torch.randn(2, 3, 16)
    probs = moe.gate(x).softmax(dim=-1)
    kept = probs.where(probs >= probs.topk(2).values[..., -1:], 0)
    kept = kept / kept.sum(dim=-1, keepdim=True)  # (B, T, E)
    hidden = F.silu(torch.einsum("btd,efd->btef", x, moe.experts.gate_proj))
    hidden = hidden * torch.einsum("btd,efd->btef", x, moe.experts.up_proj)
    expected = torch.einsum("btef,edf,bte->btd", hidden, moe.experts.down_proj, kept)
    out = moe(x)
    torch.testing.assert_close(out, expected)
    weights = list(moe.parameters())
    for grad, reference in zip(
        torch.autograd.grad(out.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)


def test_experts_that_no_token_visits_get_a_gradient_of_zero() -> None:
    """Prevents: a rank whose experts were not chosen having no gradient to reduce."""
    moe = MixtureOfExperts(16, 24, ExpertsConfig(num_experts=50, experts_per_token=1))
    for param in moe.parameters():
        torch.nn.init.normal_(param)
    moe(torch.randn(1, 3, 16)).sum().backward()
    unused = moe.experts.up_proj.grad.flatten(1).eq(0).all(dim=1)
    assert unused.sum() >= 47


def test_more_visits_than_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="experts_per_token must be between 1 and num_experts 2, got 3"):
        ExpertsConfig(num_experts=2, experts_per_token=3)


def test_a_window_saves_the_flops_of_the_pairs_it_hides() -> None:
    seq_len, window = 64, 8
    windowed = dataclasses.replace(TINY, sliding_window=window, windowed_layers=(1,))
    pairs = window_mask(torch.arange(seq_len), window).sum().item()
    hidden_pairs = (seq_len * (seq_len + 1) // 2) - pairs
    assert TINY.train_flops(1, seq_len) - windowed.train_flops(1, seq_len) == pytest.approx(
        12 * TINY.dim * hidden_pairs, rel=0.02
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "multiple of 2 \\* num_heads"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"custom_head_dim": 7}, "custom_head_dim must be even"),
        ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be positive"),
        ({"loss_chunk_size": -1}, "loss_chunk_size must be positive"),
        ({"sliding_window": 0}, "sliding_window must be positive"),
        ({"windowed_layers": (0,)}, "need a sliding_window"),
        ({"sliding_window": 4, "windowed_layers": (2,)}, "below num_layers 2"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_more_tokens_than_positions_are_refused() -> None:
    model = Decoder(dataclasses.replace(TINY, max_seq_len=8))
    with pytest.raises(ValueError, match="9 tokens are more than max_seq_len 8"):
        model(tokens_of(TINY, 1, 9))


@pytest.mark.parametrize("config", [TINY, ODD, RICH, MIXED])
def test_a_token_changes_no_logit_before_it(config: DecoderConfig) -> None:
    model = Decoder(config)
    tokens = tokens_of(config, 2, 12)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-6)  # experts' products change in shape
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
    cos, sin = TINY.rope.tables(torch.arange(9), x.dtype)
    torch.testing.assert_close(grouped(x, cos, sin), full(x, cos, sin))


def test_rope_scores_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, TINY.head_dim).unbind()
    cos, sin = TINY.rope.tables(torch.arange(40), torch.float32)
    queries = apply_rope(query.expand(1, 1, 40, -1), cos, sin)
    keys = apply_rope(key.expand(1, 1, 40, -1), cos, sin)
    scores = (queries @ keys.transpose(-1, -2))[0, 0]  # (T, T)
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[0, 0], query @ key)


def test_a_token_beyond_the_windows_of_all_layers_changes_nothing() -> None:
    config = dataclasses.replace(RICH, windowed_layers=None)  # three layers see 3 tokens further back each
    model = Decoder(config)
    tokens = tokens_of(config, 2, 16)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, 10:], after[:, 10:])
    assert not torch.isclose(before[:, :10], after[:, :10]).all(dim=-1).any()


def test_a_window_as_long_as_the_text_is_causal_attention() -> None:
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = window_mask(torch.arange(7), 7)
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v, None))


# Frequencies of theta 10,000 and head dim 8 are 1, 0.1, 0.01, 0.001; over 200 tokens they turn 31.8, 3.18, 0.318 and
# 0.0318 times.
@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (LinearScaling(4.0), [1 / 4, 0.1 / 4, 0.01 / 4, 0.001 / 4]),
        (Llama3Scaling(4.0, 1.0, 4.0, 200), [1, 0.1 / 4 + 0.7277 * 0.1 * 3 / 4, 0.01 / 4, 0.001 / 4]),
        (YarnScaling(4.0, 200), [1, 0.1 * (0.5 + 0.5 / 4), 0.01 / 4, 0.001 / 4]),
    ],
)
def test_scaling_keeps_fast_frequencies_and_stretches_slow_ones(scaling: LinearScaling, expected: list[float]) -> None:
    frequencies = 10_000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(scaling.stretch(frequencies, 10_000.0), torch.tensor(expected), rtol=1e-4, atol=0)


def test_yarn_enlarges_scores_by_the_square_of_its_amplitude() -> None:
    cos, sin = Rope(8, 10_000.0, YarnScaling(4.0, 200)).tables(torch.arange(5), torch.float32)
    amplitude = 0.1 * torch.tensor(4.0).log() + 1
    torch.testing.assert_close(cos.square() + sin.square(), amplitude.square().expand(5, 8))


def test_scaling_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="factor must be at least 1"):
        LinearScaling(0.5)
    with pytest.raises(ValueError, match="expected 0 < slow_turns < fast_turns, got 4 and 1"):
        Llama3Scaling(8.0, 4, 1, 8192)


def head_case(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (T, 24), a weight (53, 24) and targets (T,) of which every third is ignored."""
    hidden = torch.randn(num_tokens, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(53, 24, dtype=dtype, requires_grad=True)
    targets = torch.randint(53, (num_tokens,))
    targets[::3] = IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 14, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_by_chunks_are_those_of_cross_entropy(
    chunk_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = head_case(13, dtype)
    reference = F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORE_INDEX)
    expected = torch.autograd.grad(3 * reference, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, chunk_size)
    grads = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (hidden, weight))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads, again, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, chunk_size), loss)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    hidden, weight, targets = head_case(13, torch.float32)
    kept = hidden if frozen == "weight" else weight
    (expected,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, 4), kept)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets, 4).backward()
    assert torch.equal(kept.grad, expected)
    assert (hidden.grad is None) != (weight.grad is None)


def test_a_loss_without_targets_is_not_a_number_as_in_torch() -> None:
    hidden, weight, targets = head_case(6, torch.float32)
    assert linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX), 4).isnan()


def test_bf16_gradients_of_many_chunks_are_as_exact_as_of_one() -> None:
    """Prevents: a sum over chunks in bf16, which loses what each new chunk adds to a large total."""
    hidden, weight, targets = head_case(2048, torch.bfloat16)
    errors = []
    loss = linear_cross_entropy(hidden.double(), weight.double(), targets, 4096)
    (exact,) = torch.autograd.grad(loss, weight)
    for chunk_size in (4096, 16):
        (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk_size), weight)
        errors.append((grad - exact).norm() / exact.norm())
    assert errors[1] < 1.5 * errors[0] < 0.01


def test_logits_of_a_chunk_are_all_that_exists_of_them() -> None:
    """The largest tensor made in forward and backward, in elements."""
    num_tokens, dim, vocab_size, chunk_size = 256, 8, 512, 16
    hidden = torch.randn(num_tokens, dim, requires_grad=True)
    weight = torch.randn(vocab_size, dim, requires_grad=True)
    with LargestResult() as largest:
        linear_cross_entropy(hidden, weight, torch.randint(vocab_size, (num_tokens,)), chunk_size).backward()
    assert largest.numel == chunk_size * vocab_size


@dataclasses.dataclass
class Slot:
    """Where a weight's gradient is to be written; holds garbage before the first."""

    view: Tensor
    num_opened: int = 0

    def withdraw(self) -> Tensor | None:
        return None

    def check_readable(self) -> None:
        pass

    def open(self) -> tuple[Tensor, bool]:
        self.num_opened += 1
        return self.view, self.num_opened > 1


@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize("num_tokens", [13, 61])  # below and above what makes keeping the logits' gradient worth it
@pytest.mark.parametrize("slot_dtype", [torch.bfloat16, torch.float32])
def test_the_heads_gradient_is_written_where_its_weight_says(
    num_tokens: int, chunk_size: int, slot_dtype: torch.dtype
) -> None:
    hidden, plain, targets = head_case(num_tokens, torch.bfloat16)
    (3 * linear_cross_entropy(hidden, plain, targets, chunk_size)).backward()
    weight = torch.nn.Parameter(plain.detach().clone())
    slot = Slot(torch.full_like(plain.detach(), 7, dtype=slot_dtype))
    attach(weight, slot)
    completed = []
    weight.register_post_accumulate_grad_hook(lambda p: completed.append(p.grad))
    (expected,) = torch.autograd.grad(3 * linear_cross_entropy(hidden, weight, targets, chunk_size), weight)
    torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk_size), hidden)
    assert slot.num_opened == 0
    for times in (1, 2):
        (3 * linear_cross_entropy(hidden, weight, targets, chunk_size)).backward()
        torch.testing.assert_close(slot.view.bfloat16(), times * plain.grad)
    assert torch.equal(expected, plain.grad)
    assert completed == [None, None]


class LargestResult(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(it.numel() for it in tree_leaves(result) if isinstance(it, Tensor))])
        return result


def test_loss_is_the_cross_entropy_of_the_logits_without_ignored_targets() -> None:
    model = Decoder(TINY)
    tokens, targets = tokens_of(TINY, 2, 17)[:, :-1], tokens_of(TINY, 2, 17)[:, 1:].clone()
    targets[0, :4] = IGNORE_INDEX
    reference = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(model(tokens, targets), reference)


def test_loss_of_a_bf16_model_is_averaged_in_fp32() -> None:
    model = Decoder(TINY).to(torch.bfloat16)
    assert model(tokens_of(TINY, 1, 8), tokens_of(TINY, 1, 8)).dtype == torch.float32


def loss_and_full_grads(
    config: DecoderConfig, implementation: str, head_alone: bool
) -> tuple[float, dict[str, Tensor]]:
    shard = {"ours": fully_shard, "stock": stock_fully_shard, "plain": lambda module: module}[implementation]
    model = Decoder(config)
    for layer in model.layers:
        shard(layer)
    if head_alone:
        shard(model.lm_head)
    shard(model)
    tokens, targets = tokens_of(config, 2, 17)[:, :-1], tokens_of(config, 2, 17)[:, 1:].clone()
    targets[0, :4] = IGNORE_INDEX
    with torch.no_grad():
        without_grad = model(tokens, targets)
    loss = model(tokens, targets)
    assert torch.equal(loss, without_grad)
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    return loss.item(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


@pytest.mark.parametrize(("tie_embeddings", "head_alone"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("implementation", ["ours", "stock"])
@pytest.mark.parametrize("config", [RICH, MIXED])
def test_a_sharded_model_gets_the_gradients_of_a_plain_one(
    config: DecoderConfig, implementation: str, tie_embeddings: bool, head_alone: bool
) -> None:
    """Prevents: a loss that reads the head's weight outside of the module whose hooks gather it."""
    config = dataclasses.replace(config, tie_embeddings=tie_embeddings)
    loss, grads = loss_and_full_grads(config, "plain", head_alone)
    for sharded_loss, sharded_grads in run_ranks(loss_and_full_grads, config, implementation, head_alone):
        assert sharded_loss == pytest.approx(loss)
        assert sharded_grads.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(sharded_grads[name], grad, msg=lambda text, name=name: f"{name}: {text}")


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
    model = Decoder(dataclasses.replace(TINY, vocab_size=3000, qkv_bias=True, qk_norm=True))
    residual_std = 0.02 / (2 * TINY.num_layers) ** 0.5
    for name, param in model.named_parameters():
        if param.dim() == 1:
            assert torch.equal(param, torch.full_like(param, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        std = residual_std if "o_proj" in name or "down_proj" in name else 0.02
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
        stock_fully_shard(layer, mesh=mesh)
    stock_fully_shard(model, mesh=mesh)
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
