"""The losses of a training, those of values inside the two networks among them."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from tinier.data.base import Examples
from tinier.modules.observed import capturing
from tinier.network import Network
from tinier.recovery.base import FeatureLoss, FeatureTerm, Loss
from tinier.recovery.pairing import LayerPair
from tinier.recovery.settings import Settings

AnyLoss = Loss | FeatureLoss


class Inside:
    """Computes all losses; while it is entered, values at the paired places are kept at each run of the networks.

    Args:
        student: the network that is trained.
        teacher: the original.
        losses: of outputs and of features.
        pairs: of places, for losses of features.
        train: examples, of which a batch says what features are like.
        settings: batch and seed.

    Attributes:
        pairs: the paired places; empty without losses of features.
        terms: the feature losses, whose parameters are trained, too.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        losses: Sequence[AnyLoss],
        pairs: Sequence[LayerPair],
        train: Examples,
        settings: Settings,
    ) -> None:
        self.student, self.teacher, self.all = student, teacher, losses
        self.pairs = pairs
        self.terms = nn.ModuleList()
        self._stack = ExitStack()
        self._ours: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        features = [loss for loss in losses if isinstance(loss, FeatureLoss)]
        if not pairs:
            return
        count = min(settings.batch, len(train))
        inputs, _ = next(train.subset(range(count)).batches(count))
        device = next(student.module.parameters()).device
        here = {name: value.to(device) for name, value in inputs.items()}
        with torch.random.fork_rng(devices=[]), torch.no_grad(), self:
            torch.manual_seed(settings.seed)
            student(here)
            teacher(here)
            ours, theirs = self._values()
            self.terms.extend(loss.on(ours, theirs) for loss in features)
        self.terms.to(device)

    def __enter__(self) -> "Inside":
        if self.pairs:
            ours = list(dict.fromkeys(pair.student for pair in self.pairs))
            theirs = list(dict.fromkeys(pair.teacher for pair in self.pairs))
            self._ours = self._stack.enter_context(capturing(self.student.module, ours))
            self._theirs = self._stack.enter_context(capturing(self.teacher.module, theirs))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def losses(
        self, outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...], labels: Tensor | None
    ) -> list[Tensor]:
        """Each loss of the latest run, a scalar, in their order.

        Args:
            outputs: the student's.
            targets: the teacher's.
            labels: or None.
        """
        ours, theirs = self._values()
        terms = iter(self.terms)
        found = []
        for loss in self.all:
            if isinstance(loss, Loss):
                found.append(loss(outputs, targets, labels))
            else:
                term = next(terms)
                assert isinstance(term, FeatureTerm)
                found.append(term(ours, theirs, labels))
        return found

    def _values(self) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [self._ours[pair.student] for pair in self.pairs],
            [self._theirs[pair.teacher] for pair in self.pairs],
        )
