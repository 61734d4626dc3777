"""Claim: magika (file types, 785 k parameters) comes in as ONNX and leaves as a smaller, faster ONNX.

The labels are the types that file names promise, for files of this Python environment and of /usr.
"""

import json
import sysconfig
from pathlib import Path

import numpy as np
from common import Bars, packaged, report

import tinier

REQUIREMENT = "magika==1.0.3"
MODEL = "models/standard_v3_3/model.onnx"
SUFFIXES = {
    ".py": "python", ".c": "c", ".h": "c", ".cpp": "cpp", ".hpp": "cpp", ".js": "javascript", ".ts": "typescript", ".html": "html",
    ".css": "css", ".json": "json", ".xml": "xml", ".md": "markdown", ".txt": "txt", ".csv": "csv", ".png": "png", ".jpg": "jpeg",
    ".gif": "gif", ".svg": "svg", ".zip": "zip", ".gz": "gzip", ".so": "elf", ".pyc": "pythonbytecode", ".yaml": "yaml", ".toml": "toml",
    ".sh": "shell", ".pl": "perl", ".pm": "perl", ".java": "java", ".rs": "rust", ".go": "go", ".ini": "ini", ".pyi": "python",
    ".tcl": "tcl", ".cmake": "cmake", ".rst": "rst", ".pdf": "pdf", ".ttf": "ttf", ".whl": "zip", ".npz": "npz", ".npy": "npy",
}  # fmt: skip
EACH = 250  # files of one type at most


def files() -> tuple[np.ndarray, np.ndarray]:
    """Bytes (n, 2048) int32, as magika's own reader prepares them, and labels (n,)."""
    settings = json.loads(
        packaged("magika", MODEL, REQUIREMENT).with_name("config.min.json").read_text()
    )
    labels = settings["target_labels_space"]
    padding, block, size = settings["padding_token"], settings["block_size"], settings["beg_size"]
    counts: dict[str, int] = {}
    rows, targets = [], []
    roots = [Path(sysconfig.get_paths()["purelib"]), Path("/usr/lib"), Path("/usr/share")]
    for file in (file for root in roots for file in sorted(root.rglob("*"))):
        kind = SUFFIXES.get(file.suffix.lower(), "")
        if (
            kind not in labels
            or counts.get(kind, 0) >= EACH
            or file.is_symlink()
            or not file.is_file()
        ):
            continue
        with file.open("rb") as stream:
            start = stream.read(block).lstrip()
            stream.seek(max(0, file.stat().st_size - block))
            end = stream.read(block).rstrip()
        if len(start) < 64:
            continue
        row = np.full(2 * size, padding, np.int32)
        head, tail = start[:size], end[-size:]
        row[: len(head)] = list(head)
        row[2 * size - len(tail) :] = list(tail)
        counts[kind] = counts.get(kind, 0) + 1
        rows.append(row)
        targets.append(labels.index(kind))
    return np.stack(rows), np.array(targets)


if __name__ == "__main__":
    with Bars() as bars:
        result = tinier.compress(
            str(packaged("magika", MODEL, REQUIREMENT)),
            "magika_files:files",
            metric="accuracy",
            max_drop="1%",
            target=["onnxruntime", "torch"],
            budget="150s",
            progress=bars,
        )
    report("magika_files", "at most 1 point of accuracy, ONNX in and out", result)
