"""One result is one folder: written under a temporary name and renamed when it is whole."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from safetensors.torch import save_file

from tinier.edits.base import Plan
from tinier.network import Network
from tinier.output import MARK, whole
from tinier.report import words
from tinier.report.html import html
from tinier.report.rows import rows, summary
from tinier.search.candidate import Candidate, Result
from tinier.targets.base import Target
from tinier.version import VERSION

CERTIFICATE = "certificate.json"
SCORES = "scores.npz"
PLAN, WEIGHTS = "plan.json", "model.safetensors"
# What Hugging Face users expect beside a model; weights and code are not among it.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
)


def write(
    result: Result,
    folder: Path,
    *,
    target: Target,
    network: Network,
    plan: Plan,
    trainable: Network,
    source: Path | None,
    scores: dict[str, np.ndarray],
) -> None:
    """Write the folder of the candidate that was taken.

    Args:
        result: what was found; ``best`` has an artifact.
        folder: from ``check_output``.
        target: the runtime of the artifact.
        network: what the artifact computes.
        plan: all edits from the original to it.
        trainable: the float network before quantization, whose weights are saved.
        source: the Hugging Face directory whose tokenizer and config come along.
        scores: of the certification examples, under "original" and "artifact"; empty without a certificate.
    """
    best = result.best
    assert best is not None and best.artifact is not None
    with whole(folder) as made:
        for file in best.artifact.files:
            shutil.copyfile(file, made / file.name)
        for name in COMPANIONS if source else ():
            if (source / name).is_file():  # type: ignore[operator]
                shutil.copyfile(source / name, made / name)  # type: ignore[operator]
        save_weights(trainable, made / WEIGHTS)
        (made / PLAN).write_text(plan.to_json())
        (made / "recipe.toml").write_text(tomli_w.dumps(_recipe(result, best)))
        if scores:
            np.savez_compressed(made / SCORES, **scores)  # type: ignore[arg-type]
        result.facts["usage"] = target.usage(best.artifact, network)
        names = [file.name for file in best.artifact.files]
        hashed = [*names, WEIGHTS, PLAN, "recipe.toml"] + ([SCORES] if scores else [])
        certificate = {
            "statement": statement(result),
            "met": result.met,
            "reason": result.reason,
            "certificate": best.certificate.as_dict() if best.certificate else None,
            "target": best.target,
            "artifact": names,
            "inputs": _signature(network),
            "metric": result.facts["metric"],
            "data": result.facts["data_parts"],
            "files": {name: sha256(made / name) for name in hashed},
            "tinier": VERSION,
        }
        (made / CERTIFICATE).write_text(json.dumps(certificate, indent=1))
        result.facts["files"] = certificate["files"]
        (made / MARK).write_text(
            json.dumps(
                {"tinier": VERSION, "summary": summary(result), "table": rows(result)},
                indent=1,
            )
        )
        (made / "report.html").write_text(html(result), encoding="utf-8")
        (made / "README.md").write_text(_readme(result, best), encoding="utf-8")
    result.folder = folder


def save_weights(network: Network, file: Path) -> None:
    """Write a network's parameters and buffers as safetensors."""
    tensors = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in network.module.state_dict().items()
    }
    save_file(tensors, file, {"format": "pt"})
    file.chmod(0o644)  # safetensors makes files that only their owner may read


def statement(result: Result) -> str:
    """The certificate in one sentence, or why there is none."""
    best = result.best
    if best is None or best.certificate is None:
        return f"No certificate: {result.reason}."
    return words.certificate(best.certificate, result.facts)[0]


def sha256(file: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _signature(network: Network) -> dict[str, Any]:
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in network.example.items()
    }


def _recipe(result: Result, best: Candidate) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if best.variant.keep < 1:
        steps.append({"method": "channel_pruning", "keep": best.variant.keep, "of": "macs"})
        if best.variant.keep in result.facts.get("compensated", ()):
            steps.append({"method": "compensate"})
    if best.recovered:
        steps.append(
            {
                "method": "recover",
                **result.facts.get("recovery", {}).get(f"{best.variant.keep:g}", {}),
            }
        )
    if best.variant.ranges:
        steps.append({"method": "quantization", "bits": 8, "ranges": best.variant.ranges})
    limits = {k: v for k, v in vars(result.limits).items() if v is not None}
    settings = {
        k: result.facts[k]
        for k in (
            "metric",
            "seed",
            "delta",
            "batch",
            "threads",
            "budget",
            "versions",
            "runtimes",
            "data_parts",
        )
        if result.facts.get(k) is not None
    }
    return {
        "tinier": VERSION,
        "target": best.target,
        "steps": steps,
        "limits": limits,
        "settings": _without_none(settings),
    }


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return value


def _readme(result: Result, best: Candidate) -> str:
    assert best.artifact is not None
    return f"""# {result.facts["model"]}, made smaller by tinier

{summary(result)}

{statement(result)}

Run it from this folder:

```python
{result.facts["usage"]}
```

| file | what |
|---|---|
| {", ".join(f"`{file.name}`" for file in best.artifact.files)} | the model, for {best.target} |
| `model.safetensors`, `plan.json` | float weights and edits; `tinier.load(folder, into=model)` rebuilds the network to train on |
| `recipe.toml` | methods, settings, versions, seeds and the hash of the data |
| `certificate.json`, `scores.npz` | what was proved, on which data; `tinier verify .` checks it |
| `report.html` | the table and the chart of everything that was tried |
"""
