"""What a row of the coverage table is: a small network with random weights, and what goes into it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0
BATCH = 2


@dataclass(frozen=True)
class Architecture:
    """One architecture of the coverage table.

    Each file of this folder but this one holds a family: a tuple ``ARCHITECTURES`` of them.

    Attributes:
        name: as the field calls it; unique in the table.
        family: "text encoder", "text decoder", "vision", "speech", "diffusion", "keras", "real", …
        build: makes the network, anything that ``tinier.prune`` takes (an ``nn.Module``, a path, a Keras model). ``make`` seeds
            torch before the call and stirs a module's weights after it: do neither here.
        example: makes the example inputs by name, batch size 2; None where the source brings its own.
        lengths: input name → its dimensions that hold a free length (tokens), which must stay free; None takes dimension 1 of
            each integer input with two or more dimensions.
        batched: whether the architecture itself works at any batch size (False excuses a batch that is fixed).
        stirred: whether weights are random and may be stirred; False for trained ones.
        note: what a reader of the table should know, such as a size that its config cannot take smaller.
    """

    name: str
    family: str
    build: Callable[[], Any]
    example: Callable[[], Mapping[str, Tensor]] | None
    lengths: Mapping[str, tuple[int, ...]] | None = None
    batched: bool = True
    stirred: bool = True
    note: str = ""


def make(architecture: Architecture) -> tuple[Any, dict[str, Tensor] | None]:
    """The network in evaluation mode, and its example inputs; the same at every call."""
    torch.manual_seed(SEED)
    model = architecture.build()
    if isinstance(model, nn.Module):
        model.eval()
        if architecture.stirred:
            stir(model)
    torch.manual_seed(SEED + 1)
    return model, None if architecture.example is None else dict(architecture.example())


def stir(model: nn.Module, seed: int = SEED) -> None:
    """Move parameters and batch-norm statistics that are all alike a little, so that no proof is vacuous.

    Zeros (biases, zero-initialised residual branches, tokens) become normal with deviation 0.02, or 0.1 for matrices; other
    constants (norm weights) are scaled by uniform factors of 0.8 … 1.2; running means become normal with deviation 0.1, running
    variances uniform in 0.5 … 1.5.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dict.fromkeys(model.parameters()):
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if bool((parameter == parameter.flatten()[0]).all()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                if bool((parameter == 0).all()):
                    parameter.add_(noise * (0.1 if parameter.ndim > 1 else 0.02))
                else:
                    parameter.mul_(
                        1 + 0.4 * (torch.rand(parameter.shape, generator=generator) - 0.5)
                    )
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def transformers_model(model: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    """Makes a Hugging Face model from a config of these values.

    Args:
        model: name of the class in ``transformers``.
        config: name of its config class.
        values: of the config; those that end in ``_config`` may be dicts.
    """

    def build() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**values))
        return made

    return build


def tokens(*shape: int, vocabulary: int = 96) -> Tensor:
    """Random token ids without the first three, which models use for padding and the like. int64."""
    return torch.randint(3, vocabulary, shape)


def mask(*shape: int) -> Tensor:
    """An attention mask of ones. int64."""
    return torch.ones(shape, dtype=torch.int64)


def images(size: int, channels: int = 3, batch: int = BATCH) -> Tensor:
    """Normal noise in the place of images. (batch, channels, size, size) float32."""
    return torch.randn(batch, channels, size, size)
