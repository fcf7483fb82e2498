"""The mathematics of a connection. Nothing here knows of Hugging Face, files or the command line.

Notation (paper, section 3.1): D_A and D_B are the widths of the augmenting model and the anchor, B the batch, T the
anchor positions of this call, S the augmenting positions seen so far, N_H the heads, d = D_B / N_H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from calmlm.connectors.projections import LowRank, ResidualProjection, linear

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary angles, each of shape (B or 1, 1, length, d), float32."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""``attention(module, q, k, v, mask, scaling=..., dropout=...) -> (out (B, T, N_H, d), weights or None)``."""

ROTARY_BASE = 10_000.0


def rotary_angles(positions: Tensor, head_dim: int) -> Rotation:
    """Rotary angles of ``positions`` (B or 1, length), integers, for heads of width ``head_dim`` (even)."""
    half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * ROTARY_BASE**-half
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate ``x`` (B, N_H, length, d) by ``rotation``."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """Softmax attention spelled out.

    Args:
        query: (B, N_H, T, d).
        key, value: (B, N_H, S, d).
        mask: additive, broadcastable to (B, N_H, T, S), or None.

    Returns:
        the result (B, T, N_H, d) and the weights (B, N_H, T, S).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CrossAttention(nn.Module):
    """Cross-attention from the anchor to the augmenting model (paper, section 3.1).

    ::

        f_proj : R^{D_A} -> R^{D_B}
        Q = H_B W_Q        K = f_proj(H_A) W_K        V = f_proj(H_A) W_V
        H_{A+B} = H_B + Concat_k(softmax(Q_k K_k^T / sqrt(d)) V_k) W_O

    The options add, in this order: RMS norms on both inputs, a bias on queries and keys, rotary positions, a null key,
    a tanh gate. At the start the module is exactly the identity: W_O is zero, or the gate is.

    Args:
        augmenting_size: D_A.
        anchor_size: D_B.
        num_heads: N_H, a divisor of D_B.
        norm, gate, rotary, query_key_bias, null_key, rank, projection: see ``calmlm.config.ConnectorConfig``.

    Attributes:
        observe: is told of each batch's weights, (B, N_H, T, S), a null key's behind them, or None from an attention
            that returns none, and of ``seeing`` as in ``forward``; None for nobody.
    """

    observe: Callable[[Tensor | None, Tensor | None], None] | None = None

    # Read by the attention functions of transformers.
    is_causal = True
    num_key_value_groups = 1
    # The protocol of ``calmlm.connectors``.
    before_layer = False
    reads_distribution = False

    def __init__(
        self,
        augmenting_size: int,
        anchor_size: int,
        num_heads: int,
        *,
        norm: bool = True,
        gate: bool = False,
        rotary: bool = False,
        query_key_bias: float | None = None,
        null_key: bool = False,
        rank: int | None = None,
        projection: str = "linear",
    ) -> None:
        super().__init__()
        biased = query_key_bias is not None
        self.num_heads = num_heads
        self.head_dim = anchor_size // num_heads
        self.rotary = rotary
        self.augmenting_norm = nn.RMSNorm(augmenting_size, eps=1e-6) if norm else nn.Identity()
        self.anchor_norm = nn.RMSNorm(anchor_size, eps=1e-6) if norm else nn.Identity()
        f_proj = ResidualProjection if projection == "residual" else linear
        self.f_proj = f_proj(augmenting_size, anchor_size, rank)
        self.q_proj = linear(anchor_size, anchor_size, rank, bias=biased)
        self.k_proj = linear(anchor_size, anchor_size, rank, bias=biased)
        self.v_proj = linear(anchor_size, anchor_size, rank)
        self.o_proj = linear(anchor_size, anchor_size, rank)
        self.null_key = nn.Parameter(torch.zeros(num_heads, self.head_dim)) if null_key else None
        self.gate = nn.Parameter(torch.zeros(1)) if gate else None
        self.reset_parameters(query_key_bias)

    def reset_parameters(self, query_key_bias: float | None = None) -> None:
        """Draw new weights: normal with variance 1 / fan-in; W_O is zero unless a gate keeps the output at zero.

        What a residual projection adds is zero as well.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.constant_(module.bias, query_key_bias or 0.0)
                if name == "f_proj.out" or (name in ("o_proj", "o_proj.up") and self.gate is None):
                    nn.init.zeros_(module.weight)

    @torch.no_grad()
    def align(self, weight: Tensor, size: float) -> None:
        """Start from a map between the models' states: values are what it gives, keys what is alike to them.

        Args:
            weight: the map, (D_B, D_A), of normed states.
            size: root mean square of what it gives.
        """
        identity = torch.eye(len(weight))
        states = "f_proj.linear" if isinstance(self.f_proj, ResidualProjection) else "f_proj"
        starts: dict[str, Tensor] = {states: weight, "v_proj": identity, "o_proj": identity}
        starts["k_proj"] = self.q_proj.get_parameter("weight") / size
        for name, start in starts.items():
            self.get_submodule(name).get_parameter("weight").copy_(start)

    @property
    def attention(self) -> CrossAttention:
        """The cross-attention inside a connector: this one."""
        return self

    @property
    def is_identity(self) -> bool:
        """Whether it leaves every state as it is, as a new one does."""
        last = self.o_proj.up if isinstance(self.o_proj, LowRank) else self.o_proj
        closed = self.gate is not None and not bool(self.gate)
        return closed or (type(last) is nn.Linear and not bool(last.weight.any()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes."""
        return next(self.parameters()).dtype

    def keys_values(self, augmenting: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Keys and values of new augmenting positions; they depend on nothing else, so they can be cached.

        Args:
            augmenting: (B, S_new, D_A), any float dtype.
            rotation: angles of these positions, needed when ``rotary``.

        Returns:
            keys and values, each (B, N_H, S_new, d), in this module's dtype.
        """
        projected = self.f_proj(self.augmenting_norm(augmenting.to(self.dtype)))
        keys, values = self._heads(self.k_proj(projected)), self._heads(self.v_proj(projected))
        return (rotate(keys, rotation) if rotation is not None else keys), values

    def forward(
        self,
        anchor: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        rotation: Rotation | None = None,
        attention: Attention = eager_attention,
        seeing: Tensor | None = None,
    ) -> Tensor:
        """The new anchor states H_{A+B}.

        Args:
            anchor: H_B, (B, T, D_B), any float dtype.
            keys, values: (B, N_H, S, d), from ``keys_values``.
            mask: what ``attention`` takes; when there is a null key, without its column.
            rotation: angles of the anchor positions, needed when ``rotary``.
            attention: an attention function of transformers, or ``eager_attention``.
            seeing: (B, T) bool, False where a position sees nothing and is left as it is; None where all see something.

        Returns:
            (B, T, D_B), in the dtype of ``anchor``.
        """
        query = self._heads(self.q_proj(self.anchor_norm(anchor.to(self.dtype))))
        if rotation is not None:
            query = rotate(query, rotation)
        if self.null_key is not None:
            keys, values, mask = self._with_null_key(keys, values, mask)
        read, weights = attention(
            self, query, keys.to(query.dtype), values.to(query.dtype), mask, scaling=self.head_dim**-0.5, dropout=0.0
        )
        if self.observe is not None:
            self.observe(weights, seeing)
        read = self.o_proj(read.flatten(2))
        if seeing is not None:
            read = read.masked_fill(~seeing[..., None], 0.0)
        if self.gate is not None:
            read = read * self.gate.tanh()
        return anchor + read.to(anchor.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _with_null_key(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.null_key is not None
        null = self.null_key[None, :, None].expand(keys.shape[0], -1, 1, -1).to(keys.dtype)
        keys = torch.cat((keys, null), dim=-2)
        values = torch.cat((values, torch.zeros_like(null)), dim=-2)
        if mask is not None:
            # True in a boolean mask and 0 in an additive one both mean "visible".
            column = mask.new_full((*mask.shape[:-1], 1), mask.dtype == torch.bool)
            mask = torch.cat((mask, column), dim=-1)
        return keys, values, mask
