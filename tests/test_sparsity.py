"""Training towards zeros: penalties against closed forms and brute force, then what is left after the cut."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import tinier.recovery
from networks import NETWORKS, build
from tinier.criteria.magnitude import Magnitude
from tinier.data.base import Arrays, Examples
from tinier.edits.base import Plan
from tinier.edits.mask import Mask, unmask
from tinier.edits.slice import Slice
from tinier.errors import InputError, RefusedError
from tinier.graph.groups import channel_groups
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network
from tinier.recovery.base import Loss, Penalty
from tinier.recovery.cross_entropy import CrossEntropy
from tinier.recovery.elastic_net import ElasticNet
from tinier.recovery.group_lasso import GroupLasso
from tinier.recovery.growing import Growing
from tinier.recovery.l1 import L1
from tinier.recovery.l2 import L2
from tinier.recovery.loop import recover
from tinier.recovery.pulls import members
from tinier.recovery.slimming import Slimming
from tinier.recovery.soft_filter import SoftFilter
from tinier.registry import implementations
from tinier.shrink import shrink
from tinier.tensors.proximal import group_factor, soft_threshold
from toy import TinyCNN, images, trained


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cnn() -> Network:
    return Network(trained(TinyCNN), {"x": images(2, 0)[0]}, "cnn")


@cache
def built(name: str) -> Network:
    """A network of the table, traced once for all tests that only look at it."""
    return build(name)


def data(count: int = 256, seed: int = 1) -> Examples:
    x, y = images(count, seed)
    return Examples(Arrays({"x": x}, y))


def accuracy(network: Network) -> float:
    x, y = images(400, seed=9)
    return float((network({"x": x})[0].argmax(1) == y).float().mean())


def parameters(network: Network) -> dict[str, nn.Parameter]:
    return dict(network.module.named_parameters())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@dataclass(frozen=True)
class HalfSquares(Loss):
    """½ Σ (y − label)²: with orthonormal inputs the lasso has a closed form."""

    name: ClassVar[str] = "half_squares"
    needs_labels: ClassVar[bool] = True

    def __call__(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor | None
    ) -> Tensor:
        assert labels is not None
        return (student[0].flatten() - labels).square().sum() / 2


class TestProximal:
    @pytest.mark.parametrize(("l1", "l2"), [(0.5, 0.0), (0.0, 0.7), (0.3, 2.0)])
    def test_soft_threshold_minimises(self, l1: float, l2: float) -> None:
        for w in (-1.3, -0.2, 0.1, 0.31, 2.0):
            grid = np.linspace(-3, 3, 600_001)
            cost = (grid - w) ** 2 / 2 + l1 * abs(grid) + l2 / 2 * grid**2
            found = float(soft_threshold(torch.tensor(w).double(), l1, l2))
            assert found == pytest.approx(grid[cost.argmin()], abs=2e-5)

    @pytest.mark.parametrize("threshold", [0.1, 1.0, 3.0])
    def test_group_minimises(self, threshold: float) -> None:
        w = random(4)

        def cost(v: np.ndarray) -> float:
            return float(((v - w.numpy()) ** 2).sum() / 2 + threshold * np.linalg.norm(v))

        found = w * group_factor(w.square().sum()[None], threshold)
        options = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 20_000}
        best = minimize(cost, w.numpy() * 0.5 + 0.01, method="Nelder-Mead", options=options)
        assert cost(found.numpy()) <= best.fun + 1e-9
        np.testing.assert_allclose(found.numpy(), best.x, atol=1e-4)

    def test_zero_stays_zero(self) -> None:
        assert group_factor(torch.zeros(3), 0.0).tolist() == [0, 0, 0]
        assert soft_threshold(torch.zeros(3), 0.5).tolist() == [0, 0, 0]


class TestGradients:
    def test_l1_l2_elastic_net(self) -> None:
        network = build("mlp")
        for penalty, form in (
            (L1(0.3), lambda w: 0.3 * w.sign()),
            (L2(0.2), lambda w: 0.2 * w),
            (ElasticNet(0.3, 0.2), lambda w: 0.3 * w.sign() + 0.2 * w),
        ):
            network.module.zero_grad()
            loss = penalty.on(network, parameters(network)).loss(0.0)
            assert loss is not None
            loss.backward()
            for name, p in parameters(network).items():
                if name.startswith("fc") and p.ndim == 2:
                    torch.testing.assert_close(p.grad, form(p.detach()))
                else:
                    assert p.grad is None, name

    def test_slimming(self) -> None:
        network = build("residual_cnn")
        loss = Slimming(0.5).on(network, parameters(network)).loss(0.0)
        assert loss is not None
        loss.backward()
        for path, part in network.module.named_modules():
            if isinstance(part, nn.BatchNorm2d):
                torch.testing.assert_close(part.weight.grad, 0.5 * part.weight.detach().sign())
                assert part.bias.grad is None, path

    def test_group_lasso_by_hand(self) -> None:
        network = build("mlp")
        loss = GroupLasso(0.1).on(network, parameters(network)).loss(0.0)
        assert loss is not None
        p = parameters(network)
        # fc1 makes 24 neurons that fc2 reads; those of fc2 are normalised over and left alone.
        channels = torch.cat(
            [p["fc1.weight"], p["fc1.bias"][:, None], p["fc2.weight"].T], 1
        ).detach()
        wanted = 0.1 * channels.shape[1] ** 0.5 * channels.norm(dim=1).sum()
        torch.testing.assert_close(loss.detach(), wanted)
        loss.backward()
        norm = channels.norm(dim=1, keepdim=True)
        torch.testing.assert_close(
            p["fc1.weight"].grad, 0.1 * channels.shape[1] ** 0.5 * p["fc1.weight"].detach() / norm
        )

    def test_gradient_of_a_dead_channel_is_zero(self) -> None:
        network = build("mlp")
        p = parameters(network)
        with torch.no_grad():
            p["fc1.weight"][3], p["fc1.bias"][3], p["fc2.weight"][:, 3] = 0, 0, 0
        loss = GroupLasso(0.1).on(network, p).loss(0.0)
        assert loss is not None
        loss.backward()
        assert all(v.grad is None or bool(v.grad.isfinite().all()) for v in p.values())
        gradient = p["fc1.weight"].grad
        assert gradient is not None and not gradient[3].any()

    @pytest.mark.parametrize("name", NETWORKS)
    def test_channel_norms_are_those_of_what_is_cut(self, name: str) -> None:
        """Σ over channels of their entries counts every entry that lies in one once for each group that has it."""
        network = built(name)
        try:
            found = members(network, parameters(network), "all")
        except RefusedError:
            assert not [
                g
                for g in channel_groups(network.traced).groups
                if g.kind not in ("normalised", "head_dim") and g.size > 1
            ]
            return
        for one in found[:3]:
            left = Slice.of(one.group, range(1, one.group.size)).cuts
            named = parameters(network)
            lost = 0.0
            for parameter, dim, kept in left:
                if parameter in named:
                    cut = named[parameter].detach().index_select(dim, torch.tensor(kept))
                    lost += float(named[parameter].detach().square().sum() - cut.square().sum())
            assert float(one.squares()[0].detach()) == pytest.approx(lost, rel=1e-3, abs=1e-5)

    def test_growing_by_hand(self) -> None:
        network = build("mlp")
        group = channel_groups(network.traced).groups[0]
        pull = Growing(Plan((Slice.of(group, range(4, 24)),)), most=2.0, ramp=0.5).on(
            network, parameters(network)
        )
        p = parameters(network)
        squares = (
            p["fc1.weight"][:4].square().sum()
            + p["fc1.bias"][:4].square().sum()
            + p["fc2.weight"][:, :4].square().sum()
        )
        for done, strength in ((0.0, 0.0), (0.25, 1.0), (0.5, 2.0), (0.9, 2.0)):
            loss = pull.loss(done)
            assert loss is not None
            torch.testing.assert_close(loss, strength / 2 * squares)


class TestTraining:
    @pytest.mark.parametrize(
        "penalty", [L1(0.2, proximal=True), ElasticNet(0.2, 0.5, proximal=True)]
    )
    def test_orthogonal_design_is_soft_thresholding(self, penalty: L1 | ElasticNet) -> None:
        x, _ = torch.linalg.qr(random(12, 6))
        truth = torch.tensor([0.5, -0.3, 0.25, 0.1, -0.05, 0.0]).double()
        y = x @ truth + 0.005 * random(12, seed=2)
        network = Network(nn.Linear(6, 1, bias=False), {"input": x[:2].float()})
        examples = Examples(Arrays({"input": x.float()}, y.float()))
        result = recover(
            network, network, examples, losses=[HalfSquares()], penalties=[penalty],
            epochs=600, batch=12, lr=0.01,
        )  # fmt: skip
        l1, l2 = (penalty.weight, 0.0) if isinstance(penalty, L1) else (penalty.l1, penalty.l2)
        wanted = soft_threshold(x.T @ y, l1, l2).float()
        found = result.network.module.get_parameter("weight").detach()[0]
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.001)
        assert torch.equal(found == 0, wanted == 0)

    def test_no_penalty_is_no_change(self, cnn: Network) -> None:
        result = recover(cnn, cnn, data(), penalties=[L2(0.0)], epochs=1)
        plain = recover(cnn, cnn, data(), epochs=1)
        assert plain.epochs == 0  # there is nothing to recover
        assert result.epochs == 1  # with a penalty there may be

    def test_group_lasso_makes_channels_that_can_leave(self, cnn: Network) -> None:
        penalty = GroupLasso(2e-2, part="producing", proximal=True)
        sparse = recover(
            cnn, cnn, data(), losses=[CrossEntropy()], penalties=[penalty], epochs=12, batch=32
        ).network
        smaller = shrink(sparse)
        assert sum(p.numel() for p in smaller.model.parameters()) < 0.8 * sum(
            p.numel() for p in cnn.module.parameters()
        )
        assert accuracy(smaller.network) == accuracy(sparse) > 0.95

    def test_l1_makes_more_small_weights(self, cnn: Network) -> None:
        options: dict[str, Any] = {"losses": [CrossEntropy()], "epochs": 5, "batch": 32}
        small = {}
        for strength in (0.0, 5e-3):
            result = recover(cnn, cnn, data(), penalties=[L1(strength)], **options)
            weight = result.network.module.get_parameter("conv2.weight").detach()
            small[strength] = float((weight.abs() < 1e-2).float().mean())
        assert small[5e-3] > 2 * small[0.0]

    def test_slimming_makes_scales_zero(self, cnn: Network) -> None:
        result = recover(
            cnn, cnn, data(), losses=[CrossEntropy()], penalties=[Slimming(0.1, proximal=True)],
            epochs=10, batch=32,
        )  # fmt: skip
        scale = result.network.module.get_parameter("bn.weight").detach()
        assert 0 < int((scale == 0).sum()) < len(scale)
        assert accuracy(result.network) > 0.95

    def test_growing_regularisation_then_cut(self, cnn: Network) -> None:
        plan = ChannelPruning(keep=0.4, criterion=Magnitude(), round_to=1).plan(cnn)
        grown = recover(
            cnn,
            cnn,
            data(),
            losses=[CrossEntropy()],
            penalties=[Growing(plan)],
            epochs=30,
            batch=32,
        ).network
        named = parameters(grown)
        for edit in plan.edits:
            assert isinstance(edit, Slice)
            one = next(m for m in members(grown, named, "all") if m.group.name == edit.group)
            norms = one.squares().detach().sqrt()
            going = [i for i in range(edit.size) if i not in edit.kept]
            assert norms[going].max() < 0.05 * norms[list(edit.kept)].mean()
        cut = plan.apply(grown)
        assert abs(accuracy(cut) - accuracy(grown)) <= 0.01
        # The cut takes next to nothing out of what was trained to lose it, and much out of what was not.
        x = {"x": images(64, 9)[0]}
        lost = [
            float((plan.apply(n)(x)[0] - n(x)[0]).norm() / n(x)[0].norm()) for n in (grown, cnn)
        ]
        assert lost[0] < 0.01 < 0.2 < lost[1]

    @pytest.mark.parametrize("progressive", [False, True])
    def test_soft_filter_pruning_then_removal(self, cnn: Network, progressive: bool) -> None:
        sparse = recover(
            cnn, cnn, data(), losses=[CrossEntropy()],
            penalties=[SoftFilter(0.5, progressive=progressive)], epochs=10, batch=32,
        ).network  # fmt: skip
        smaller = shrink(sparse)
        assert {
            edit.group: len(edit.kept) for edit in smaller.plan.edits if isinstance(edit, Slice)
        } == {
            "conv1": 4,
            "conv2": 8,
        }
        assert smaller.model.get_parameter("conv2.weight").shape == (8, 4, 3, 3)
        assert accuracy(smaller.network) == accuracy(sparse) > 0.95

    def test_zeroed_filters_can_come_back(self, cnn: Network) -> None:
        """The filters that are zeroed after one epoch are not for ever those of another."""
        pull = SoftFilter(0.5).on(cnn, named := parameters(fresh := cnn.copy()))
        pull.after_epoch(0.5)
        dead = named["conv1.weight"].detach().flatten(1).abs().sum(1) == 0
        assert int(dead.sum()) == 4
        assert named["bn.weight"].detach().all()
        fresh.module.train()
        x, y = images(64, 1)
        nn.functional.cross_entropy(fresh.module(x), y).backward()
        gradient = named["conv1.weight"].grad
        assert gradient is not None and bool((gradient[dead].flatten(1).abs().sum(1) > 0).all())

    def test_masks_hold_while_a_penalty_pulls(self, cnn: Network) -> None:
        mask = torch.rand(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.5
        masked = Plan((Mask.of("conv2.weight", mask),)).apply(cnn)
        result = recover(
            masked, cnn, data(), penalties=[ElasticNet(1e-4, 1e-3)], epochs=2, batch=32
        )
        weight = unmask(result.network).module.get_parameter("conv2.weight")
        assert not weight[~mask].any()
        assert (weight[mask] != 0).all()

    def test_deterministic_and_inputs_stay(self, cnn: Network) -> None:
        before = {k: v.clone() for k, v in cnn.module.state_dict().items()}
        one, two = (
            recover(cnn, cnn, data(64), penalties=[GroupLasso(1e-3)], epochs=2, batch=16).network
            for _ in range(2)
        )
        assert all(torch.equal(v, cnn.module.state_dict()[k]) for k, v in before.items())
        for key, value in one.module.state_dict().items():
            assert torch.equal(value, two.module.state_dict()[key])


class TestFamily:
    def test_every_penalty_registers(self) -> None:
        found = implementations(tinier.recovery, Penalty)  # type: ignore[type-abstract]
        assert set(found) == {
            "elastic_net", "group_lasso", "growing", "l1", "l2", "slimming", "soft_filter",
        }  # fmt: skip

    @pytest.mark.parametrize("name", NETWORKS)
    def test_every_network_or_a_reason(self, name: str) -> None:
        network = built(name)
        for kind in (L1, GroupLasso, Slimming):
            try:
                loss = kind(1e-3).on(network, parameters(network)).loss(0.5)
            except RefusedError as error:
                assert network.name in str(error)
                continue
            assert loss is not None and loss.item() > 0

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: L1(-1.0), "weight is -1.0"),
            (lambda: ElasticNet(1.0, float("nan")), "l2 is nan"),
            (lambda: GroupLasso(proximal=True), "part='producing'"),
            (lambda: SoftFilter(0.0), "keep is 0.0"),
            (lambda: Growing(ramp=0.0), "ramp is 0.0"),
        ],
    )
    def test_settings_are_checked(self, make: type, message: str) -> None:
        with pytest.raises(InputError, match=message):
            make()

    def test_refusals(self, cnn: Network) -> None:
        with pytest.raises(RefusedError, match="cuts no channel"):
            Growing().on(cnn, parameters(cnn))
        with pytest.raises(RefusedError, match="batch norms"):
            Slimming().on(build("mlp"), {})
        other = ChannelPruning(keep=0.5).plan(build("residual_cnn"))
        with pytest.raises(RefusedError, match="no channel group"):
            Growing(other).on(cnn, parameters(cnn))
        with pytest.raises(InputError, match="'all' or 'producing'"):
            replace(GroupLasso(), part="some").on(cnn, parameters(cnn))
