"""Weights that cannot saturate the 16-bit sums of u8 × s8 kernels.

x86 processors without VNNI multiply pairs of unsigned activations and signed weights and add them in saturating 16-bit
arithmetic (``vpmaddubsw``). Activations are at most 255, so 255 · (|w₀| + |w₁|) ≤ 32767 proves that no sum saturates.
"""

import torch
from torch import Tensor

from tinier.tensors.affine import Integers, quantize

# The largest |w₀| + |w₁| that cannot saturate: ⌊32767 / 255⌋.
PAIR_LIMIT = 32767 // 255


def pair_sums(weight: Tensor) -> Tensor:
    """Largest |w₀| + |w₁| over neighbouring weights of each output channel.

    Which weights a kernel pairs depends on its layout, so neighbours both with the input channel slowest (O, I, H, W) and
    fastest (O, H, W, I) count, at every alignment.

    Args:
        weight: (outputs, inputs, *window) integers.

    Returns:
        (outputs,) int64.
    """
    first = weight.to(torch.int64).abs()
    orders = [first.flatten(1), first.movedim(1, -1).flatten(1)]
    sums = [
        (rows[:, :-1] + rows[:, 1:]).amax(1) if rows.shape[1] > 1 else rows[:, 0] for rows in orders
    ]
    return torch.maximum(*sums)


def without_saturation(
    weight: Tensor, scale: Tensor, integers: Integers
) -> tuple[Tensor, tuple[int, ...]]:
    """Scales with which no pair saturates: those of the channels that break the limit grow as little as is enough.

    Args:
        weight: (outputs, inputs, *window) float.
        scale: (outputs,) symmetric scales.
        integers: what the weights become.

    Returns:
        (scales (outputs,), the repaired channels).
    """
    scale = scale.clone()
    repaired: set[int] = set()
    zero = torch.zeros(())
    while True:
        sums = pair_sums(quantize(weight, scale, zero, integers, 0))
        broken = sums > PAIR_LIMIT
        if not broken.any():
            return scale, tuple(sorted(repaired))
        repaired |= set(broken.nonzero().flatten().tolist())
        # Never less than 0.2 % at a time: rounding can keep a sum at the limit while the scale creeps.
        growth = torch.maximum(sums / (PAIR_LIMIT + 0.5), torch.tensor(1.002))
        scale[broken] = (scale * growth)[broken]
