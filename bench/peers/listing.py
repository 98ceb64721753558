"""A Mamba-2 language model in plain PyTorch: the second peer of the speed comparison.

The sequence map follows the chunked form of the state space duality paper (arXiv:2405.21060): a segment sum and one
einsum expression for each of its four steps. Two things differ from the literal listing, both in the peer's favour:
B and C are not repeated for each head (n_groups is 1), and the segment sum is a difference of cumulative sums.
Parameters carry the names of transformers' Mamba2ForCausalLM, so that one's state dict loads into the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Sizes of a model with one group of B and C and a tied head."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_state: int
    head_dim: int
    expand: int
    d_conv: int

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.head_dim


def segment_sum(a: Tensor) -> Tensor:
    """out[..., t, s] = a[..., s+1] + ... + a[..., t] for t >= s, else -inf."""
    total = a.cumsum(-1)
    causal = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).tril()
    return (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf)


def ssd(x: Tensor, a: Tensor, B: Tensor, C: Tensor, chunk: int) -> Tensor:
    """S_t = exp(a_t) S_{t-1} + x_t B_t^T and y_t = S_t C_t, from S = 0, in chunks.

    x: (batch, length, heads, head_dim), already multiplied by dt; a: (batch, length, heads);
    B, C: (batch, length, d_state). length must be a multiple of chunk. In the einsums: b batch, c chunk, t and s
    positions in a chunk, h head, p head channel, n state, and z the chunk that a state comes from.
    """
    batch, length = x.shape[:2]
    x, a, B, C = (v.reshape(batch, length // chunk, chunk, *v.shape[2:]) for v in (x, a, B, C))
    a = a.permute(0, 3, 1, 2)
    total = a.cumsum(-1)

    # 1. Inside a chunk: a masked product, as in attention.
    y = torch.einsum("bcts,bhcts,bcshp->bcthp", torch.einsum("bctn,bcsn->bcts", C, B), segment_sum(a).exp(), x)
    # 2. What each chunk adds to the state at its end.
    left = (total[..., -1:] - total).exp()
    states = torch.einsum("bhcs,bcshp,bcsn->bchpn", left, x, B)
    # 3. The recurrence over chunks: the state at each chunk's start.
    states = F.pad(states, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    between = segment_sum(F.pad(total[..., :-1, -1], (1, 0))).exp()
    states = torch.einsum("bhcz,bzhpn->bchpn", between, states)
    # 4. What that state adds to each output.
    y = y + torch.einsum("bctn,bchpn,bhct->bcthp", C, states, total.exp())
    return y.reshape(batch, length, *y.shape[3:])


class RMSNorm(nn.Module):
    """v / rms(v) * weight, with v = x silu(gate) if a gate is given."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is not None:
            x = x * F.silu(gate)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Mixer(nn.Module):
    """The Mamba-2 mixer: project, convolve, SSD, gated norm, project."""

    def __init__(self, size: Size, chunk: int) -> None:
        super().__init__()
        self.size, self.chunk = size, chunk
        width = size.d_inner + 2 * size.d_state
        self.in_proj = nn.Linear(size.d_model, size.d_inner + width + size.n_heads, bias=False)
        self.conv1d = nn.Conv1d(width, width, size.d_conv, groups=width, padding=size.d_conv - 1)
        dt = torch.exp(torch.empty(size.n_heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.empty(size.n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(size.n_heads))
        self.norm = RMSNorm(size.d_inner)
        self.out_proj = nn.Linear(size.d_inner, size.d_model, bias=False)
        nn.init.uniform_(self.out_proj.weight, -1, 1)
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(size.d_inner * size.n_layers))

    def forward(self, u: Tensor) -> Tensor:
        size, (batch, length, _) = self.size, u.shape
        z, xBC, dt = self.in_proj(u).split([size.d_inner, size.d_inner + 2 * size.d_state, size.n_heads], dim=-1)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2))[..., :length]).transpose(1, 2)
        x, B, C = xBC.split([size.d_inner, size.d_state, size.d_state], dim=-1)
        x = x.reshape(batch, length, size.n_heads, size.head_dim)
        dt = F.softplus(dt + self.dt_bias)
        y = ssd(x * dt[..., None], -self.A_log.exp() * dt, B, C, min(self.chunk, length))
        y = y + self.D[:, None] * x
        return self.out_proj(self.norm(y.reshape(batch, length, size.d_inner), z))


class Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, size: Size, chunk: int) -> None:
        super().__init__()
        self.norm = RMSNorm(size.d_model)
        self.mixer = Mixer(size, chunk)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class ListingLM(nn.Module):
    """Embedding, blocks, norm and a head tied to the embedding: tokens (batch, length) -> logits."""

    def __init__(self, size: Size, chunk: int = 64) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(size.vocab_size, size.d_model)
        nn.init.normal_(self.backbone.embeddings.weight, std=0.02)
        self.backbone.layers = nn.ModuleList(Block(size, chunk) for _ in range(size.n_layers))
        self.backbone.norm_f = RMSNorm(size.d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.backbone.embeddings(tokens)
        for block in self.backbone.layers:
            x = block(x)
        return F.linear(self.backbone.norm_f(x), self.backbone.embeddings.weight)
