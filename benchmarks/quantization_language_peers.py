"""One variant of one contestant of ``quantization_language.py``, in its own environment and a process of its own."""

import copy
import importlib
import resource
import tempfile
import time
from typing import Any

import torch
from peers import answer, request
from quantization_language_models import Language, Logits, Scores, language, perplexity
from torch import Tensor, nn

Asked = dict[str, Any]  # bits, group, variant, an empty folder


def nncf(own: Language, asked: Asked) -> Scores:
    """OpenVINO's graph of the model; activations stay float, which its runtime would else round to 8 bits."""
    code = importlib.import_module("nncf")
    openvino = importlib.import_module("openvino")
    tinier = importlib.import_module("tinier")
    variant = dict(asked["variant"])
    symmetric = variant.pop("symmetric")
    mode = code.CompressWeightsMode(f"int{asked['bits']}_{'sym' if symmetric else 'asym'}")
    with tempfile.TemporaryDirectory() as scratch:
        example = {"input_ids": own.calibration[:2]}
        made = tinier.export(Logits(own.model), scratch, example=example, target="openvino")
        model = openvino.Core().read_model(made.files[0])
        passes = importlib.import_module("openvino._offline_transformations")
        passes.apply_moc_transformations(model, cf=False)  # as openvino.convert_model does
        rows = [{"input_ids": window[None].numpy()} for window in own.calibration]
        model = code.compress_weights(
            model,
            mode=mode,
            ratio=1.0,
            group_size=asked["group"],
            backup_mode=code.BackupMode.NONE,
            dataset=code.Dataset(rows) if variant else None,
            subset_size=len(rows),
            **variant,
        )
        settings = {"INFERENCE_NUM_THREADS": 1, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        settings["INFERENCE_PRECISION_HINT"] = "f32"
        compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda ids: torch.from_numpy(compiled({"input_ids": ids.numpy()})[0].copy())


def torchao(own: Language, asked: Asked) -> Scores:
    code = importlib.import_module("torchao.quantization")
    variant = asked["variant"]
    base = code.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{asked['bits']}"),
        granularity=code.PerGroup(asked["group"]),
        mapping_type=code.MappingType[variant["mapping"]],
        intx_choose_qparams_algorithm=variant.get("algorithm", "affine"),
    )
    method = variant.get("method")
    if method == "gptq":
        config = importlib.import_module("torchao.prototype.gptq").GPTQConfig
        base = code.Int4WeightOnlyConfig(group_size=asked["group"])
        steps = [config(step=step, base_config=base) for step in ("observe", "convert")]
    elif method == "awq":
        config = importlib.import_module("torchao.prototype.awq").AWQConfig
        steps = [config(base, step=step) for step in ("prepare", "convert")]
    else:
        code.quantize_(own.model, base, _inside)
        return _scores(own.model)
    code.quantize_(own.model, steps[0], _inside)
    _calibrate(own)
    code.quantize_(own.model, steps[1], _inside if method == "gptq" else None)
    return _scores(own.model)


def _inside(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def _calibrate(own: Language) -> None:
    with torch.no_grad():
        for window in own.calibration:
            own.model(input_ids=window[None], use_cache=False)


def inc(own: Language, asked: Asked) -> Scores:
    code = importlib.import_module("neural_compressor.torch.quantization")
    variant = dict(asked["variant"])
    config = {"rtn": code.RTNConfig, "gptq": code.GPTQConfig, "awq": code.AWQConfig}
    config["hqq"] = code.HQQConfig
    method = variant.pop("method")
    chosen = config[method](bits=asked["bits"], group_size=asked["group"], **variant)
    chosen.set_local("lm_head", config[method](dtype="fp32"))
    example = own.calibration[:1]
    own.model.name_or_path = asked["folder"]  # where GPTQ looks for the model
    own.model.save_pretrained(asked["folder"])
    model = code.prepare(own.model, chosen, example_inputs=example)
    if method in ("gptq", "awq"):
        _calibrate(Language(model, own.calibration, own.valid, own.test, ""))
    return _scores(code.convert(model))


def tinier(own: Language, asked: Asked) -> Scores:
    code = importlib.import_module("tinier")
    example = {"input_ids": own.calibration[:2]}
    data = {"input_ids": own.calibration.numpy()}
    model = Logits(own.model)
    # A head that is the table of tokens has no name of its own.
    names = {name for name, _ in model.named_parameters()}
    left = [part for part in ("lm_head", "embed_tokens") if any(part in name for name in names)]
    smaller = code.quantize(
        model,
        example,
        data,
        bits=asked["bits"],
        activations=None,
        group=asked["group"],
        exclude=tuple(f"*{part}*" for part in left),
        **asked["variant"],
    )
    return lambda ids: smaller.model(input_ids=ids)


def original(own: Language, asked: Asked) -> Scores:
    return _scores(own.model)


def _scores(model: Any) -> Scores:
    def run(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    return run


CONTESTANTS = {
    "float": original,
    "tinier": tinier,
    "nncf": nncf,
    "torchao": torchao,
    "inc": inc,
}


def main() -> None:
    asked = request()
    torch.set_num_threads(1)
    own = language(asked["model"])
    fresh = Language(copy.deepcopy(own.model), own.calibration, own.valid, own.test, own.note)
    started, busy = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        scores = CONTESTANTS[asked["contestant"]](fresh, {**asked, "folder": folder})
    seconds, busy = time.monotonic() - started, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with torch.no_grad():
        row = {
            "seconds": seconds,
            "cpu_seconds": busy,
            "peak_mb": peak,
            "valid": perplexity(scores, own.valid),
            "test": perplexity(scores, own.test),
            "note": own.note,
        }
    answer(row)


if __name__ == "__main__":
    main()
