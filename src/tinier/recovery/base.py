"""What a smaller network is trained towards."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Loss(ABC):
    """A distance of the student's answers from the teacher's or from the labels: a frozen dataclass of its settings."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor | None
    ) -> Tensor:
        """The loss of one batch, differentiable in ``student``.

        Args:
            student: outputs of the network that is trained; dimension 0 is the batch.
            teacher: outputs of the original, of the same shapes, without gradients.
            labels: (batch, …) labels, or None without labels.

        Returns:
            Scalar, 0 or more, a mean over the batch.
        """
