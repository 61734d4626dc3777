"""What both sides of ``pruning_quality.py`` share: networks, data, fine-tuning, accuracy and the count of MACs.

Tasks: "resnet20" (the trained network of tinier's demo) and "vit" (trained here once, cached) on Fashion-MNIST; "minilm" on spam, a
Hugging Face directory that ``minilm_spam.py --keep`` leaves. Fashion-MNIST is the Debian package dataset-fashion-mnist (60,000 training
images) where it is installed, else the 14,000 that come with tinier. Choices are made on a part of the training data that nothing is
trained on; the test data are only reported.
"""

import copy
import csv
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peers import cache
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tinier.demo.run import network as resnet20
from tinier.demo.run import test as demo_test
from tinier.demo.run import train as demo_train

Inputs = dict[str, Tensor]
PACKAGE = Path("/usr/share/datasets/fashion-mnist")
VALIDATION = {"resnet20": 2000, "vit": 2000, "minilm": 400}  # of the training data, its end
CALIBRATION = 512
TESTED = 1500  # mails
LENGTH = 64  # tokens


@dataclass(frozen=True)
class Recipe:
    """The short fine-tuning, the same for both sides: plain cross-entropy."""

    steps: int
    batch: int
    lr: float
    optimizer: str


RECIPES = {
    "resnet20": Recipe(200, 64, 0.02, "sgd"),
    "vit": Recipe(200, 64, 1e-3, "adamw"),
    "minilm": Recipe(60, 32, 1e-4, "adamw"),
}


@dataclass(frozen=True)
class Data:
    """Inputs by name with dimension 0 the examples, and class numbers."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: Tensor | slice) -> "Data":
        return Data({name: value[index] for name, value in self.inputs.items()}, self.labels[index])

    def batches(self, size: int) -> Iterator["Data"]:
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))


@dataclass(frozen=True)
class Task:
    """A trained network and its data."""

    name: str
    model: Callable[[], nn.Module]
    train: Data
    valid: Data
    test: Data
    source: str

    def calibration(self, seed: int) -> Data:
        """512 training examples, drawn by the seed."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train.part(order[:CALIBRATION])

    @property
    def example(self) -> Inputs:
        return {name: value[:2] for name, value in self.train.inputs.items()}


class Attention(nn.Module):
    """Multi-head self-attention with separate projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, -1))


class Layer(nn.Module):
    """A block of a transformer, norms first."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A small vision transformer: 49 patches of 4 × 4, width 64, four blocks with four heads and 256 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 64, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 49, 64) * 0.02)
        self.layers = nn.Sequential(*(Layer(64, 4, 256) for _ in range(4)))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(tokens)).mean(1))


def task(name: str, spam: Path | None = None) -> Task:
    """A task by name; "minilm" needs the folder that has spam/, train.csv and test.csv."""
    if name == "minilm":
        if spam is None:
            raise ValueError("minilm needs --spam")
        return _spam(spam)
    train, test, source = _images()
    cut = len(train) - VALIDATION[name]
    parts = train.part(slice(0, cut)), train.part(slice(cut, None))
    model = resnet20 if name == "resnet20" else lambda: _vit(parts[0], source)
    return Task(name, model, *parts, test, source)


def tune(model: nn.Module, data: Data, recipe: Recipe, seed: int) -> nn.Module:
    """A copy after the short fine-tuning; the order of the examples is the seed's."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, recipe.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
    else:
        optimizer = torch.optim.AdamW(parameters, recipe.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1
    )
    model.train()
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(recipe.steps):
        if len(order) < recipe.batch:
            order = torch.randperm(len(data), generator=generator)
        batch, order = data.part(order[: recipe.batch]), order[recipe.batch :]
        loss = F.cross_entropy(logits(model, batch.inputs), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    found: Any = model(**inputs)
    return found if isinstance(found, Tensor) else found.logits


def accuracy(model: nn.Module, data: Data) -> float:
    """Percent."""
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in data.batches(250):
            right += int((logits(model, batch.inputs).argmax(1) == batch.labels).sum())
    return 100 * right / len(data)


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one example, half of what ``torch.utils.flop_counter`` counts."""
    one = {name: value[:1] for name, value in inputs.items()}
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**one)
    return int(counter.get_total_flops()) // 2


def _images() -> tuple[Data, Data, str]:
    test = Data({"x": demo_test()[0]}, demo_test()[1])
    if PACKAGE.is_dir():
        images = _idx(PACKAGE / "train-images-idx3-ubyte.gz", 16).view(-1, 1, 28, 28).float() / 255
        labels = _idx(PACKAGE / "train-labels-idx1-ubyte.gz", 8).long()
        return Data({"x": images}, labels), test, "dataset-fashion-mnist"
    x, y = demo_train()
    return Data({"x": x}, y), test, "tinier's 14,000 images"


def _idx(path: Path, header: int) -> Tensor:
    with gzip.open(path) as stream:
        return torch.from_numpy(np.frombuffer(stream.read(), np.uint8, offset=header).copy())


def _vit(data: Data, source: str) -> nn.Module:
    file = cache() / f"vit-fashion-mnist-{len(data)}.safetensors"
    torch.manual_seed(0)
    model = ViT()
    if not file.is_file():
        print(f"training the ViT on {len(data)} images of {source}", flush=True)
        model = tune(model, data, Recipe(1200, 128, 2e-3, "adamw"), seed=0)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model.eval()


def _spam(folder: Path) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(folder / "spam")

    def read(name: str, most: int) -> Data:
        with (folder / name).open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))[:most]
        tokens = tokenizer(
            [row["text"] for row in rows],
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        keep = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return Data(keep, torch.tensor([int(row["label"]) for row in rows]))

    def model() -> nn.Module:
        found = AutoModelForSequenceClassification.from_pretrained(
            folder / "spam", attn_implementation="sdpa"
        )
        return found.eval()

    train, test = read("train.csv", 2000), read("test.csv", TESTED)
    cut = len(train) - VALIDATION["minilm"]
    return Task(
        "minilm",
        model,
        train.part(slice(0, cut)),
        train.part(slice(cut, None)),
        test,
        "SpamAssassin",
    )
