"""Recorded speech at 16 kHz with what is said: prompts of Asterisk and sentences of LibriVox, both Debian packages."""

import gzip
import re
import wave
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

from quantization_tasks.base import PARTS

PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
WORDING = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")
RATE = 16000


@dataclass(frozen=True)
class Clip:
    """Samples, float32 in −1 … 1 at 16 kHz, and what is said."""

    samples: np.ndarray
    text: str

    @property
    def words(self) -> tuple[str, ...]:
        """In lower case, without marks."""
        return spoken(self.text)


@cache
def prompts(part: str) -> tuple[Clip, ...]:
    """Every third prompt of one to eight seconds and at least three words."""
    _present(PROMPTS, "asterisk-core-sounds-en-wav")
    found = []
    for line in gzip.decompress(WORDING.read_bytes()).decode().splitlines():
        name, _, text = line.partition(": ")
        file = PROMPTS / f"{name}.wav"
        if not file.is_file() or not text or re.search(r"[\[\]<>0-9]", text):
            continue
        clip = Clip(_samples(file), text)
        if len(clip.words) >= 3 and RATE <= len(clip.samples) <= 8 * RATE:
            found.append(clip)
    return tuple(found[PARTS.index(part) :: 3])


@cache
def sentences() -> tuple[Clip, ...]:
    """The sentences of LibriVox."""
    _present(LIBRIVOX, "pocketsphinx-testdata")
    found = []
    for line in (LIBRIVOX / "transcription").read_text().splitlines():
        text, _, name = line.rpartition(" (")
        file = LIBRIVOX / f"{name.rstrip(')')}.wav"
        found.append(Clip(_samples(file), re.sub(r"</?s>", "", text).strip()))
    return tuple(found)


def spoken(text: str) -> tuple[str, ...]:
    """Words without marks, in lower case."""
    return tuple(re.sub(r"[^a-z' ]", " ", text.lower().replace("-", " ")).split())


def _present(folder: Path, package: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"no {folder.name}: apt-get install {package}")


def _samples(file: Path) -> np.ndarray:
    with wave.open(str(file)) as stream:
        rate = stream.getframerate()
        samples = np.frombuffer(stream.readframes(stream.getnframes()), "<i2") / 32768
    return resample_poly(samples, RATE, rate).astype(np.float32)
