"""Reading, fitting, checking and splitting data, and everything that must be refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tinier.data.base import Arrays, Examples
from tinier.data.check import check
from tinier.data.python import import_function
from tinier.data.read import read
from tinier.data.split import split
from tinier.errors import DataError
from tinier.network import Network

VECTOR = {"x": torch.zeros(2, 4)}
IMAGE = {"pixels": torch.zeros(2, 3, 8, 6)}
TOKENS = {name: torch.ones(2, 5, dtype=torch.int64) for name in ("input_ids", "attention_mask")}


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def whole(examples: Examples) -> tuple[dict[str, Tensor], Tensor | None]:
    return next(examples.batches(len(examples)))


# --- the set


def test_rows_that_follow_each_other_are_not_copied() -> None:
    x = torch.arange(30).view(10, 3)
    store = Arrays({"x": x}, torch.arange(10))
    whole = torch.arange(30).view(10, 3)
    for rows in ([2, 3, 4], range(5, 10), [7], [], [3, 1], [1, 3], [4, 4]):
        inputs, labels = store.fetch(rows)
        assert torch.equal(inputs["x"], whole[list(rows)])
        assert labels is not None and labels.tolist() == list(rows)
    start = x.untyped_storage().data_ptr()
    assert store.fetch([2, 3])[0]["x"].untyped_storage().data_ptr() == start
    assert store.fetch([3, 2])[0]["x"].untyped_storage().data_ptr() != start


def test_batches_cover_every_example_once() -> None:
    x = torch.arange(10.0)[:, None]
    examples = Examples(Arrays({"x": x}, torch.arange(10)))
    rows = [batch for batch in examples.batches(4)]
    assert [len(labels) for _, labels in rows if labels is not None] == [4, 4, 2]
    torch.testing.assert_close(torch.cat([inputs["x"] for inputs, _ in rows]), x)
    one, again, other = (
        torch.cat([y for _, y in examples.batches(3, shuffle=seed) if y is not None]).tolist()
        for seed in (1, 1, 2)
    )
    assert one == again != other and sorted(one) == list(range(10))
    subset = examples.subset([7, 2])
    assert len(subset) == 2 and whole(subset)[0]["x"].flatten().tolist() == [7.0, 2.0]
    assert whole(subset.subset([1]))[0]["x"].item() == 2.0
    with pytest.raises(DataError, match="example 2 does not exist; the data have 2"):
        subset.subset([2])


def test_the_digest_is_of_the_content() -> None:
    x, y = torch.from_numpy(numbers(150, 4)), torch.arange(150) % 3
    examples = Examples(Arrays({"x": x}, y))
    stored_otherwise = read(TensorDataset(x, y), VECTOR)
    assert examples.digest() == stored_otherwise.digest() == examples.subset(range(150)).digest()
    assert len(examples.digest()) == 64
    changed = x.clone()
    changed[149, 3] += 1e-6 + changed[149, 3].abs()
    others = [
        Examples(Arrays({"x": changed}, y)),
        Examples(Arrays({"x": x}, 2 - y)),
        Examples(Arrays({"x": x})),
        Examples(Arrays({"z": x}, y)),
        Examples(Arrays({"x": x.view(150, 2, 2)}, y)),
        examples.subset(range(149, -1, -1)),
    ]
    assert len({examples.digest(), *(other.digest() for other in others)}) == 7


def test_arrays_that_make_no_set() -> None:
    with pytest.raises(DataError, match="different numbers of examples: x 3, labels 4"):
        Examples(Arrays({"x": torch.zeros(3, 1)}, torch.zeros(4)))
    with pytest.raises(DataError, match="no inputs"):
        Arrays({})
    with pytest.raises(DataError, match="single number"):
        Arrays({"x": torch.tensor(1.0)})


# --- splitting


def test_a_split_is_disjoint_stratified_and_repeatable() -> None:
    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    examples = Examples(Arrays({"x": torch.arange(100.0)[:, None]}, y))
    search, certify = split(examples, (0.3, 0.7), seed=5)
    assert (len(search), len(certify)) == (30, 70)
    assert not set(search.rows) & set(certify.rows)
    for part, share in ((search, 0.3), (certify, 0.7)):
        labels = part.labels()
        assert labels is not None
        counts = torch.bincount(labels, minlength=3).tolist()
        assert all(
            abs(got - share * all_) <= 1 for got, all_ in zip(counts, (60, 30, 10), strict=True)
        )
    assert split(examples, (0.3, 0.7), seed=5)[0].rows == search.rows
    assert split(examples, (0.3, 0.7), seed=6)[0].rows != search.rows
    small, rest = split(examples, (0.1, 0.2), seed=0)
    assert (len(small), len(rest)) == (10, 20)


def test_a_split_without_labels() -> None:
    examples = Examples(Arrays({"x": torch.zeros(11, 1)}))
    parts = split(examples, (0.5, 0.5), seed=0)
    assert sorted(row for part in parts for row in part.rows) == list(range(11))
    with pytest.raises(DataError, match="11 examples are too few"):
        split(examples, (0.01, 0.5), seed=0)
    with pytest.raises(DataError, match="fractions"):
        split(examples, (0.7, 0.7), seed=0)


# --- npz


def test_npz_by_name_and_by_position(tmp_path: Path) -> None:
    x, y = numbers(6, 4), np.arange(6) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    examples = read(tmp_path / "a.npz", VECTOR)
    inputs, labels = whole(examples)
    assert labels is not None and labels.tolist() == y.tolist() and labels.dtype == torch.int64
    np.testing.assert_array_equal(inputs["x"], x)
    assert examples.origin == str(tmp_path / "a.npz") and not examples.notes
    np.savez(tmp_path / "b.npz", features=x.astype(np.float64), label=np.array(list("cabcab")))
    examples = read(str(tmp_path / "b.npz"), VECTOR)
    assert examples.classes == ("a", "b", "c")
    labels = examples.labels()
    assert labels is not None and labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert "float64 cast to float32" in examples.notes[0]
    two = {"a": torch.zeros(2, 4), "b": torch.zeros(2, 1, dtype=torch.int64)}
    np.savez(tmp_path / "c.npz", b=np.ones((6, 1), np.int32), a=x)
    inputs, labels = whole(read(tmp_path / "c.npz", two))
    assert list(inputs) == ["a", "b"] and labels is None and inputs["b"].dtype == torch.int64


def test_uint8_images_are_scaled_and_it_is_said(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 6)).astype(np.uint8)
    np.savez(tmp_path / "i.npz", x=x)
    examples = read(tmp_path / "i.npz", IMAGE)
    np.testing.assert_allclose(whole(examples)[0]["pixels"], x / 255, atol=1e-7)
    assert "divided by 255" in examples.notes[0]
    examples = read(tmp_path / "i.npz", IMAGE, mean=(0.5, 0.4, 0.3), std=(0.2,))
    wanted = (x / 255 - np.array([0.5, 0.4, 0.3])[:, None, None]) / 0.2
    np.testing.assert_allclose(whole(examples)[0]["pixels"], wanted, atol=1e-5)
    with pytest.raises(DataError, match="mean has 2 numbers"):
        whole(read(tmp_path / "i.npz", IMAGE, mean=(0.5, 0.4)))
    with pytest.raises(DataError, match="each must be above 0"):
        whole(read(tmp_path / "i.npz", IMAGE, std=(0.0,)))


def test_bad_npz(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.npz", VECTOR)
    (tmp_path / "e.npz").touch()
    with pytest.raises(DataError, match="file is empty"):
        read(tmp_path / "e.npz", VECTOR)
    (tmp_path / "t.npz").write_text("hello")
    with pytest.raises(DataError, match=r"Python objects|not a NumPy file"):
        read(tmp_path / "t.npz", VECTOR)
    np.savez(tmp_path / "o.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"never loaded.*np\.savez"):
        read(tmp_path / "o.npz", VECTOR)
    np.savez(tmp_path / "z.npz")
    with pytest.raises(DataError, match="no arrays"):
        read(tmp_path / "z.npz", VECTOR)
    np.savez(tmp_path / "n.npz", x=numbers(0, 4))
    with pytest.raises(DataError, match="no examples"):
        read(tmp_path / "n.npz", VECTOR)
    np.savez(tmp_path / "d.npz", x=numbers(3, 4), y=np.arange(2))
    with pytest.raises(DataError, match="different numbers of examples: x 3, labels 2"):
        read(tmp_path / "d.npz", VECTOR)
    np.savez(tmp_path / "m.npz", input_ids=np.ones((2, 5), np.int64))
    with pytest.raises(
        DataError, match=r"no attention_mask; the model's inputs are input_ids, attention"
    ):
        read(tmp_path / "m.npz", TOKENS)


@pytest.mark.parametrize(
    ("data", "example", "message"),
    [
        (
            np.ones((3, 4), np.int64),
            VECTOR,
            r"x: the data are int64, the model needs float32.*astype",
        ),
        (np.ones((3, 4), np.uint8), VECTOR, r"x: the data are uint8.*/ 255"),
        (
            numbers(3, 4),
            {"x": torch.zeros(2, 4, dtype=torch.int64)},
            "the data are float32, .* int64",
        ),
        (np.array(["a", "b"]), VECTOR, "holds no numbers"),
    ],
)
def test_dtypes_that_do_not_fit(data: np.ndarray, example: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(data, example)


def test_integers_must_fit_the_models_type() -> None:
    example = {"x": torch.zeros(2, 1, dtype=torch.int32)}
    assert whole(read(np.array([[1], [2]]), example))[0]["x"].dtype == torch.int32
    with pytest.raises(DataError, match=r"x: example 1 has a value that torch\.int32 cannot hold"):
        whole(read(np.array([[1], [2**40]]), example))


# --- images


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (12, 16)) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", size, colour).save(path)


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "dog" / "1.png", (255, 0, 51))
    picture(tmp_path / "cat" / "b.png", (0, 102, 0), (60, 8))
    picture(tmp_path / "cat" / "a.png", (0, 0, 255))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    examples = read(tmp_path, IMAGE)
    inputs, labels = whole(examples)
    assert (
        examples.classes == ("cat", "dog") and labels is not None and labels.tolist() == [0, 0, 1]
    )
    assert inputs["pixels"].shape == (3, 3, 8, 6)
    torch.testing.assert_close(inputs["pixels"][2, :, 3, 3], torch.tensor([1.0, 0.0, 0.2]))
    torch.testing.assert_close(inputs["pixels"][1, :, 3, 3], torch.tensor([0.0, 0.4, 0.0]))
    grey = whole(read(tmp_path, {"x": torch.zeros(2, 1, 4, 4)}, mean=(0.5,), std=(0.5,)))[0]["x"]
    assert grey.shape == (3, 1, 4, 4) and grey.min() >= -1
    raw = whole(read(tmp_path, {"x": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}))[0]["x"]
    assert raw[2, :, 0, 0].tolist() == [255, 0, 51]
    assert len(examples.digest()) == 64


def test_images_of_a_hugging_face_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"label2id": {"dog": 0, "cat": 7}}))
    (model / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})
    )
    picture(tmp_path / "data" / "dog" / "1.png", (255, 0, 0))
    picture(tmp_path / "data" / "cat" / "1.png", (255, 0, 0))
    inputs, labels = whole(read(tmp_path / "data", IMAGE, tokenizer_folder=model))
    assert labels is not None and labels.tolist() == [7, 0]
    torch.testing.assert_close(inputs["pixels"][0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "1.png", (255, 0, 0))
    examples = read(tmp_path, IMAGE)
    assert len(examples) == 1 and not examples.labelled


def test_bad_image_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images"):
        read(tmp_path, IMAGE)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="class folder without images"):
        read(tmp_path, IMAGE)
    (tmp_path / "cat" / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.png: not an image"):
        read(tmp_path, IMAGE)
    with pytest.raises(DataError, match=r"folder of images is for models with one input"):
        read(tmp_path, VECTOR)
    picture(tmp_path / "1.png", (255, 0, 0))
    with pytest.raises(DataError, match="images beside folders"):
        read(tmp_path, IMAGE)


# --- tables


def tokenizer(folder: Path, **config: Any) -> Path:
    """A word tokenizer, made without any download."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {
        word: i
        for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "NA"])
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]"
    )
    wrapped.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | config))
    return folder


def test_text_and_label(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "tok", label2id={"neg": 0, "pos": 1})
    (tmp_path / "d.csv").write_text("text,label\ngood film,pos\nbad,neg\nNA,neg\n")
    examples = read(tmp_path / "d.csv", TOKENS, tokenizer_folder=folder)
    inputs, labels = whole(examples)
    assert (
        labels is not None and labels.tolist() == [1, 0, 0] and examples.classes == ("neg", "pos")
    )
    assert inputs["input_ids"].tolist() == [[4, 6], [5, 0], [7, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 0]]
    examples = read(tmp_path / "d.csv", TOKENS, tokenizer_folder=folder, max_length=1)
    assert whole(examples)[0]["input_ids"].shape == (3, 1)
    assert "1 of 3 texts cut at 1 tokens" in examples.notes
    rows = [{"sentence": "bad", "label": "b"}, {"sentence": "good", "label": "a"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = tokenizer(tmp_path / "plain")
    examples = read(tmp_path / "d.jsonl", TOKENS, tokenizer_folder=plain)
    labels = examples.labels()
    assert labels is not None and labels.tolist() == [1, 0] and examples.classes == ("a", "b")


def test_bad_text(tmp_path: Path) -> None:
    folder = tokenizer(tmp_path / "tok", label2id={"neg": 0, "pos": 1})
    (tmp_path / "d.csv").write_text("text,label\ngood film,pos\nbad,odd\n")
    with pytest.raises(DataError, match=r"label 'odd' is none of the model's: neg, pos"):
        read(tmp_path / "d.csv", TOKENS, tokenizer_folder=folder)
    (tmp_path / "e.csv").write_text("text,label\ngood film,pos\nbad,\n")
    with pytest.raises(DataError, match="row 1 has no label"):
        read(tmp_path / "e.csv", TOKENS, tokenizer_folder=folder)
    with pytest.raises(DataError, match="text needs a tokenizer"):
        read(tmp_path / "d.csv", TOKENS)
    (tmp_path / "h.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="no rows"):
        read(tmp_path / "h.csv", TOKENS, tokenizer_folder=folder)
    (tmp_path / "b.jsonl").write_text("{not json")
    with pytest.raises(DataError, match="not a jsonl table"):
        read(tmp_path / "b.jsonl", TOKENS, tokenizer_folder=folder)
    (tmp_path / "b.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="not a parquet table"):
        read(tmp_path / "b.parquet", TOKENS, tokenizer_folder=folder)
    (tmp_path / "none").mkdir()
    (tmp_path / "f.csv").write_text("text,label\ngood film,1\n")
    with pytest.raises(DataError, match="its tokenizer cannot be loaded"):
        read(tmp_path / "f.csv", TOKENS, tokenizer_folder=tmp_path / "none")


def test_columns_of_numbers(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    x = numbers(5, 4)
    table = pandas.DataFrame(x, columns=list("abcd")).assign(label=[0, 1, 2, 0, 1])
    table.to_parquet(tmp_path / "t.parquet")
    inputs, labels = whole(read(tmp_path / "t.parquet", VECTOR))
    np.testing.assert_array_equal(inputs["x"], x)
    assert labels is not None and labels.tolist() == [0, 1, 2, 0, 1]
    table.drop(columns="a").to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match=r"3 columns of numbers \(b, c, d\), the model needs x"):
        read(tmp_path / "t.csv", VECTOR)
    (tmp_path / "h.csv").write_text("a,b,c,d\n1,2,3,4\n1,2,,4\n")
    with pytest.raises(DataError, match="row 1 has no c"):
        read(tmp_path / "h.csv", VECTOR)


# --- Python


class Pairs(Dataset[Any]):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        if self.kind == "broken" and index == 3:
            raise OSError("disk")
        x = torch.full((4,), float(index))
        kinds = {"tuple": (x, index), "dict": {"x": x, "label": index}, "three": (x, x, x, index)}
        return kinds.get(self.kind, x)


@pytest.mark.parametrize("kind", ["tuple", "dict", "alone"])
def test_datasets_and_loaders(kind: str) -> None:
    for data in (Pairs(kind), DataLoader(Pairs(kind), batch_size=2, shuffle=True)):
        examples = read(data, VECTOR)
        inputs, labels = whole(examples)
        assert inputs["x"][:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert examples.labelled is (kind != "alone")
        if labels is not None:
            assert labels.tolist() == [0, 1, 2, 3, 4]


def test_arrays_in_python() -> None:
    x, y = numbers(3, 4), np.arange(3)
    for data in (
        (x, y),
        {"x": x, "y": y},
        {"anything": x, "labels": y[:, None]},
        Examples(Arrays({"x": torch.from_numpy(x)}, torch.from_numpy(y))),
    ):
        inputs, labels = whole(read(data, VECTOR))
        np.testing.assert_array_equal(inputs["x"], x)
        assert labels is not None and labels.tolist() == [0, 1, 2]
    assert not read(x, VECTOR).labelled


def test_bad_python() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield torch.zeros(4)

    with pytest.raises(DataError, match="only once and in one order"):
        read(Stream(), VECTOR)
    with pytest.raises(DataError, match="each item has 4 parts; the model takes 1"):
        read(Pairs("three"), VECTOR)
    with pytest.raises(DataError, match=r"example 3 of the Pairs cannot be read: OSError: disk"):
        whole(read(Pairs("broken"), VECTOR))
    with pytest.raises(DataError, match="int cannot be read; give"):
        read(3, VECTOR)
    with pytest.raises(DataError, match="pickles are never loaded"):
        read("data.pkl", VECTOR)
    with pytest.raises(DataError, match="no such file"):
        read("nowhere.csv", VECTOR)


def test_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mytask_of_tests.py").write_text(
        "import numpy as np\n"
        "def valid():\n    return np.ones((3, 4), np.float32), np.arange(3)\n"
        "def wrong():\n    return 'text'\n"
        "def broken():\n    return 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    examples = read("mytask_of_tests:valid", VECTOR)
    assert examples.origin == "mytask_of_tests:valid" and len(examples) == 3
    with pytest.raises(DataError, match=r"wrong\(\) gave a str"):
        read("mytask_of_tests:wrong", VECTOR)
    with pytest.raises(
        DataError, match=r"broken\(\) failed at .*:7: return 1 / 0: ZeroDivisionError"
    ):
        read("mytask_of_tests:broken", VECTOR)
    with pytest.raises(DataError, match="no function none; it has"):
        import_function("mytask_of_tests:none")
    with pytest.raises(DataError, match="cannot be imported from the current folder"):
        import_function("no_such_module_at_all:f")


# --- checking


def network() -> Network:
    torch.manual_seed(0)
    return Network(nn.Linear(4, 3), {"input": torch.zeros(2, 4)})


def made(x: Tensor, y: Tensor | None = None) -> Examples:
    return Examples(Arrays({"input": x}, y))


def test_data_that_fit() -> None:
    check(made(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])), network())
    check(made(torch.randn(1, 4)), network())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            torch.zeros(5, 6),
            None,
            r"input: each example has shape \(6,\).*needs \(4,\)",
        ),
        (torch.zeros(5, 2, 2), None, r"shape \(2, 2\), the model needs \(4,\); x\.reshape"),
        (torch.zeros(5, 4).double(), None, "float64, the model needs torch.float32"),
        (torch.zeros(0, 4), None, "no examples"),
        (
            torch.zeros(2, 4),
            torch.tensor([0, 3]),
            "label of example 1 is 3, but the model has 3 classes",
        ),
        (torch.zeros(2, 4), torch.tensor([-1, 0]), "label of example 0 is -1"),
        (
            torch.zeros(70, 4).index_fill(0, torch.tensor([66]), torch.nan),
            None,
            "example 66 has NaN",
        ),
        (
            torch.zeros(3, 4).index_fill(0, torch.tensor([1]), torch.inf),
            None,
            "example 1 has infinity",
        ),
    ],
)
def test_data_that_do_not_fit(x: Tensor, y: Tensor | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(made(x, y), network())


def test_image_layouts_are_recognised() -> None:
    net = Network(nn.Conv2d(3, 2, 3), {"input": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(DataError, match=r"channels are last: x\.transpose\(0, 3, 1, 2\)"):
        check(made(torch.zeros(2, 8, 8, 3)), net)
    grey = Network(nn.Conv2d(1, 2, 3), {"input": torch.zeros(2, 1, 8, 8)})
    with pytest.raises(DataError, match=r"channel dimension is missing: x\[:, None\]"):
        check(made(torch.zeros(2, 8, 8)), grey)


def test_a_model_that_gives_nan() -> None:
    class Root(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input.sqrt()

    x = torch.ones(2, 4)
    x[1] = -1
    with pytest.raises(DataError, match="output 0 is NaN for example 1"):
        check(made(x), Network(Root(), {"input": torch.ones(2, 4)}))


def test_token_inputs_may_have_any_length() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 3)

        def forward(self, input: Tensor) -> Tensor:
            return self.table(input).mean(1)

    net = Network(Words(), {"input": torch.ones(2, 5, dtype=torch.int64)})
    check(made(torch.ones(3, 8, dtype=torch.int64)), net)
    with pytest.raises(DataError, match=r"cannot run on the first 2 examples.*index out of range"):
        check(made(torch.full((3, 8), 9)), net)
