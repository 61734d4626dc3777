"""Fine-tuning of classifiers: match the labels."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from tinier.recovery.base import Loss


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """``−log softmax(z)[label]``, a mean over the batch.

    Attributes:
        weight: factor of the loss.
        smoothing: ε in [0, 1): the label's probability is 1 − ε, the rest is shared by all classes.
        output: which output of the network holds the logits, (batch, classes, …).
    """

    name: ClassVar[str] = "cross_entropy"
    needs_labels: ClassVar[bool] = True
    weight: float = 1.0
    smoothing: float = 0.0
    output: int = 0

    def __call__(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor | None
    ) -> Tensor:
        if labels is None:
            raise ValueError("CrossEntropy needs labels; the data have none")
        loss = F.cross_entropy(student[self.output], labels, label_smoothing=self.smoothing)
        return self.weight * loss
