"""Weights that cannot saturate the 16-bit sums of u8 × s8 kernels.

x86 processors without VNNI multiply pairs of unsigned activations and signed weights and add them in saturating 16-bit
arithmetic (``vpmaddubsw``). Activations are at most 255, so 255 · (|w₀| + |w₁|) ≤ 32767 proves that no sum saturates.

Which weights make a pair was found out from the kernels themselves, on an emulated CPU without VNNI: one output channel for
each two of its inputs, 127 there and 0 elsewhere, activations of 255. ONNX Runtime 1.31 and OpenVINO 2026.4:

- Both lay the weights of a channel out with the input channel fastest. ONNX Runtime and OpenVINO's matrix products pair the inputs
  2j and 2j + 1 of all of them in a row, so that with an odd number of input channels pairs reach over to the next place of the window.
  OpenVINO's convolutions pair the input channels 2j and 2j + 1 of each place. A last input without a partner is alone.
- No other two inputs are ever added in 16 bits: weights of 64 everywhere are exact.
- s8 activations saturate alike, since the kernels move them to u8. u8 weights do not, whatever the activations are: their kernels
  widen first, and are slower.
- Depthwise convolutions with one output for each input have kernels of their own, which do not saturate. With several outputs for each
  input the places of the window are the inputs, paired as above.
- With the session option ``session.x64quantprecision`` at 1, ONNX Runtime turns s8 weights into u8 ones on such CPUs, and is exact; but
  it cannot load files in which weights share a zero point then.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinier.tensors.affine import Integers, quantize

# The largest |w₀| + |w₁| that cannot saturate: ⌊32767 / 255⌋.
PAIR_LIMIT = 32767 // 255


def pair_sums(weight: Tensor) -> Tensor:
    """Largest |w₀| + |w₁| over the pairs of weights of each output channel that a kernel adds in 16 bits.

    Args:
        weight: (outputs, inputs, *window) integers.

    Returns:
        (outputs,) int64.

    Cost:
        A few copies of the weight as int64.
    """
    magnitudes = _channels_last(weight.to(torch.int64).abs())
    sums = [_paired(magnitudes, width).sum(-1).amax(1) for width in _widths(magnitudes)]
    return torch.stack(sums).amax(0)


def without_saturation(
    weight: Tensor, scale: Tensor, integers: Integers
) -> tuple[Tensor, tuple[int, ...]]:
    """The smallest scales, none below its own, with which no pair saturates.

    |q| falls as the scale grows, and so does every sum of a pair: bisection finds the smallest float32 that is enough.

    Args:
        weight: (outputs, inputs, *window) float.
        scale: (outputs,) symmetric scales, float32, positive.
        integers: what the weights become, symmetric about 0.

    Returns:
        (scales (outputs,), the repaired channels).

    Cost:
        The channels that saturate are quantized 32 times at most.
    """
    sums = _sums(weight, scale, integers)
    broken = (sums > PAIR_LIMIT).nonzero().flatten()
    if not len(broken):
        return scale.clone(), ()
    rows, low = weight[broken], scale[broken]
    # Half the limit for the largest weight is enough for any pair.
    largest = rows.flatten(1).abs().amax(1)
    high = torch.nextafter(largest / (PAIR_LIMIT // 2), torch.tensor(torch.inf))
    low, high = _steps(low), _steps(high)  # too small, enough
    while bool((high - low > 1).any()):
        middle = low + (high - low) // 2
        enough = _sums(rows, _floats(middle), integers) <= PAIR_LIMIT
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    repaired = scale.clone()
    repaired[broken] = _floats(high)
    return repaired, tuple(broken.tolist())


def lowered(weight: Tensor) -> Tensor:
    """Integers with the larger weight of each pair that saturates moved towards 0, by no more than is needed.

    For integers that were not rounded to nearest: a rounding that weighs weights against each other may end above the sums that their
    scales were chosen for.

    Args:
        weight: (outputs, inputs, *window) integers.

    Returns:
        The same shape and dtype; equal bits where nothing saturates.
    """
    magnitudes = _channels_last(weight.to(torch.int64).abs())
    inputs = magnitudes.shape
    for width in _widths(magnitudes):
        pairs = _paired(magnitudes, width)  # (outputs, pairs, 2)
        excess = (pairs.sum(-1, keepdim=True) - PAIR_LIMIT).clamp_min(0)
        pairs = pairs.scatter_add(-1, pairs.argmax(-1, keepdim=True), -excess)
        rows = pairs.flatten(1).unflatten(1, (-1, width + width % 2))[..., :width]
        magnitudes = rows.reshape(inputs)
    return (magnitudes.movedim(-1, 1) * weight.sign()).to(weight.dtype)


def _sums(weight: Tensor, scale: Tensor, integers: Integers) -> Tensor:
    return pair_sums(quantize(weight, scale, torch.zeros(()), integers, 0))


def _channels_last(weight: Tensor) -> Tensor:
    """(outputs, *window, inputs), contiguous."""
    return weight.movedim(1, -1).contiguous()


def _widths(weight: Tensor) -> list[int]:
    """After how many inputs the pairs of a kernel begin anew: a whole channel, or one place of the window."""
    whole, place = weight[0].numel(), weight.shape[-1]
    # With an even number of input channels both make the same pairs.
    return [whole, place] if place % 2 and 1 < place < whole else [whole]


def _paired(weight: Tensor, width: int) -> Tensor:
    """(outputs, pairs, 2); the last of an odd width stands beside 0."""
    rows = weight.reshape(len(weight), -1, width)
    return F.pad(rows, (0, width % 2)).reshape(len(weight), -1, 2)


def _steps(values: Tensor) -> Tensor:
    """Positive float32 numbers as how many there are below them, int64."""
    return values.contiguous().view(torch.int32).to(torch.int64)


def _floats(steps: Tensor) -> Tensor:
    return steps.to(torch.int32).view(torch.float32)
