"""Metrics against closed forms, and evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinier.data.base import Arrays, Examples
from tinier.errors import DataError, InputError
from tinier.measure.metrics import Accuracy, Metric, metric
from tinier.measure.quality import evaluate

RNG = np.random.default_rng(0)
X = RNG.normal(size=(101, 4)).astype(np.float32)
WEIGHT = RNG.normal(size=(4, 3)).astype(np.float32)
LOGITS = X @ WEIGHT
Y = np.where(RNG.random(101) < 0.7, LOGITS.argmax(1), RNG.integers(0, 3, 101))


def run(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [inputs["x"] @ WEIGHT]


def data(labels: np.ndarray | None) -> Examples:
    y = None if labels is None else torch.from_numpy(labels)
    return Examples(Arrays({"x": torch.from_numpy(X)}, y))


def test_accuracy_is_the_share_of_right_answers() -> None:
    found = evaluate(run, data(Y), metric("accuracy"), batch=16)
    right = LOGITS.argmax(1) == Y
    assert found.value == pytest.approx(right.mean()) and found.binary
    np.testing.assert_array_equal(found.scores, right.astype(float))
    np.testing.assert_array_equal(found.answers, LOGITS.argmax(1))
    assert found.outputs is None
    kept = evaluate(run, data(Y), metric("accuracy"), batch=101, keep_outputs=True)
    assert kept.value == found.value and kept.outputs is not None
    np.testing.assert_allclose(kept.outputs[0], LOGITS, atol=1e-6)


def test_accuracy_of_one_logit_tokens_and_pixels() -> None:
    accuracy = Accuracy()
    assert accuracy.value([np.array([[0.2], [-1.0], [3.0]])], np.array([1, 1, 1])) == 2 / 3
    tokens = np.zeros((2, 3, 5))
    tokens[..., 4] = 1
    labels = np.array([[4, 4, 0], [4, -100, -100]])
    np.testing.assert_allclose(accuracy.scores([tokens], labels), [2 / 3, 1])
    pixels = np.moveaxis(np.eye(4)[np.zeros((2, 3, 3), int)], -1, 1)
    assert accuracy.value([pixels], np.zeros((2, 3, 3), int)) == 1
    with pytest.raises(DataError, match=r"labels of shape \(2,\).*answers of shape \(2, 3\)"):
        accuracy.scores([tokens], np.array([1, 2]))
    with pytest.raises(DataError, match=r"needs integer labels.*MeanSquaredError"):
        accuracy.scores([LOGITS], np.linspace(0, 1, 101))


def test_agreement_is_with_the_original() -> None:
    def smaller(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [inputs["x"] @ (WEIGHT + 0.3)]

    expected = (LOGITS.argmax(1) == (X @ (WEIGHT + 0.3)).argmax(1)).mean()
    assert metric("accuracy", labelled=False).name == "agreement"
    for labels in (None, Y):
        found = evaluate(smaller, data(labels), metric("agreement"), batch=10, reference=[LOGITS])
        assert found.value == pytest.approx(expected) and found.binary
    same = evaluate(run, data(None), metric("agreement"), reference=[LOGITS])
    assert same.value == 1
    with pytest.raises(DataError, match="needs the outputs of the original"):
        evaluate(run, data(None), metric("agreement"))
    with pytest.raises(DataError, match="needs labels"):
        evaluate(run, data(None), Accuracy())


def f1_macro(answers: np.ndarray, labels: np.ndarray) -> float:
    values = []
    for c in range(3):
        hit = ((answers == c) & (labels == c)).sum()
        values.append(2 * hit / ((answers == c).sum() + (labels == c).sum()))
    return float(np.mean(values))


def auroc(labels: np.ndarray) -> float:
    """Mean over classes of the share of (positive, negative) pairs in the right order."""
    exponents = np.exp(LOGITS.astype(np.float64))
    scores = exponents / exponents.sum(1, keepdims=True)
    values = []
    for c in range(3):
        positive, negative = scores[labels == c, c], scores[labels != c, c]
        values.append((positive[:, None] > negative[None]).mean())
    return float(np.mean(values))


@pytest.mark.parametrize(
    ("name", "value", "mean", "bounds"),
    [
        ("Accuracy", lambda: (LOGITS.argmax(1) == Y).mean(), True, (0.0, 1.0)),
        ("AUROC", lambda: auroc(Y), False, (0.0, 1.0)),
    ],
)
def test_torchmetrics_of_classes(
    name: str, value: Callable[[], float], mean: bool, bounds: tuple[float, float]
) -> None:
    made = metric(name)
    assert made.higher_is_better and made.bounds == bounds
    for batch in (7, 101):
        found = evaluate(run, data(Y), made, batch=batch)
        assert found.value == pytest.approx(value(), abs=1e-6)
        assert (found.scores is not None) is mean
        if found.scores is not None:
            assert found.scores.mean() == pytest.approx(found.value, abs=1e-6)


def test_a_torchmetric_of_several_kinds_of_answers() -> None:
    # torchmetrics' F1Score is the micro average by default, which for one class each is the accuracy.
    found = evaluate(run, data(Y), metric("f1"), batch=20)
    assert found.value == pytest.approx((LOGITS.argmax(1) == Y).mean(), abs=1e-6)
    binary = (LOGITS[:, 0] > 0).astype(np.int64)
    found = evaluate(lambda x: [run(x)[0][:, :1]], data(binary), metric("AUROC"), batch=20)
    assert found.value == pytest.approx(1)
    many = (LOGITS > 0).astype(np.int64)
    found = evaluate(run, data(many), metric("Accuracy"), batch=20)
    assert found.value == pytest.approx(1)
    assert evaluate(run, data(None), metric("F1Score", False), reference=[LOGITS]).value == 1
    assert 0 < f1_macro(LOGITS.argmax(1), Y) < 1


def test_probabilities_are_not_turned_into_probabilities_again() -> None:
    def softmax(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        exponents = np.exp(run(inputs)[0])
        return [exponents / exponents.sum(1, keepdims=True)]

    assert evaluate(softmax, data(Y), metric("AUROC")).value == pytest.approx(auroc(Y), abs=1e-6)


def test_torchmetrics_of_numbers() -> None:
    noise = RNG.normal(size=LOGITS.shape).astype(np.float32)
    labels = LOGITS + noise
    error = labels - LOGITS
    per_example: np.ndarray
    for name, per_example in (("mse", error**2), ("MeanAbsoluteError", np.abs(error))):
        made = metric(name)
        assert not made.higher_is_better
        found = evaluate(run, data(labels), made, batch=17)
        assert found.value == pytest.approx(per_example.mean(), rel=1e-5)
        assert found.scores is not None
        np.testing.assert_allclose(found.scores, per_example.mean(1), rtol=1e-4)
    residual = 1 - (error**2).sum(0) / ((labels - labels.mean(0)) ** 2).sum(0)
    found = evaluate(run, data(labels), metric("R2Score"), batch=17)
    assert found.value == pytest.approx(residual.mean(), rel=1e-5) and found.scores is None
    same = evaluate(run, data(None), metric("MeanSquaredError", False), reference=[LOGITS])
    assert same.value == pytest.approx(0, abs=1e-9)
    one = labels[:, 0]
    found = evaluate(lambda x: [run(x)[0][:, :1]], data(one), metric("mse"))
    assert found.value == pytest.approx((error[:, 0] ** 2).mean(), rel=1e-5)


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def margin(outputs: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
        return outputs[0][np.arange(len(labels)), labels]

    margin.higher_is_better = False  # type: ignore[attr-defined]
    margin.bounds = (0, 5)  # type: ignore[attr-defined]
    made = metric(margin)
    assert (made.name, made.higher_is_better, made.bounds) == ("margin", False, (0.0, 5.0))
    found = evaluate(run, data(Y), made, batch=9)
    expected = LOGITS[np.arange(101), Y]
    assert found.scores is not None
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)
    assert found.value == pytest.approx(expected.mean(), rel=1e-5)

    (tmp_path / "metric_of_tests.py").write_text(
        "import numpy as np\ndef spread(outputs, labels):\n    return float(outputs[0].std())\n"
    )
    monkeypatch.chdir(tmp_path)
    found = evaluate(run, data(Y), metric("metric_of_tests:spread"), batch=9)
    assert found.scores is None and found.value == pytest.approx(LOGITS.std(), rel=1e-5)


def test_what_is_no_metric() -> None:
    with pytest.raises(InputError, match=r"unknown metric 'Acuracy'; use accuracy"):
        metric("Acuracy")
    with pytest.raises(InputError, match=r"unknown metric 'MeanSquared'.*MeanSquaredError"):
        metric("MeanSquared")
    made = metric("accuracy")
    assert isinstance(made, Metric) and metric(made) is made

    def wrong(outputs: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
        return np.zeros(3)

    with pytest.raises(DataError, match=r"gave an array of shape \(3,\) for 64 examples"):
        evaluate(run, data(Y), metric(wrong))

    def broken(outputs: list[np.ndarray], labels: np.ndarray) -> Any:
        raise KeyError("no")

    with pytest.raises(DataError, match="the metric broken failed on outputs of shape"):
        evaluate(run, data(Y), metric(broken))


def test_nan_is_refused_with_the_example() -> None:
    def bad(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        logits = run(inputs)[0]
        logits[(inputs["x"] == X[70]).all(1)] = np.nan
        return [logits]

    with pytest.raises(DataError, match="output 0 is NaN for example 70"):
        evaluate(bad, data(Y), metric("accuracy"), batch=8)
    with pytest.raises(DataError, match="undefined is nan on these 101 examples"):
        evaluate(run, data(Y), metric(undefined))
    with pytest.raises(DataError, match="no examples to evaluate"):
        evaluate(run, data(Y).subset([]), metric("accuracy"))
    with pytest.raises(DataError, match=r"first output has shape \(1, 3\) for a batch of 64"):
        evaluate(lambda x: [run(x)[0][:1]], data(Y), metric("accuracy"))


def undefined(outputs: list[np.ndarray], labels: np.ndarray) -> float:
    return float("nan")


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(run, data(Y), metric("accuracy"), batch=50, progress=lambda *at: seen.append(at))
    assert seen == [(50, 101), (100, 101), (101, 101)]
