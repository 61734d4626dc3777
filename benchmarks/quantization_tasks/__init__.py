"""The tasks of ``quantization.py``: float networks with trained weights, calibration data, and what is measured on an artifact."""

from quantization_tasks import audio, images, language, speech
from quantization_tasks.base import Task

TASKS: dict[str, Task] = {
    task.name: task
    for module in (images, language, audio, speech)
    for task in module.TASKS  # in the order of the table
}
