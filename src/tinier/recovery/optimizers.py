"""Which optimizer trains which network."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

SGD_LR = 0.05
ADAM_LR = 2e-3


def optimizer_of(
    module: nn.Module, parameters: list[nn.Parameter], lr: float | None
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum where batch norms keep gradients in scale, else AdamW; neither decays weights.

    Args:
        module: the network.
        parameters: those that are trained.
        lr: the learning rate; None for 0.05 and 0.002.
    """
    if any(isinstance(part, _BatchNorm) for part in module.modules()):
        return torch.optim.SGD(parameters, lr or SGD_LR, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(parameters, lr or ADAM_LR, eps=1e-7, weight_decay=0.0)
