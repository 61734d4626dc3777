"""Attention of torch's own form whose heads together are narrower than its input."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinier.errors import InputError


class NarrowAttention(nn.Module):
    """``nn.MultiheadAttention`` for heads that are left of more: with the same parameters, arguments, masks and dropout.

    Torch's own class needs heads that together are as wide as its input. Scores are scaled as the original's.

    Args:
        source: with smaller parameters, without ``bias_k``, ``bias_v`` and ``add_zero_attn``.
        num_heads: how many are left.
        scale: of the scores.
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor

    def __init__(self, source: nn.MultiheadAttention, num_heads: int, scale: float) -> None:
        super().__init__()
        for name in (
            "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight",
        ):  # fmt: skip
            self.register_parameter(name, getattr(source, name))
        self.out_proj = source.out_proj
        self.num_heads, self.scale = num_heads, scale
        self.dropout, self.batch_first = source.dropout, source.batch_first
        self._qkv_same_embed_dim = False  # torch's encoder layers would read the weights past it
        self.training = source.training

    @property
    def embed_dim(self) -> int:
        """Width of what goes in as query, and of what comes out."""
        return int(self.out_proj.out_features)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; ``is_causal`` is a hint there, and the mask that comes with it is used here.

        Raises:
            InputError: a mask for each head does not have as many heads as are left, or ``is_causal`` comes without a mask.
        """
        if is_causal and attn_mask is None:
            raise InputError("is_causal is a hint about attn_mask, which is missing; give both")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, (weight, bias) in zip((query, key, value), self._projections(), strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        result = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return result[0], None if weights is None else weights[0]
        return result if self.batch_first else result.transpose(0, 1), weights

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is None
            else self.in_proj_weight.chunk(3)
        )
        if self.in_proj_bias is None:
            return [(weight, None) for weight in weights]
        biases = self.in_proj_bias.split([weight.shape[0] for weight in weights])
        return list(zip(weights, biases, strict=True))

    def _mask(self, scores: Tensor | None, keys: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores: (batch, heads or 1, queries or 1, keys)."""
        if scores is not None and scores.dim() == 3:
            if scores.shape[0] != len(q) * self.num_heads:
                raise InputError(
                    f"attn_mask: its first dimension is {scores.shape[0]}, {len(q)} · {self.num_heads} is needed, as {self.num_heads} "
                    "heads are left; give the masks of these heads, or one (queries, keys) mask for all"
                )
            scores = scores.unflatten(0, (-1, self.num_heads))
        if keys is not None:
            keys = keys[:, None, None] if keys.dim() == 2 else keys
        parts = [_added(mask, q.dtype) for mask in (scores, keys) if mask is not None]
        return parts[0] + parts[1] if len(parts) == 2 else next(iter(parts), None)

    def extra_repr(self) -> str:
        """The class that it stands for."""
        return f"num_heads={self.num_heads}, in the place of MultiheadAttention"


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
