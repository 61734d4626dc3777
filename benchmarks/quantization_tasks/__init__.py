"""The tasks of ``quantization.py``: float networks with trained weights, calibration data, and what is measured on an artifact."""

import importlib

from quantization_tasks.base import Task

# Where each task is, in the order of the table. A process that runs one imports only what that one needs.
WHERE = {
    "MobileNetV2": "images",
    "EfficientNet-Lite0": "images",
    "ESRGAN-slim": "images",
    "DINOv2-S": "images",
    "MiniLM-L6": "language",
    "MiniLM-L6 sentences": "glosses",
    "Silero VAD": "audio",
    "DNSMOS": "audio",
    "Whisper base": "speech",
}


def task(name: str) -> Task:
    """A task by name."""
    found: tuple[Task, ...] = importlib.import_module(f"quantization_tasks.{WHERE[name]}").TASKS
    return {one.name: one for one in found}[name]
