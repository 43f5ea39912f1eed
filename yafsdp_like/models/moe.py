"""A mixture of experts: each token goes through the few feed-forwards that a router chooses for it.

Owns the router, the experts' stacked weights and the way of tokens to experts and back. It must not know of the
decoder around it. It computes no loss to balance experts with.

Shapes: T tokens, D model, F feed-forward, E experts, S = `experts_per_token`, R = T S rows, one for each token and
choice.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertsConfig:
    """How many experts there are, and how many each token visits."""

    num_experts: int
    experts_per_token: int
    normalize: bool = True  # the weights of a token's experts add up to 1

    def __post_init__(self) -> None:
        if not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token must be between 1 and num_experts {self.num_experts}, got {self.experts_per_token}"
            )


class Experts(nn.Module):
    """SwiGLU feed-forwards of equal shape, stacked, so that sharding by rows gives each rank whole experts."""

    def __init__(self, dim: int, ffn_dim: int, num_experts: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num_experts, ffn_dim, dim))  # (E, F, D)
        self.up_proj = nn.Parameter(torch.empty(num_experts, ffn_dim, dim))  # (E, F, D)
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, ffn_dim))  # (E, D, F)

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows (R, D), of which the first `counts[0]` are for expert 0 and so on, to (R, D).

        Weights are unbound at once: taken one by one, each would get a gradient of all experts' size.
        """
        weights = zip(self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
        return torch.cat(
            [
                F.linear(F.silu(F.linear(chosen, gate)) * F.linear(chosen, up), down)
                for chosen, (gate, up, down) in zip(rows.split(counts), weights, strict=True)
            ]
        )


class MixtureOfExperts(nn.Module):
    """sum over the S experts of the largest p of p_e expert_e(x), with p = softmax(gate(x)) over all E.

    Jiang et al., "Mixtral of Experts", 2024, section 2.1, where the S weights are normalized to add up to 1.
    """

    def __init__(self, dim: int, ffn_dim: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(dim, config.num_experts, bias=False)
        self.experts = Experts(dim, ffn_dim, config.num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D). Reads the number of each expert's tokens on the CPU: one synchronisation."""
        tokens = x.flatten(0, 1)  # (T, D)
        weights, experts = self._route(tokens)
        order = experts.flatten().argsort(stable=True)  # (R,): rows by expert
        counts = experts.flatten().bincount(minlength=self.config.num_experts).tolist()
        rows = tokens[order // self.config.experts_per_token]  # (R, D)
        out = self.experts(rows, counts)[order.argsort()]  # (R, D): rows by token
        return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).view_as(x)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:  # (T, D) -> weights (T, S), experts (T, S)
        probs = F.softmax(self.gate(tokens), dim=-1, dtype=torch.float32)  # (T, E)
        weights, experts = probs.topk(self.config.experts_per_token, dim=-1)
        if self.config.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(tokens.dtype), experts
