"""Sound: voice activity, a recurrent network fed with its own state, and the quality of speech, a network from an ONNX file."""

from functools import cache

import numpy as np
from architectures import real

from quantization_tasks.base import (
    PARTS,
    Arrays,
    Inputs,
    Metric,
    Run,
    Task,
    each,
    float_file,
    open_artifact,
    reference,
    tensors,
)
from quantization_tasks.recordings import RATE, Clip, prompts

FRAME, CONTEXT = 512, 64  # samples of a step of Silero, and of the one before that it sees again
STREAMS = {"calibration": 12, "valid": 12, "test": 40}
CALIBRATION = 300  # steps
NOISE = 10.0  # dB below the speech
SAMPLES = 144160  # of DNSMOS
MIXED = {"calibration": 96, "valid": 24, "test": 60}


@cache
def stream(part: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """((n, 576) samples, (n,) whether someone speaks): a prompt between two half seconds of nothing, in noise."""
    clip = prompts(part)[index % len(prompts(part))]
    quiet = np.zeros(RATE // 2, np.float32)
    clean = np.concatenate([quiet, clip.samples, quiet])
    clean = np.pad(clean, (0, -len(clean) % FRAME))
    frames = np.sqrt(np.square(clean.reshape(-1, FRAME)).mean(1))
    random = np.random.default_rng(100 * PARTS.index(part) + index)
    level = np.sqrt(np.square(clip.samples).mean()) * 10 ** (-NOISE / 20)
    noisy = clean + level * random.standard_normal(len(clean)).astype(np.float32)
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), noisy.astype(np.float32)])
    steps = np.stack(
        [padded[start : start + CONTEXT + FRAME] for start in range(0, len(clean), FRAME)]
    )
    return steps, frames > 0.1 * frames.max()


def follow(run: Run, steps: np.ndarray) -> tuple[np.ndarray, list[Arrays]]:
    """Probabilities of the steps, each with the state of the one before, and what the network was given."""
    hidden = cell = np.zeros((1, 128), np.float32)
    found, given = [], []
    for step in steps:
        inputs = {"samples": step[None], "hidden": hidden, "cell": cell}
        given.append(inputs)
        probability, hidden, cell = run(inputs)
        found.append(float(np.asarray(probability).reshape(-1)[0]))
    return np.array(found), given


def heard() -> Inputs:
    """Steps of the calibration streams with the states that the float network was in."""
    run = _float("Silero VAD")
    rows: list[Arrays] = []
    for index in range(STREAMS["calibration"]):
        rows += follow(run, stream("calibration", index)[0])[1]
    rows = [rows[i * len(rows) // CALIBRATION] for i in range(CALIBRATION)]
    return tensors({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})


@cache
def _float(name: str) -> Run:
    """The float network; before its file is written, the module."""
    file = float_file(name)
    if file.is_file():
        return open_artifact("onnxruntime", file, 1)
    module = real._silero().eval().requires_grad_(False)
    return lambda row: [value.numpy() for value in module(**tensors(dict(row)))]


@cache
def _probabilities(part: str) -> tuple[np.ndarray, ...]:
    run = _float("Silero VAD")
    return tuple(follow(run, stream(part, index)[0])[0] for index in range(STREAMS[part]))


def activity(run: Run, part: str) -> dict[str, float]:
    """Area under the curve over all frames in %, and the mean difference to the float probabilities."""
    found, truth = [], []
    for index in range(STREAMS[part]):
        steps, speaks = stream(part, index)
        found.append(follow(run, steps)[0])
        truth.append(speaks)
    scores, labels = np.concatenate(found), np.concatenate(truth)
    difference = np.abs(scores - np.concatenate(_probabilities(part))).mean()
    return {"auc": 100 * auc(scores, labels), "difference": float(difference)}


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs that are in the right order; ties count half."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    positive = int(labels.sum())
    wins = ranks[labels].sum() - positive * (positive + 1) / 2
    return float(wins / (positive * (len(labels) - positive)))


@cache
def mixtures(part: str) -> np.ndarray:
    """(n, 144160) float32: nine seconds of prompts in white noise, 0 to 40 dB below them."""
    random = np.random.default_rng(20 + PARTS.index(part))
    clips: tuple[Clip, ...] = prompts(part)
    rows = []
    for _ in range(MIXED[part]):
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < SAMPLES:
            parts.append(clips[int(random.integers(len(clips)))].samples)
        clean = np.concatenate(parts)[:SAMPLES]
        level = np.sqrt(np.square(clean).mean()) * 10 ** (-random.uniform(0, 40) / 20)
        rows.append(clean + level * random.standard_normal(SAMPLES))
    return np.stack(rows).astype(np.float32)


def opinion(run: Run, part: str) -> dict[str, float]:
    """Mean difference to the float network's three scores, and the correlation of the overall one with it."""
    rows = {"input_1": mixtures(part)}
    expected = reference("DNSMOS", part, rows).reshape(-1, 3)
    found = np.concatenate([run(row)[0] for row in each(rows)]).reshape(-1, 3)
    same = np.corrcoef(found[:, 2], expected[:, 2])[0, 1] if found[:, 2].std() > 0 else 0.0
    return {"mos_error": float(np.abs(found - expected).mean()), "correlation": float(same)}


TASKS = (
    Task(
        "Silero VAD",
        real._silero,
        heard,
        activity,
        (Metric("auc", True, "%"), Metric("difference", False, "")),
        lambda figures: figures["difference"],
        False,
        "Asterisk prompts in white noise 10 dB below, followed step by step: 12 to calibrate (300 steps), 12 and 40",
    ),
    Task(
        "DNSMOS",
        real._onnx("speechmos", "dnsmos_models/sig_bak_ovr.onnx", "speechmos==0.0.1.1"),
        lambda: {"input_1": tensors({"x": mixtures("calibration")})["x"]},
        opinion,
        (Metric("mos_error", False, "points"), Metric("correlation", True, "")),
        lambda figures: figures["mos_error"],
        False,
        "nine seconds of Asterisk prompts in white noise: 96, 24 and 60",
    ),
)
