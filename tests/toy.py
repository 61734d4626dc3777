"""A problem that a tiny CNN learns in a second, and a clock that always says the same: what the tests of the main job share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tinier.measure.latency import Latency
from tinier.measure.memory import Memory
from tinier.progress import Progress
from tinier.search import driver
from tinier.search.candidate import Candidate

TARGETS = {"onnxruntime": 1.0, "openvino": 1.5, "torch": 5.0}  # milliseconds of the original


class TinyCNN(nn.Module):
    """Two convolutions for 8 × 8 grey images of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv2(torch.relu(self.bn(self.conv1(x)))))
        return self.fc(y.mean((2, 3)))


class TinyMLP(nn.Module):
    """One hidden layer for the same images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 24)
        self.fc2 = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 1, 8, 8) float32 images of a bar across, a bar down or a diagonal, and (count,) labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=random)
    shapes = torch.zeros(3, 1, 8, 8)
    shapes[0, 0, 2:4], shapes[1, 0, :, 5:7], shapes[2, 0] = 1, 1, torch.eye(8)
    return shapes[labels] + 0.3 * torch.randn(count, 1, 8, 8, generator=random), labels


def trained(kind: type[nn.Module]) -> nn.Module:
    """The network, trained until it is nearly always right, in evaluation mode."""
    x, y = images(256, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = kind()
        optimizer = torch.optim.Adam(module.parameters(), 0.02)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    module.zero_grad()
    return module.eval()


def latency(ms: float) -> Latency:
    """A latency without noise."""
    return Latency(ms, ms, ms, ms, 100, 1, (ms,) * 5)


@contextmanager
def steady(keeps: Sequence[float] = (), most: float = 1.0) -> Iterator[None]:
    """The search with a clock that goes by target and variant, without processes for peak memory.

    Args:
        keeps: the shares of the MACs that pruning is tried at.
        most: seconds that one recovery may take.
    """

    def timed(search: driver.Search, candidates: Sequence[Candidate], share: float) -> None:
        with search.progress.task("timing, interleaved", len(candidates)) as step:
            for c in candidates:
                int8 = 0.5 if c.variant.ranges else 1.0
                c.latency = latency(TARGETS[c.target] * (0.1 + 0.9 * c.variant.keep) * int8)
                step.add()

    recover = driver.Workshop.recover
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.Search, "_time", timed)
        patch.setattr(driver, "peak_memory", lambda *_: Memory(60_000_000, 50_000_000))
        patch.setattr(driver, "KEEPS", tuple(keeps))
        patch.setattr(
            driver.Workshop, "recover", lambda shop, k, left: recover(shop, k, min(most, left))
        )
        yield


class Recorder(Progress):
    """Keeps what it is told; raises KeyboardInterrupt once, when a task of a certain name begins for the n-th time."""

    def __init__(self, interrupt: str = "", occurrence: int = 1) -> None:
        self.interrupt, self.left = interrupt, occurrence
        self.said: list[str] = []
        self.tasks: list[str] = []
        self.totals: dict[int, float | None] = {}
        self.done: dict[int, float] = {}

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, text: str, total: float | None) -> int:
        if self.interrupt and text.startswith(self.interrupt):
            self.left -= 1
            if self.left == 0:
                self.interrupt = ""
                raise KeyboardInterrupt
        self.tasks.append(text)
        self.totals[len(self.tasks)] = total
        return len(self.tasks)

    def advance(self, task: int, done: float) -> None:
        self.done[task] = done

    def stop(self, task: int) -> None: ...
