"""Tables: text and label for a tokenizer, or plain numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinier.data.base import Arrays, Examples
from tinier.data.images import label_names
from tinier.data.reader import LABELS, Options, Reader
from tinier.errors import DataError, MissingError

# Names of the text and of the second text of a pair, in the order in which they are looked for.
TEXTS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence", None),
)


class TableReader(Reader):
    """``.csv``, ``.jsonl`` or ``.parquet`` with columns of text (``text`` or ``sentence``, and ``text_pair``) and ``label``,
    or with columns of numbers.

    Text goes through the tokenizer of the Hugging Face directory and is padded to the longest, at most ``max_length``
    tokens. Labels that are words are numbered by the model's ``label2id``, else in sorted order. Columns of numbers,
    in the order of the file, are the one float input (n, columns); for several inputs each is the column of its name.
    """

    name = "table"

    def accepts(self, spec: Any) -> bool:
        endings = (".csv", ".jsonl", ".parquet")
        return isinstance(spec, str | Path) and Path(spec).suffix.lower() in endings

    def read(self, spec: Any, example: Mapping[str, Tensor], options: Options) -> Examples:
        path = Path(spec)
        table = _load(path)
        if not len(table):
            raise DataError(f"{path}: the table has no rows")
        labels, classes = _labels(path, table, example, options)
        notes: list[str] = []
        if any(column in table.columns for column, _ in TEXTS):
            inputs = _tokens(path, table, example, options, notes)
        else:
            inputs = _numbers(path, table, example)
        return Examples(Arrays(inputs, labels), origin=str(spec), classes=classes, notes=notes)


def _load(path: Path) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise MissingError("pandas", "tables", f"reading {path.name}") from error
    try:
        if path.suffix.lower() == ".parquet":
            return pandas.read_parquet(path)
        if path.suffix.lower() == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            return pandas.DataFrame([json.loads(line) for line in lines if line.strip()])
        # "NA" and "None" are words in a text; only an empty cell is missing.
        return pandas.read_csv(path, keep_default_na=False, na_values=[""])
    except ImportError as error:
        raise MissingError("pyarrow", "tables", f"reading {path.name}") from error
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path}: not a {path.suffix.lower()[1:]} table in UTF-8 ({error})"
        ) from error


def _labels(
    path: Path, table: Any, example: Mapping[str, Tensor], options: Options
) -> tuple[Tensor | None, list[str]]:
    column = next((name for name in LABELS if name in table.columns and name not in example), None)
    if column is None:
        return None, []
    empty = table[column].isna().to_numpy()
    if empty.any():
        raise DataError(
            f"{path}: row {int(empty.argmax())} has no {column}; fill it or remove the row"
        )
    values = table[column].to_numpy()
    label2id = label_names(options.tokenizer_folder)
    if values.dtype.kind in "biu":
        names = sorted(label2id, key=label2id.__getitem__)
        return torch.from_numpy(values.astype(np.int64)), names
    if values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32)), []
    words = [str(value) for value in values]
    if not (label2id and set(words) <= set(label2id)):
        unknown = sorted(set(words) - set(label2id))
        if set(words) & set(label2id):
            raise DataError(
                f"{path}: label {unknown[0]!r} is none of the model's: {', '.join(label2id)}"
            )
        label2id = {word: index for index, word in enumerate(sorted(set(words)))}
    names = sorted(label2id, key=label2id.__getitem__)
    return torch.tensor([label2id[word] for word in words]), names


def _tokens(
    path: Path, table: Any, example: Mapping[str, Tensor], options: Options, notes: list[str]
) -> dict[str, Tensor]:
    if options.tokenizer_folder is None:
        raise DataError(
            f"{path}: text needs a tokenizer; give the Hugging Face directory of the model as the model, "
            "or, in Python, as tokenizer_folder"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingError("transformers", "huggingface", "a tokenizer") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(options.tokenizer_folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{options.tokenizer_folder}: its tokenizer cannot be loaded: "
            f"{str(error).strip().splitlines()[0]}; save one there with tokenizer.save_pretrained"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append("padded with the end-of-text token, the tokenizer has no other")
    text, pair = next((a, b) for a, b in TEXTS if a in table.columns)
    columns = [text] + ([pair] if pair in table.columns else [])
    for column in columns:
        # An empty cell is an empty text; anything else that is no text is a mistake.
        table[column] = table[column].fillna("")
        wrong = [i for i, value in enumerate(table[column]) if not isinstance(value, str)]
        if wrong:
            raise DataError(
                f"{path}: row {wrong[0]}, column {column}: {table[column].iloc[wrong[0]]!r} is no text"
            )
    texts = [table[column].tolist() for column in columns]
    encoded = tokenizer(*texts, verbose=False)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    limit = min(options.max_length, tokenizer.model_max_length)
    cut = sum(length > limit for length in lengths)
    if cut:
        notes.append(f"{cut} of {len(lengths)} texts cut at {limit} tokens")
    encoded = tokenizer(
        *texts, truncation=True, max_length=limit, padding="longest", return_tensors="pt"
    )
    missing = [name for name in example if name not in encoded]
    if missing:
        raise DataError(
            f"{path}: the tokenizer makes {', '.join(encoded)}, but not the model's {', '.join(missing)}"
        )
    return {name: encoded[name] for name in example}


def _numbers(path: Path, table: Any, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    columns = [c for c in table.columns if c in example or c not in LABELS]
    for column in columns:
        values = table[column]
        if values.dtype.kind not in "biuf":
            raise DataError(
                f"{path}: column {column} holds no numbers; text columns are called "
                f"text or sentence, the label {', '.join(LABELS)}"
            )
        if values.isna().any():
            row = int(values.isna().to_numpy().argmax())
            raise DataError(f"{path}: row {row} has no {column}; fill it or remove the row")
    if len(example) == 1:
        name, wanted = next(iter(example.items()))
        array = table[columns].to_numpy()
        # A table of whole numbers is still a table of numbers.
        kind = np.float32 if wanted.is_floating_point() else np.int64
        if wanted.ndim != 2 or array.shape[1] != wanted.shape[1]:
            raise DataError(
                f"{path}: {array.shape[1]} columns of numbers ({', '.join(map(str, columns[:8]))}), the "
                f"model needs {name} of shape {tuple(wanted.shape[1:])}"
            )
        return {name: torch.from_numpy(np.ascontiguousarray(array.astype(kind)))}
    missing = [name for name in example if name not in columns]
    if missing:
        raise DataError(f"{path}: no columns {', '.join(missing)}; it has {', '.join(columns)}")
    return {
        name: torch.from_numpy(table[name].to_numpy().copy()).reshape(-1, *[1] * (value.ndim - 1))
        for name, value in example.items()
    }
