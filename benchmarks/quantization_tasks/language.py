"""Texts: MiniLM-L6 with a head for spam, fine-tuned by ``minilm_spam.py --keep folder``; the folder is in $TINIER_SPAM."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pruning_quality_tasks import Task as Trained
from pruning_quality_tasks import task as trained
from torch import Tensor, nn

from quantization_tasks.base import Inputs, Metric, Run, Task, arrays, each, reference

CALIBRATION = 256


class Classifier(nn.Module):
    """Logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@cache
def source() -> Trained:
    folder = os.environ.get("TINIER_SPAM")
    if not folder:
        raise FileNotFoundError("no $TINIER_SPAM: minilm_spam.py --keep makes the folder")
    return trained("minilm", Path(folder))


def calibration() -> Inputs:
    return source().train.part(slice(0, CALIBRATION)).inputs


def spam(run: Run, part: str) -> dict[str, float]:
    """Accuracy in %, and KL(float ‖ quantized) in nats."""
    data = source().valid if part == "valid" else source().test
    rows = arrays(data.inputs)
    expected = torch.from_numpy(reference("MiniLM-L6", part, rows))
    found = torch.from_numpy(np.concatenate([run(row)[0] for row in each(rows)]))
    right = (found.argmax(1) == data.labels).float().mean()
    kl = F.kl_div(
        found.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return {"accuracy": 100 * float(right), "kl": float(kl)}


TASKS = (
    Task(
        "MiniLM-L6",
        lambda: Classifier(source().model()),
        calibration,
        spam,
        (Metric("accuracy", True, "%"), Metric("kl", False, "nats")),
        lambda figures: figures["kl"],
        True,
        "SpamAssassin mails, 64 tokens: 256 to calibrate, 400 to choose, 1,500 to test",
    ),
)
