"""torchdistill's side of ``distillation.py``: its knowledge distillation, driven by its own box, in a process of its own."""

import time

import torch
from distillation_task import BATCH, EPOCHS, RATE, accuracy, data, factor, student, teacher
from peers import answer, request
from torch.utils.data import RandomSampler, TensorDataset


def main() -> None:
    # torchdistill imports torchvision for its own networks; its wheel's operators are for torch with CUDA, and none is needed here.
    for name in ("nms", "qnms"):
        form = "(Tensor boxes, Tensor scores, float most) -> Tensor"
        torch.library.define(f"torchvision::{name}", form)
    from torchdistill.core.distillation import get_distillation_box

    asked = request()
    torch.set_num_threads(1)
    rows = data("train")
    dataset = TensorDataset(rows.inputs["x"], rows.labels)
    per_epoch = len(dataset) // BATCH
    total = EPOCHS * per_epoch
    logits = {"module_path": ".", "module_io": "output"}
    config = {
        "num_epochs": EPOCHS,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": 0, "drop_last": True},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": RATE, "momentum": 0.9, "nesterov": True},
            "max_grad_norm": 1.0,
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {
                                **{f"student_{key}": value for key, value in logits.items()},
                                **{f"teacher_{key}": value for key, value in logits.items()},
                                "temperature": asked["temperature"],
                                "alpha": asked["alpha"],
                                "reduction": "batchmean",
                            },
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    torch.manual_seed(asked["seed"])
    model = student(asked["seed"])
    box = get_distillation_box(
        teacher(), model, {"train": dataset}, config, torch.device("cpu"), [], False, 1
    )
    started, step = time.process_time(), 0
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for batch, targets, supplement in box.train_data_loader:
            for group in box.optimizer.param_groups:
                group["lr"] = RATE * factor(step / total)
            box.pre_forward_process()
            loss = box.forward_process(batch, targets, supplement)
            box.post_forward_process(loss=loss)
            step += 1
        box.post_epoch_process()
    spent = time.process_time() - started
    answer(
        {
            "steps": step,
            "cpu_seconds": spent,
            "valid": accuracy(model, "valid"),
            "test": accuracy(model, "test"),
        }
    )


if __name__ == "__main__":
    main()
