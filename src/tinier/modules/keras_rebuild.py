"""A Keras model built anew from its config, with other widths."""

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tinier.errors import ModelError
from tinier.modules.keras_parts import is_graph, operations, parts

# Layers that hold other layers: class → (config key, attribute).
NESTED = {
    "TimeDistributed": (("layer", "layer"),),
    "SpectralNormalization": (("layer", "layer"),),
    "Bidirectional": (("layer", "forward_layer"), ("backward_layer", "backward_layer")),
    "RNN": (("cell", "cell"),),
    "StackedRNNCells": (("cells", "cells"),),
}


def rebuilt(
    model: Any,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    instead: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None,
) -> Any:
    """A model of the same class, layers and names, built anew from its config with some values changed.

    Args:
        model: built; left as it is.
        configs: dotted path of a layer, operation or nested model → config key → new value.
        instead: dotted path of a layer → class of ``keras.layers`` that takes its place, and its config.

    Returns:
        The new model, built, not compiled, with weights of its own that are not yet set.

    Raises:
        ModelError: a layer has no config, or its config does not build it; the message has what Keras says.
    """
    keras = sys.modules["keras"]
    paths = {id(operation): path for operation, path in operations(model)}
    kinds = {type(operation) for operation, _ in operations(model)}
    own = {kind.__name__: kind for kind in kinds if not kind.__module__.startswith("keras.")}
    own |= {keras.saving.get_registered_name(kind): kind for kind in own.values()}
    try:
        entry = copy.deepcopy(keras.saving.serialize_keras_object(model))
        entry.pop("compile_config", None)
        built = entry.get("build_config")
        _change(entry, model, paths, configs or {}, instead or {})
        if not is_graph(model) and built:
            entry["build_config"] = built
        with keras.saving.custom_object_scope(own):
            made = keras.saving.deserialize_keras_object(entry, safe_mode=True)
        made.trainable = model.trainable if not model.trainable else made.trainable
    # Layers are code of Keras and of the user, which raise what they like.
    except Exception as error:
        said = " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
        raise ModelError(
            f"{model.name}: Keras cannot build the model from its config: {said or type(error).__name__}"
        ) from error
    return made


def _change(
    entry: Any,
    operation: Any,
    paths: Mapping[int, str],
    configs: Mapping[str, Mapping[str, Any]],
    instead: Mapping[str, tuple[str, Mapping[str, Any]]],
) -> None:
    """Put new values into one serialized operation and what it holds; shapes that it was built for are left out."""
    entry.pop("build_config", None)
    config = entry["config"]
    for inner, held in _held(config, operation):
        _change(inner, held, paths, configs, instead)
    if id(operation) in paths:
        config.update(configs.get(paths[id(operation)], {}))
        if paths[id(operation)] in instead:
            kind, own = instead[paths[id(operation)]]
            entry.update(module="keras.layers", class_name=kind, registered_name=None)
            for call in entry.get("inbound_nodes", ()):
                call["kwargs"] = {}  # masks and modes, which the other class does not take
            entry["config"] = {
                key: config[key] for key in ("name", "dtype") if key in config
            } | dict(own)
    if is_graph(operation) and any(
        inner.get("class_name") == "InputLayer" for inner in config["layers"]
    ):
        config.pop("build_input_shape", None)


def _held(config: Any, operation: Any) -> Iterator[tuple[Any, Any]]:
    """Each serialized operation inside a config, with the operation."""
    if is_graph(operation):
        named = {part.name: part for part in parts(operation)}
        for inner in config["layers"]:
            name = inner.get("name") or inner["config"]["name"]
            if name in named:
                yield inner, named[name]
        return
    for kind in type(operation).__mro__:
        for key, attribute in NESTED.get(kind.__name__, ()):
            inner, held = config.get(key), getattr(operation, attribute, None)
            if isinstance(inner, list | tuple):
                yield from zip(inner, held or (), strict=False)
            elif isinstance(inner, dict) and held is not None:
                yield inner, held
