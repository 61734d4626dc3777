"""What both sides of ``distillation.py`` share: a small student of the demo's ResNet-20, its data, plain training, accuracy."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from pruning_quality_tasks import Data, task
from torch import Tensor, nn

EXAMPLES, BATCH, EPOCHS, RATE = 10_000, 64, 10, 0.05
WARM_UP = 0.05  # part of the steps in which the learning rate rises


class Student(nn.Module):
    """Three convolutions and a linear layer, 94,000 parameters and a twentieth of the teacher's MACs, (n, 1, 28, 28) → (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 128)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            )
            for a, b in pairwise(widths)
        )
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        found: Tensor = self.fc(x.mean((2, 3)))
        return found


def student(seed: int) -> Student:
    torch.manual_seed(seed)
    return Student()


def teacher() -> nn.Module:
    return task("resnet20").model()


def data(part: str) -> Data:
    """The first 10,000 training images, the validation part, or the test images."""
    source = task("resnet20")
    if part == "train":
        return source.train.part(slice(0, EXAMPLES))
    return source.valid if part == "valid" else source.test


def accuracy(model: nn.Module, part: str) -> float:
    """In %."""
    rows = data(part)
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in rows.inputs["x"].split(500)])
    return 100 * float((found == rows.labels).double().mean())


def factor(done: float) -> float:
    """Of the learning rate: linear warm-up, then half a cosine, as tinier's."""
    if done < WARM_UP:
        return 0.05 + 0.95 * done / WARM_UP
    return (1 + float(torch.cos(torch.tensor(torch.pi * (done - WARM_UP) / (1 - WARM_UP))))) / 2


def by_hand(
    model: nn.Module, other: nn.Module | None, seed: int, epochs: float = EPOCHS
) -> nn.Module:
    """A loop written by hand: cross-entropy without a teacher, soft targets of temperature 4 with one, whose answers are kept."""
    rows = data("train")
    x, y = rows.inputs["x"], rows.labels
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(y) // BATCH
    total = max(1, round(epochs * per_epoch))
    answers: Tensor | None = None
    if other is not None:
        with torch.no_grad():
            answers = torch.cat([other.eval()(part) for part in x.split(BATCH)])
    order = torch.empty(0, dtype=torch.int64)
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(y), generator=generator)
        index = order[step % per_epoch * BATCH :][:BATCH]
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor(step / total)
        found = model(x[index])
        if answers is None:
            loss = F.cross_entropy(found, y[index])
        else:
            p, q = ((z / 4).log_softmax(1) for z in (answers[index], found))
            loss = 16 * (p.exp() * (p - q)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model
