"""The certificate against simulations and closed forms."""

import numpy as np
import pytest

from tinier.search.certificate import certify, examples_needed, p_value, upper_bound

DELTA = 0.05


def flips(random: np.random.Generator, n: int, harmful: float, helpful: float) -> np.ndarray:
    """(n,) paired differences of 0/1 scores, original − artifact."""
    return random.choice([1.0, 0.0, -1.0], n, p=[harmful, 1 - harmful - helpful, helpful])


def scores(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0/1 scores of original and artifact that differ so."""
    return (difference >= 0).astype(float), (difference <= 0).astype(float)


def test_false_certificates_are_rarer_than_delta() -> None:
    # The true loss equals the limit: every certificate is a false one.
    random = np.random.default_rng(0)
    false = sum(
        p_value((flips(random, 1500, 0.03, 0.02) + 1) / 2, 0.505, DELTA) <= DELTA
        for _ in range(2000)
    )
    assert false / 2000 <= DELTA


def test_bound_covers_the_truth() -> None:
    random = np.random.default_rng(1)
    truth = (0.02 - 0.01 + 1) / 2
    missed = sum(
        upper_bound((flips(random, 400, 0.02, 0.01) + 1) / 2, DELTA) < truth for _ in range(300)
    )
    assert missed / 300 <= DELTA


def test_power_at_the_textbook_case() -> None:
    # 1 % harmful and 1 % helpful flips, a limit of one point: 2,500 examples are enough nine times in ten.
    random = np.random.default_rng(2)
    certified = 0
    for _ in range(100):
        original, artifact = scores(flips(random, 2500, 0.01, 0.01))
        certified += bool(certify(original, artifact, bounds=(0, 1), limit=0.01, delta=DELTA).holds)
    assert certified >= 80


def test_equal_answers_have_the_closed_form() -> None:
    # Without any flip each bet wins: capital is the product of 1 + bet·(mean − 1/2), the bets are at their cap soon.
    original = np.ones(1000)
    proof = certify(original, original, bounds=(0, 1), limit=0.02, delta=DELTA)
    assert proof.holds and proof.harmful == proof.helpful == 0 and proof.loss == 0
    assert 0 < proof.bound <= 0.02
    assert certify(original, original, bounds=(0, 1), limit=0.0005, delta=DELTA).holds is False


def test_counts_and_signs() -> None:
    original = np.array([1.0, 1, 1, 0, 0] * 100)
    artifact = np.array([1.0, 0, 1, 1, 0] * 100)
    proof = certify(original, artifact, bounds=(0, 1), limit=0.5, delta=DELTA)
    assert (proof.harmful, proof.helpful, proof.loss) == (100, 100, 0.0)
    lower = certify(
        original, artifact, bounds=(0, 1), limit=0.5, delta=DELTA, higher_is_better=False
    )
    assert (lower.harmful, lower.helpful) == (100, 100)


def test_scores_of_another_range() -> None:
    random = np.random.default_rng(3)
    original = random.uniform(0, 10, 4000)
    artifact = original - 0.1 + random.normal(0, 0.05, 4000).clip(-0.1, 0.1)
    proof = certify(original, artifact.clip(-1, 11), bounds=(-1, 11), limit=0.5, delta=DELTA)
    assert proof.holds and 0.09 < proof.bound <= 0.5
    with pytest.raises(ValueError, match="outside"):
        certify(original, artifact, bounds=(0, 1), limit=0.5, delta=DELTA)


def test_needed_examples_are_enough() -> None:
    random = np.random.default_rng(4)
    few = (flips(random, 300, 0.02, 0.018) + 1) / 2
    needed = examples_needed(few, 0.505, DELTA)
    assert needed is not None and needed > 300
    shares = [(few == value).mean() for value in (1.0, 0.5, 0.0)]
    held = 0
    for _ in range(60):
        sample = random.choice([1.0, 0.5, 0.0], needed, p=shares)
        held += p_value(sample, 0.505, DELTA) <= DELTA
    assert held >= 45
    assert examples_needed((flips(random, 500, 0.1, 0.0) + 1) / 2, 0.505, DELTA) is None


def test_more_examples_bound_tighter() -> None:
    one = np.array([1.0] + [0.5] * 99)
    bounds = [
        upper_bound(np.random.default_rng(5).permutation(np.tile(one, k)), DELTA)
        for k in (2, 10, 50)
    ]
    assert bounds[0] > bounds[1] > bounds[2] > one.mean()
