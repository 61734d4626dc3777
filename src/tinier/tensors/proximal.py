"""Proximal operators: prox(w) = argmin_v ½ (v − w)² + penalty(v), which give exact zeros."""

import torch
from torch import Tensor


def soft_threshold(w: Tensor, l1: Tensor | float, l2: Tensor | float = 0.0) -> Tensor:
    """S(w) = sign(w) · max(|w| − λ₁, 0) / (1 + λ₂), of the penalty λ₁ |v| + λ₂/2 v².

    Args:
        w: any shape.
        l1: λ₁, 0 or more; broadcasts against ``w``.
        l2: λ₂, likewise.

    Returns:
        Like ``w``.

    Source:
        Zou and Hastie 2005, "Regularization and variable selection via the elastic net", equation 6; λ₂ = 0 is the lasso.
    """
    return w.sign() * (w.abs() - l1).clamp_min(0) / (1 + l2)


def group_factor(squares: Tensor, threshold: Tensor | float) -> Tensor:
    """max(0, 1 − λ / ‖w_g‖₂), by which the proximal operator of the penalty λ ‖v_g‖₂ scales each group.

    Args:
        squares: (groups,) squared norms.
        threshold: λ, 0 or more; broadcasts.

    Returns:
        (groups,) in [0, 1]; a group of zeros stays zero.

    Source:
        Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables", equation 2.4.
    """
    norm = squares.sqrt()
    factor = 1 - threshold / torch.where(norm > 0, norm, 1.0)
    return torch.where(norm > 0, factor.clamp_min(0), torch.zeros_like(norm))
