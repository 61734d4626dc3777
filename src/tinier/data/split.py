"""Parts of a data set that share no example."""

from collections.abc import Sequence

import torch

from tinier.data.base import Examples
from tinier.errors import DataError


def split(examples: Examples, fractions: Sequence[float], seed: int) -> tuple[Examples, ...]:
    """Disjoint parts of the examples, the same for the same seed.

    With integer labels each class is shared out in the same proportions (to within an example or so). Which part an
    example comes to depends on its position, the labels and the seed alone: reorder the file and the parts change. Inside
    a part the examples keep their order.

    Args:
        examples: what to split.
        fractions: the share of each part, each above 0, at most 1 together; what is left over is in no part.
        seed: of the choice.

    Returns:
        One set for each fraction.

    Raises:
        DataError: fractions that make no sense, or a part would be empty.

    Cost:
        Reads the labels once; no inputs where the store knows the labels.
    """
    if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise DataError(f"split: fractions {list(fractions)}; each above 0 and 1 or less together")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    labels = examples.labels()
    if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
        order = order[torch.argsort(labels[order], stable=True)]
    # Along the classes, each example goes to the part that is furthest behind its share: every run of examples, so every
    # class, is shared out in proportion. The share that nobody asked for is a part that is thrown away.
    shares = [*fractions, max(0.0, 1.0 - sum(fractions))]
    parts: list[list[int]] = [[] for _ in shares]
    for position, index in enumerate(order.tolist(), start=1):
        behind = [share * position - len(part) for share, part in zip(shares, parts, strict=True)]
        parts[max(range(len(parts)), key=behind.__getitem__)].append(index)
    if not all(parts[:-1]):
        raise DataError(
            f"split: {len(examples)} examples are too few for parts of {list(fractions)}; "
            f"at least {int(1 / min(fractions)) + 1} are needed"
        )
    return tuple(examples.subset(sorted(part)) for part in parts[:-1])
