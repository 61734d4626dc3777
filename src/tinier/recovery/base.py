"""What a smaller network is trained towards."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from tinier.network import Network

# The size of the step that the optimizer takes along each entry of a parameter's gradient; one number or one for each entry.
StepSize = Callable[[nn.Parameter], Tensor | float]


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


class FeatureLoss(ABC):
    """A distance of values inside the student from those inside the teacher: a frozen dataclass of its settings."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False

    @abstractmethod
    def on(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> "FeatureTerm":
        """The loss of one pair of networks.

        Args:
            student: features of a few examples at the student's points, dimension 0 being the batch.
            teacher: those at the teacher's points, of the same examples, as many.

        Raises:
            RefusedError: features of a pair cannot be compared.
        """


class FeatureTerm(nn.Module, ABC):
    """A feature loss of one pair of networks; its parameters, such as projections, are trained beside the student."""

    @abstractmethod
    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor | None
    ) -> Tensor:
        """The loss of one batch, differentiable in ``student`` and in the term's parameters.

        Args:
            student: (batch, …) features at each of the student's points.
            teacher: those at the teacher's points, without gradients.
            labels: (batch, …) labels, or None without labels.

        Returns:
            Scalar, 0 or more, a mean over the batch and the points.
        """


class Penalty(ABC):
    """What pulls weights towards zero while a network trains: a frozen dataclass of its settings."""

    name: ClassVar[str]

    @abstractmethod
    def on(self, network: Network, parameters: Mapping[str, nn.Parameter]) -> "Pull":
        """The penalty of one network.

        Args:
            network: for its structure; left as it is.
            parameters: name → parameter of the copy that is trained, which the pull reads and writes.

        Raises:
            RefusedError: the network has nothing that the penalty could pull at.
        """


class Pull(ABC):
    """A penalty on the parameters of one network that is being trained."""

    @abstractmethod
    def loss(self, done: float) -> Tensor | None:
        """What is added to the loss; None where the pull acts on the weights themselves.

        Args:
            done: part of the training that is over, in [0, 1].

        Returns:
            Scalar, 0 or more, differentiable in the parameters.
        """

    @abstractmethod
    def after_step(self, step: StepSize) -> None:
        """Act on the weights after the optimizer has."""

    @abstractmethod
    def after_epoch(self, done: float) -> None:
        """Act on the weights after a pass over the data."""

    @abstractmethod
    def finish(self) -> None:
        """Act on the weights when training is over."""
