"""Losses of distillation against closed forms written apart, and what they are invariant to."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tinier.recovery
from tinier.errors import RefusedError
from tinier.recovery.attention_transfer import AttentionTransfer
from tinier.recovery.base import FeatureLoss, Loss
from tinier.recovery.contrastive import Contrastive
from tinier.recovery.correlation import Correlation
from tinier.recovery.decoupled import Decoupled
from tinier.recovery.hidden_relations import HiddenRelations
from tinier.recovery.hints import Hints
from tinier.recovery.jensen_shannon import JensenShannon
from tinier.recovery.relational import Relational
from tinier.recovery.soft_targets import SoftTargets
from tinier.registry import implementations


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(loss: FeatureLoss, student: Tensor, teacher: Tensor) -> float:
    torch.manual_seed(0)
    return loss.on([student], [teacher])([student], [teacher], None).item()


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_with_its_own_weights_is_soft_targets(temperature: float) -> None:
    """KD = TCKD + (1 − p_target) · NCKD, the equation that the method starts from; one example, so that β may be its own."""
    for seed in range(5):
        ours, theirs = logits(1, 7, seed=seed), logits(1, 7, seed=seed + 10)
        target = float((theirs / temperature).softmax(1).max())
        loss = Decoupled(alpha=1.0, beta=1 - target, temperature=temperature)
        whole = SoftTargets(temperature)((ours,), (theirs,), None)
        torch.testing.assert_close(loss((ours,), (theirs,), None), whole, rtol=1e-4, atol=1e-6)


def test_decoupled_of_places() -> None:
    """(n, classes, height, width): the mean over the places is that of as many examples."""
    ours, theirs = logits(2, 5, 3, 4), logits(2, 5, 3, 4, seed=1)
    flat = [x.movedim(1, -1).reshape(-1, 5) for x in (ours, theirs)]
    torch.testing.assert_close(
        Decoupled(dim=1)((ours,), (theirs,), None), Decoupled()((flat[0],), (flat[1],), None)
    )


def test_correlation_is_pearsons() -> None:
    ours, theirs = logits(6, 5), logits(6, 5, seed=1)
    p, q = (softmax(x.double().numpy() / 2) for x in (theirs, ours))
    rows = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(6)])
    columns = np.mean([1 - np.corrcoef(p[:, j], q[:, j])[0, 1] for j in range(5)])
    found = Correlation(beta=1.5, gamma=0.5, temperature=2.0)((ours,), (theirs,), None)
    assert float(found) == pytest.approx(4 * (1.5 * rows + 0.5 * columns), rel=1e-4)


def test_jensen_shannon_between_the_two_divergences() -> None:
    ours, theirs = logits(3, 4, 9), logits(3, 4, 9, seed=1)
    p, q = (softmax(x.double().numpy()) for x in (theirs, ours))
    for beta in (0.1, 0.5, 0.8):
        m = beta * p + (1 - beta) * q
        expected = beta * (p * np.log(p / m)).sum(-1) + (1 - beta) * (q * np.log(q / m)).sum(-1)
        found = JensenShannon(beta)((ours,), (theirs,), None)
        assert float(found) == pytest.approx(expected.mean(), rel=1e-4)
    forward = float((p * np.log(p / q)).sum(-1).mean())
    backward = float((q * np.log(q / p)).sum(-1).mean())
    # GKD, section 3: JSD(β) / β → KL(p ‖ q) and JSD(β) / (1 − β) → KL(q ‖ p).
    exact = [x.double() for x in (ours, theirs)]
    small = _divergence(exact, 1e-4) / 1e-4
    large = _divergence(exact, 1 - 1e-4) / 1e-4
    assert small == pytest.approx(forward, rel=1e-2) and large == pytest.approx(backward, rel=1e-2)
    # What float32 gives is that to its rounding.
    assert float(JensenShannon(1e-4)((ours,), (theirs,), None)) == pytest.approx(
        small * 1e-4, abs=1e-6
    )


def _divergence(both: Sequence[Tensor], beta: float) -> float:
    log_q, log_p = (x.log_softmax(-1) for x in both)
    log_m = torch.stack([log_p + math.log(beta), log_q + math.log(1 - beta)]).logsumexp(0)
    first, second = ((a.exp() * (a - log_m)).sum(-1).mean() for a in (log_p, log_q))
    return float(beta * first + (1 - beta) * second)


def test_relational_is_blind_to_rotation_and_scale() -> None:
    x, y = logits(10, 6), logits(10, 4, seed=1)
    turned = 3 * x @ torch.linalg.qr(logits(6, 6, seed=2))[0] + 5
    assert of(Relational(), turned, x) == pytest.approx(0, abs=1e-6)
    assert of(Relational(), y, x) > 1e-3
    distances = torch.cdist(x, x).numpy()
    mean = distances[~np.eye(10, dtype=bool)].mean()
    other = torch.cdist(y, y).numpy()
    other_mean = other[~np.eye(10, dtype=bool)].mean()
    expected = F.smooth_l1_loss(
        torch.from_numpy(other / other_mean), torch.from_numpy(distances / mean)
    )
    assert of(Relational(angle=0.0), y, x) == pytest.approx(float(expected), rel=1e-4)


def test_attention_is_blind_to_the_order_of_channels_and_to_scale() -> None:
    x = logits(4, 6, 5, 5)
    assert of(AttentionTransfer(), 2 * x[:, [3, 1, 0, 2, 5, 4]], x) == pytest.approx(0, abs=1e-6)
    y = logits(4, 3, 5, 5, seed=1)
    a, b = (z.square().mean(1).flatten(1) for z in (y, x))
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    assert of(AttentionTransfer(1.0), y, x) == pytest.approx(float((a - b).square().sum(1).mean()))
    # Other sizes are averaged to the smaller.
    assert of(AttentionTransfer(), logits(4, 3, 10, 10), x) > 0
    with pytest.raises(RefusedError, match="no places"):
        AttentionTransfer().on([logits(4, 6)], [logits(4, 6)])


def test_hints_find_the_map_between_the_two() -> None:
    teacher = logits(64, 12, 4, 4)
    maps = logits(12, 7, seed=1)
    student = torch.einsum("bchw,cd->bdhw", teacher, maps)  # of fewer channels, all in the teacher
    fitted = of(Hints(fit="least_squares"), student, teacher)
    assert fitted < of(Hints(), student, teacher)
    x = student.movedim(1, -1).reshape(-1, 7).double().numpy()
    y = teacher.movedim(1, -1).reshape(-1, 12).double().numpy()
    design = np.hstack([x, np.ones((len(x), 1))])
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert fitted == pytest.approx((left**2).mean() / y.var(), rel=1e-3)
    # The teacher as its own student: the identity is where the map begins.
    assert of(Hints(), teacher, teacher) == 0
    parameters = list(Hints().on([student], [teacher]).parameters())
    assert all(p.requires_grad for p in parameters)
    assert not any(
        p.requires_grad for p in Hints(fit="least_squares").on([student], [teacher]).parameters()
    )


def test_hidden_relations() -> None:
    x, y = logits(2, 5, 8), logits(2, 5, 16, seed=1)
    expected = 0.0
    for sample in range(2):
        for head in range(2):
            a = x[sample, :, 4 * head :][:, :4].double().numpy()
            b = y[sample, :, 8 * head :][:, :8].double().numpy()
            q, p = softmax(a @ a.T / 2), softmax(b @ b.T / math.sqrt(8))
            expected += float((p * np.log(p / q)).sum(1).mean()) / 4
    assert of(HiddenRelations(heads=2), x, y) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(RefusedError, match="3 heads do not divide"):
        HiddenRelations(heads=3).on([x], [y])
    with pytest.raises(RefusedError, match="as many tokens"):
        HiddenRelations(heads=2).on([x[:, :3]], [y])


def test_contrastive_has_the_least_value_that_it_says() -> None:
    """Two examples whose features are opposite: their maps can be perfect."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = Contrastive(temperature=0.5, width=2)
    term = loss.on([x], [x])
    with torch.no_grad():
        for part in term.modules():
            if isinstance(part, nn.Linear):
                part.weight.copy_(torch.eye(2))
                part.bias.zero_()
    assert term([x], [x], None).item() == pytest.approx(math.log(1 + math.exp(-2 / 0.5)), rel=1e-5)
    assert term([x], [-x], None).item() > 1


FEATURES = {
    "attention_transfer": (4, 6, 5, 5),
    "contrastive": (4, 6),
    "hidden_relations": (4, 5, 16),
    "hints": (4, 6, 5, 5),
    "relational": (4, 6),
}


def test_every_loss_of_features_is_in_the_table() -> None:
    assert set(implementations(tinier.recovery, FeatureLoss)) == set(FEATURES)  # type: ignore[type-abstract]


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_are_finite_and_from_oneself_nothing_is_learned(name: str) -> None:
    loss = implementations(tinier.recovery, FeatureLoss)[name]()  # type: ignore[type-abstract]
    x = logits(*FEATURES[name])
    term = loss.on([x], [x])
    student = x.clone().requires_grad_(True)
    value = term([student], [x], None)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()
    if name != "contrastive":  # whose maps are random at first
        assert value.item() == pytest.approx(0, abs=1e-6) and gradient.abs().max() < 1e-3


@pytest.mark.parametrize("name", sorted(implementations(tinier.recovery, Loss)))  # type: ignore[type-abstract]
def test_outputs_from_oneself_cost_nothing(name: str) -> None:
    loss = implementations(tinier.recovery, Loss)[name]()  # type: ignore[type-abstract]
    if loss.needs_labels:
        return
    x = logits(8, 5).requires_grad_(True)
    value = loss((x,), (x.detach(),), None)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(0, abs=1e-5) and gradient.abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Decoupled, {"temperature": 0.0}),
        (Correlation, {"temperature": -1.0}),
        (JensenShannon, {"beta": 1.0}),
        (JensenShannon, {"temperature": 0.0}),
        (Contrastive, {"temperature": 0.0}),
        (Hints, {"fit": "exact"}),
    ],
)
def test_settings_that_mean_nothing_are_refused(kind: type, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"above 0|beta in|is possible"):
        kind(**settings)
