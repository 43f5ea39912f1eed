"""The packed forward: tokens of many sequences, one row each, through the model to logits.

Nothing is allocated: every operation writes into a planned buffer. This file knows weights, buffers and pages; it must
not know whose tokens they are, nor how they got here.

Rows of a step: first one token of each of some sequences, then chunks of others, then padding. Tables of sequences
have ``num_single`` rows for the former, the last of which may be padding, and from ``first_chunk`` on the latter's.

[Note: padded steps]
A step of a given ``StepSize`` issues the same kernels on the same addresses whatever its batch is, so it can be
recorded once and replayed: how many sequences and tokens there really are is in the tables alone. Padding reads and
writes no pages: lengths are 0, slots are -1. Where fewer than ``num_single`` sequences decode, the rows behind theirs
belong to chunks: decode attention writes zeros there, then prefill attention what is right, so their order matters.

[Note: aligned rows]
Triton compiles another kernel for a pointer that is not a multiple of 16 bytes. The parts of tables that hold chunks
begin at a multiple of 4 rows of int32, so that no step needs a kernel that warming up has not compiled.

Ranks that compute together each have their part of a layer, and what a layer adds is the sum over ranks of what the
parts give. Of logits each computes those of its range of the vocabulary.

Shapes: T tokens of a step, B sequences, D model, V vocabulary, G groups of layers, P pages; and this rank's N heads,
K kv heads, H head dim, F feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from yafsdp_like.inference.engine.products import choose_pieces, multiply
from yafsdp_like.kernels.activation import swiglu
from yafsdp_like.kernels.decode_attention import choose_num_splits, decode_attention, workspace_numel
from yafsdp_like.kernels.experts import ExpertWeights, feed_experts
from yafsdp_like.kernels.gemv import matmul
from yafsdp_like.kernels.lora import AdapterRows, LowRank, add_low_rank, num_lines
from yafsdp_like.kernels.norm import rms_norm
from yafsdp_like.kernels.paged_attention import AttentionBatch, KVPages
from yafsdp_like.kernels.prefill_attention import prefill_attention
from yafsdp_like.kernels.quantized_matrix import QuantizedMatrix
from yafsdp_like.kernels.query_tiles import max_num_tiles, queries_per_tile
from yafsdp_like.kernels.rotary import HeadNorms, rotate_and_store
from yafsdp_like.kernels.routing import Visits, route

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from yafsdp_like.inference.kv.layer_groups import LayerGroup
    from yafsdp_like.inference.plan.buffers import StepBuffers
    from yafsdp_like.inference.plan.step_sizes import StepSize
    from yafsdp_like.inference.weights.store import LayerWeights, Weights


@dataclass(frozen=True)
class LayerPages:
    """Where the keys and values of one layer are, and what its attention sees."""

    pages: KVPages
    group: int  # of layers that share page tables
    window: int | None

    @classmethod
    def of(
        cls, groups: Sequence[LayerGroup], region: Tensor, scales: Sequence[tuple[float, float]] | None = None
    ) -> list[LayerPages]:
        """Make the pages of all layers from the bytes (nbytes,) uint8 of one region.

        ``scales`` are those of each layer's keys and values, which pages of float8 have, and no others.
        """
        found: dict[int, LayerPages] = {}
        for index, group in enumerate(groups):
            shape = group.shape
            dtype = getattr(torch, shape.dtype)
            flat = region[: region.numel() // shape.itemsize * shape.itemsize].view(dtype)
            num_pages = region.numel() // shape.nbytes
            dims = (num_pages, shape.num_layers, 2, shape.num_kv_heads, shape.page_size, shape.head_dim)
            pages = flat.as_strided(dims, shape.strides).transpose(3, 4)  # (P, layers, 2, page_size, K, H)
            for position, layer in enumerate(group.layers):
                own = scales[layer] if scales is not None and dtype == torch.float8_e4m3fn else (1.0, 1.0)
                found[layer] = cls(KVPages(pages[:, position, 0], pages[:, position, 1], *own), index, group.window)
        return [found[layer] for layer in range(len(found))]


class Forward:
    """One model's forward over the buffers of one engine; a call reads the inputs that the device has by then."""

    def __init__(
        self,
        weights: Weights,
        buffers: StepBuffers,
        cache: Sequence[LayerPages],
        num_multiprocessors: int = 1,
        adapters: Sequence[Mapping[str, LowRank]] = (),
    ) -> None:
        """``adapters`` are the matrices of all slots, by layer and product; none: no step is adapted."""
        self._weights, self._cache, self._adapters = weights, cache, adapters
        self._activations, self._logits = buffers.activations, buffers.logits.logits
        self._inputs, self._tables = buffers.inputs, buffers.tables
        self._config, self._tp_group = weights.plan.rank_config, weights.tp_group
        self._max_seq_len, self._num_multiprocessors = len(buffers.tables.cos), num_multiprocessors
        self._queries_per_tile = queries_per_tile_of(weights)

    def __call__(
        self, size: StepSize, scored: Iterable[slice] = (), images: Iterable[tuple[slice, Tensor]] = ()
    ) -> Tensor:
        """Return logits (num_drawing, V) in the weights' dtype; keys and values go into pages.

        ``scored`` are rows whose logits are computed before, at the beginning of the same buffer, for whoever iterates:
        those of one slice are there until the next one is asked for. A step whose rows all draw has none. ``images``
        are rows of images, and what is put in place of their tokens' embeddings, (rows, D).
        """
        self._embed(slice(0, size.num_tokens))
        for rows, values in images:
            self._activations.hidden[rows].copy_(values)
        for index in range(self._config.num_layers):
            self._layer(index, self._weights.layer(index), size)
            self._weights.release(index)
        return self._head(size, scored)

    def warm_up(self, sizes: Sequence[StepSize]) -> None:
        """Issue what steps of ``sizes`` issue, but one layer of each kind; the tables must be those of padding.

        Libraries load and choose kernels when a shape comes first, which must not happen in a recording.
        """
        self._embed(slice(0, 1))
        kinds = set[tuple[object, ...]]()
        for index in range(self._config.num_layers):
            layer = self._weights.layer(index)
            kind = self._cache[index].window, *_kind_of(layer)
            if kind not in kinds:
                kinds.add(kind)
                for num_tokens in sorted({size.num_tokens for size in sizes}):
                    self._choose_pieces(layer, num_tokens)
                for size in sizes:
                    self._layer(index, layer, size)
            self._weights.release(index)
        for size in sizes:
            self._head(size)

    def _choose_pieces(self, layer: LayerWeights, num_tokens: int) -> None:
        """Measure how products of so many rows are computed fastest; what activations hold does not matter."""
        to, rows = self._activations, slice(0, num_tokens)
        choose_pieces(to.normed[rows], layer.qkv, to.qkv[rows])
        choose_pieces(to.attended[rows], layer.o, to.normed[rows])
        if layer.router is not None:
            return
        gate, _ = to.gate_up[rows].chunk(2, dim=1)
        choose_pieces(to.normed[rows], layer.gate_up, to.gate_up[rows])
        choose_pieces(gate, layer.down, to.normed[rows])

    def skip(self) -> None:
        """Make a forward of no tokens, for a rank in lockstep that has nothing to do."""
        self._weights.embedding()
        for index in range(self._config.num_layers):
            self._weights.layer(index)
            self._weights.release(index)
        self._weights.head()

    def _embed(self, rows: slice) -> None:
        inputs, tables, token_ids = self._inputs, self._tables, self._tables.token_ids[rows]
        torch.index_select(inputs.token_pool, 0, inputs.token_index[rows], out=token_ids)
        torch.index_select(self._weights.embedding(), 0, token_ids, out=self._activations.hidden[rows])
        torch.index_select(tables.cos, 0, inputs.positions[rows], out=self._activations.step_cos[rows])
        torch.index_select(tables.sin, 0, inputs.positions[rows], out=self._activations.step_sin[rows])

    def _layer(self, index: int, layer: LayerWeights, size: StepSize) -> None:
        """Compute one layer; ``hidden`` is the residual stream, ``normed`` what the layer before adds to it."""
        rows = slice(0, size.num_tokens)
        hidden, normed = self._activations.hidden[rows], self._activations.normed[rows]
        self._norm(normed if index else None, hidden, layer.input_norm, normed)
        self._attend(index, layer, size, normed)
        self._norm(normed, hidden, layer.post_norm, normed)
        self._feed(index, layer, size, normed)

    def _norm(self, added: Tensor | None, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        """Add to the residual stream what a layer adds to it, and norm the sum."""
        if added is None:
            rms_norm(hidden, weight, self._config.norm_eps, out)
        else:
            rms_norm(added, weight, self._config.norm_eps, out, residual=hidden)

    def _attend(self, index: int, layer: LayerWeights, size: StepSize, normed: Tensor) -> None:
        """Replace normed rows (T, D) by what attention adds to them."""
        config, to, rows = self._config, self._activations, slice(0, size.num_tokens)
        qkv, attended = to.qkv[rows], to.attended[rows]
        multiply(normed, layer.qkv, qkv, to.products)
        self._adapt(index, "qkv", size, normed, qkv)
        if layer.qkv_bias is not None:
            qkv.add_(layer.qkv_bias)
        heads = qkv.unflatten(1, (-1, config.head_dim))
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        tables = to.step_cos[rows], to.step_sin[rows]
        cache = self._cache[index]
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = HeadNorms(layer.q_norm, layer.k_norm, config.norm_eps)
        rotate_and_store(q, k, v, tables, cache.pages, self._inputs.slot_mapping[cache.group, rows], norms)
        self._attend_pages(q, cache, size, attended.unflatten(1, (-1, config.head_dim)))
        multiply(attended, layer.o, normed, to.products)
        self._adapt(index, "o", size, attended, normed)
        self._sum(normed)
        if layer.o_bias is not None:
            normed.add_(layer.o_bias)

    def _attend_pages(self, q: Tensor, cache: LayerPages, size: StepSize, out: Tensor) -> None:
        tables, seq_lens = self._inputs.page_tables[cache.group], self._inputs.seq_lens
        single = slice(0, size.num_single)
        if size.num_single:  # before the chunks, see [Note: padded steps]
            batch = AttentionBatch(tables[single], seq_lens[single])
            workspace, num_splits = self._pieces(size.num_single, cache.window)
            decode_attention(q[single], cache.pages, batch, out[single], workspace, num_splits, cache.window)
        if size.num_chunks:
            chunks = slice(size.first_chunk, size.num_table_rows)
            tiles = self._inputs.tiles[: 1 + max_num_tiles(size.num_tokens, size.num_chunks, self._queries_per_tile)]
            batch = AttentionBatch(tables[chunks], seq_lens[chunks], tiles)
            prefill_attention(q, cache.pages, batch, out, cache.window)

    def _pieces(self, batch_size: int, window: int | None) -> tuple[Tensor, int]:
        """Return the workspace of decode attention, and the number of pieces that keys are cut into."""
        config, workspace = self._config, self._activations.attention
        max_length = min(window or self._max_seq_len, self._max_seq_len)
        wanted = choose_num_splits(batch_size, config.num_kv_heads, max_length, self._num_multiprocessors)
        while workspace_numel(batch_size, config.num_heads, config.head_dim, wanted) > workspace.numel():
            wanted -= 1
        return workspace, wanted

    def _feed(self, index: int, layer: LayerWeights, size: StepSize, normed: Tensor) -> None:
        """Replace normed rows (T, D) by what the feed-forward adds to them, or the experts."""
        if layer.router is not None:
            self._visit_experts(layer.router, layer, size, normed)
            return
        gate_up, workspace = self._activations.gate_up[: size.num_tokens], self._activations.products
        multiply(normed, layer.gate_up, gate_up, workspace)
        self._adapt(index, "gate_up", size, normed, gate_up)
        if layer.gate_up_bias is not None:
            gate_up.add_(layer.gate_up_bias)
        gate, up = gate_up.chunk(2, dim=1)
        swiglu(gate, up, gate)
        multiply(gate, layer.down, normed, workspace)
        self._adapt(index, "down", size, gate, normed)
        self._sum(normed)
        if layer.down_bias is not None:
            normed.add_(layer.down_bias)

    def _visit_experts(self, router: Tensor, layer: LayerWeights, size: StepSize, normed: Tensor) -> None:
        """Replace normed rows (T, D) by what the experts that they visit add to them."""
        config, to, rows = self._config.experts, self._activations, slice(0, size.num_tokens)
        assert config is not None, "a layer with a router has experts"
        visits = slice(0, size.num_tokens * config.experts_per_token)
        tables = to.visit_experts[visits], to.visit_weights[visits], to.visit_order[visits]
        visited, scores = Visits(*tables, to.visit_starts), to.router[rows]
        matmul(normed, router, scores)
        slots = self._inputs.slot_mapping[0, rows]  # of padding -1, in every group
        route(scores, config.experts_per_token, config.normalize, slots, visited)
        weights = ExpertWeights(layer.gate_up, layer.down)
        feed_experts(normed, weights, visited, to.expert_hidden[visits], to.expert_parts[visits], normed)
        self._sum(normed)

    def _adapt(self, index: int, product: str, size: StepSize, rows: Tensor, out: Tensor) -> None:
        """Add to a product of ``rows`` what the adapter of each row adds."""
        if size.adapted:
            low_rank, inputs, num_tokens = self._adapters[index][product], self._inputs, size.num_tokens
            tiles = inputs.adapter_tiles[: num_lines(num_tokens, len(low_rank.b))]
            adapted = AdapterRows(inputs.adapter_rows[:num_tokens], tiles)
            add_low_rank(rows, low_rank, adapted, self._activations.adapted, out)

    def _sum(self, part: Tensor) -> None:
        """Sum ``part`` over tensor parallel ranks, in place."""
        if self._tp_group is not None:
            self._tp_group.sum_(part)

    def _head(self, size: StepSize, scored: Iterable[slice] = ()) -> Tensor:
        norm, head = self._weights.head()
        added, hidden = self._activations.normed[: size.num_tokens], self._activations.hidden[: size.num_tokens]
        last, logits = self._activations.last[: size.num_drawing], self._logits[: size.num_drawing]
        if size.draws_in_order:
            self._norm(added, hidden, norm, last)
            return self._project(last, head, logits) if size.num_drawing else logits
        if size.num_drawing or scored:
            self._norm(added, hidden, norm, added)
        for rows in scored:
            self._project(added[rows], head, self._logits[: rows.stop - rows.start])
        if size.num_drawing:
            torch.index_select(added, 0, self._inputs.last_rows[: size.num_drawing], out=last)
            self._project(last, head, logits)
        return logits

    def _project(self, last: Tensor, head: Tensor, logits: Tensor) -> Tensor:
        if self._tp_group is None:
            matmul(last, head, logits)
            return logits
        rows = _range_of(len(head), self._tp_group.rank, self._tp_group.size)
        logits.zero_()
        matmul(last, head[rows], logits[:, rows])
        self._sum(logits)  # exact: of each logit all ranks but one have 0
        return logits


def _kind_of(layer: LayerWeights) -> tuple[object, ...]:
    """Return what decides which kernels a layer's products are: equal for layers that are warmed up as one."""
    products = layer.qkv, layer.o, layer.gate_up, layer.down
    return layer.router is None, *(isinstance(matrix, QuantizedMatrix) for matrix in products)


def queries_per_tile_of(weights: Weights) -> int:
    """Return how many queries of a chunk one program attends with."""
    config = weights.plan.rank_config
    return queries_per_tile(config.num_heads, config.num_kv_heads, config.head_dim, weights.dtype.itemsize)


def _range_of(vocab_size: int, rank: int, num_ranks: int) -> slice:
    """Return a rank's part of the vocabulary.

    It begins at a multiple of 16 bytes, also in bf16, for which matrix products are fastest.
    """
    most = -(-vocab_size // (8 * num_ranks)) * 8
    return slice(min(rank * most, vocab_size), min((rank + 1) * most, vocab_size))
