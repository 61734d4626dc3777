"""Recovery: the losses against closed forms, and what the training loop promises."""

import math
import time
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import build
from tinier.data.base import Arrays, Examples
from tinier.errors import DataError, InputError, ModelError
from tinier.network import Network
from tinier.recovery.base import Loss
from tinier.recovery.batches import batches_of
from tinier.recovery.cross_entropy import CrossEntropy
from tinier.recovery.loop import recover
from tinier.recovery.output_mse import OutputMSE
from tinier.recovery.settings import schedule
from tinier.recovery.soft_targets import SoftTargets


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def examples(count: int = 96, shape: tuple[int, ...] = (12,), classes: int = 5) -> Examples:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, *shape, generator=generator)
    return Examples(Arrays({"x": x}, torch.randint(0, classes, (count,), generator=generator)))


def weights(network: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def part(network: Network) -> nn.Module:
    return network.module.get_submodule("bn")


class TestLosses:
    def test_soft_targets_is_scaled_kl(self) -> None:
        ours, theirs = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
        for temperature in (1.0, 4.0):
            p, q = (torch.softmax(z / temperature, 1).double() for z in (theirs, ours))
            expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
            actual = SoftTargets(temperature)((ours,), (theirs,), None)
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)

    def test_soft_targets_at_high_temperature_is_half_the_variance(self) -> None:
        ours, theirs = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).double()
        expected = (ours - theirs).var(1, correction=0).mean() / 2
        # 300: far from 1, and rounding of float32 is still small beside T².
        actual = SoftTargets(300.0)((ours,), (theirs,), None).double()
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0)

    def test_gradient_keeps_its_size_with_temperature(self) -> None:
        theirs = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
        norms = []
        for temperature in (2.0, 4.0, 8.0):
            ours = torch.zeros(64, 10, requires_grad=True)
            SoftTargets(temperature)((ours,), (theirs,), None).backward()
            assert ours.grad is not None
            norms.append(ours.grad.norm().item())
        assert max(norms) / min(norms) < 1.5

    def test_output_mse_is_relative(self) -> None:
        theirs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        mean = theirs.mean().expand_as(theirs)
        assert OutputMSE()((mean,), (theirs,), None).item() == pytest.approx(1, rel=1e-5)
        one = OutputMSE()((theirs * 1.1,), (theirs,), None)
        two = OutputMSE()((theirs * 110,), (theirs * 100,), None)
        torch.testing.assert_close(one, two)

    def test_cross_entropy_is_torch(self) -> None:
        logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
        actual = CrossEntropy(weight=0.5)((logits,), (), labels)
        torch.testing.assert_close(actual, 0.5 * F.cross_entropy(logits, labels))

    @pytest.mark.parametrize("loss", [SoftTargets(), OutputMSE()])
    def test_zero_against_itself(self, loss: Loss) -> None:
        outputs = (torch.randn(6, 5),)
        assert loss(outputs, outputs, None).item() == 0

    def test_temperature_is_checked(self) -> None:
        with pytest.raises(ValueError, match="above 0"):
            SoftTargets(temperature=0)


class TestLoop:
    @pytest.mark.parametrize("name", ["mlp", "vit", "residual_cnn"])
    def test_distilling_from_oneself_changes_nothing(self, name: str) -> None:
        network = build(name)
        shape = tuple(network.example["x"].shape[1:])
        result = recover(network, network, examples(shape=shape), epochs=3, batch=32)
        assert result.history[-1] < 1e-6
        assert same(weights(result.network), weights(network))

    @pytest.mark.parametrize("loss", [SoftTargets(), OutputMSE(), CrossEntropy()])
    def test_loss_falls_and_inputs_stay(self, loss: Loss) -> None:
        student, teacher = build("mlp", seed=1), build("mlp", seed=2)
        before = weights(student), weights(teacher)
        result = recover(student, teacher, examples(), losses=[loss], epochs=12, batch=16, lr=0.01)
        assert result.history[-1] < 0.5 * result.history[0]
        assert len(result.history) == 12
        assert result.epochs == 12
        assert not result.stopped
        assert same(weights(student), before[0])
        assert same(weights(teacher), before[1])
        assert not same(weights(result.network), before[0])
        assert all(p.grad is None for p in result.network.module.parameters())

    def test_same_seed_same_bits(self) -> None:
        student, teacher = build("residual_cnn", seed=1), build("residual_cnn", seed=2)
        data = examples(48, (3, 8, 8))

        def run(seed: int) -> dict[str, Tensor]:
            return weights(recover(student, teacher, data, epochs=1.5, batch=16, seed=seed).network)

        torch.manual_seed(0)
        one = run(0)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        assert same(one, run(0))
        assert torch.equal(state, torch.get_rng_state())
        assert not same(one, run(1))

    def test_batch_norms_learn_and_modes_return(self) -> None:
        student, teacher = build("residual_cnn", seed=1), build("residual_cnn", seed=2)
        part(student).train()
        result = recover(student, teacher, examples(48, (3, 8, 8)), epochs=2, batch=16)
        key = "bn.running_mean"
        assert not torch.equal(weights(result.network)[key], weights(student)[key])
        assert part(result.network).training
        assert not result.network.module.training
        assert all(p.is_contiguous() for p in result.network.module.parameters())

    def test_traced_graphs_train_with_fixed_statistics(self) -> None:
        student, teacher = build("residual_cnn", seed=1), build("residual_cnn", seed=2)
        graph = Network(student.traced.module, student.example)
        data = examples(64, (3, 8, 8))
        result = recover(graph, teacher, data, epochs=6, batch=16, lr=0.01)
        assert result.history[-1] < 0.7 * result.history[0]
        before, after = weights(graph), weights(result.network)
        assert torch.equal(before["bn.running_mean"], after["bn.running_mean"])
        assert not torch.equal(before["conv.weight"], after["conv.weight"])

    def test_recurrent_network(self) -> None:
        student, teacher = build("lstm", seed=1), build("lstm", seed=2)
        result = recover(student, teacher, examples(64, (7, 6)), epochs=8, batch=16, lr=0.02)
        assert result.history[-1] < 0.7 * result.history[0]

    def test_time_is_kept(self) -> None:
        student, teacher = build("mlp", seed=1), build("mlp", seed=2)
        done: list[float] = []
        started = time.monotonic()
        result = recover(
            student, teacher, examples(), seconds=1.0, progress=lambda part, _: done.append(part)
        )
        assert 0.7 < time.monotonic() - started < 1.3
        assert result.seconds == pytest.approx(1.0, rel=0.3)
        assert done == sorted(done)
        assert done[-1] == pytest.approx(1, abs=0.1)

    def test_the_earlier_end_counts(self) -> None:
        student, teacher = build("mlp", seed=1), build("mlp", seed=2)
        result = recover(student, teacher, examples(), epochs=1, seconds=60, batch=32)
        assert result.epochs == 1
        assert result.seconds < 20

    def test_every_batch_is_whole_and_every_epoch_another_order(self) -> None:
        def identity(inputs: dict[str, Tensor], _: torch.Generator) -> dict[str, Tensor]:
            return inputs

        data = examples(10)
        rows = [index for index, _, _ in islice(batches_of(data, 4, 0, identity), 4)]
        assert [len(row) for row in rows] == [4] * 4
        assert len(set(torch.cat(rows[:2]).tolist())) == 8
        assert not torch.equal(torch.cat(rows[:2]), torch.cat(rows[2:]))

    def test_remembered_answers_change_nothing(self) -> None:
        """The teacher's cache against a teacher that is asked anew at every step."""
        student, teacher = build("mlp", seed=1), build("mlp", seed=2)
        data = examples(50)
        cached = recover(student, teacher, data, epochs=4, batch=16)
        asked = recover(
            student, teacher, data, epochs=4, batch=16, augment=lambda inputs, _: inputs
        )
        for one, two in zip(
            weights(cached.network).values(), weights(asked.network).values(), strict=True
        ):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)

    def test_augmented_inputs_reach_both(self) -> None:
        student, teacher = build("mlp", seed=1), build("mlp", seed=2)
        seen: list[Tensor] = []

        def noise(inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
            seen.append(inputs["x"] + torch.randn(inputs["x"].shape, generator=generator))
            return {"x": seen[-1]}

        recover(student, teacher, examples(), epochs=2, batch=32, augment=noise)
        assert len(seen) == 6
        assert not torch.equal(seen[0], seen[3])

    def test_divergence_gives_back_good_weights(self) -> None:
        class Breaks(nn.Module):
            """Adds NaN to the loss at the third step."""

            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(12, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x)

        teacher = build("mlp")
        student = Network(Breaks(), teacher.example)
        calls = 0

        def poison(inputs: dict[str, Tensor], _: torch.Generator) -> dict[str, Tensor]:
            nonlocal calls
            calls += 1
            return {"x": inputs["x"] * (math.nan if calls == 3 else 1)}

        result = recover(student, teacher, examples(), epochs=9, batch=16, augment=poison)
        assert "step 3" in result.stopped
        assert all(value.isfinite().all() for value in weights(result.network).values())
        assert result.epochs == pytest.approx(2 / 6)

    def test_interrupt_passes_through(self) -> None:
        student, teacher = build("mlp", seed=1), build("mlp", seed=2)
        before = weights(student)

        def stop(done: float, _: float) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            recover(student, teacher, examples(), epochs=1, batch=16, progress=stop)
        assert same(weights(student), before)
        assert not student.module.training

    def test_schedule(self) -> None:
        values = [schedule(step / 1000) for step in range(1001)]
        assert max(values) == 1
        assert values[0] == pytest.approx(0.05)
        assert values[-1] == pytest.approx(0, abs=1e-9)
        top = values.index(1)
        assert values[:top] == sorted(values[:top])
        assert values[top:] == sorted(values[top:], reverse=True)


class TestErrors:
    def test_no_end(self) -> None:
        with pytest.raises(InputError, match="seconds, epochs"):
            recover(build("mlp"), build("mlp"), examples())

    @pytest.mark.parametrize("wrong", [{"epochs": 0}, {"seconds": -1.0}, {"epochs": 1, "lr": 0.0}])
    def test_wrong_numbers(self, wrong: dict[str, float]) -> None:
        with pytest.raises(InputError, match="above 0"):
            recover(build("mlp"), build("mlp"), examples(), **wrong)  # type: ignore[arg-type]

    def test_no_labels(self) -> None:
        data = Examples(Arrays({"x": torch.randn(8, 12)}))
        with pytest.raises(DataError, match="labels"):
            recover(build("mlp"), build("mlp"), data, losses=[CrossEntropy()], epochs=1)

    def test_other_outputs(self) -> None:
        teacher = build("mlp")
        student = Network(nn.Sequential(nn.Linear(12, 4)), {"input": torch.randn(2, 12)})
        data = Examples(Arrays({"input": torch.randn(8, 12)}))
        teacher = Network(nn.Sequential(nn.Linear(12, 5)), {"input": torch.randn(2, 12)})
        with pytest.raises(ModelError, match="shapes"):
            recover(student, teacher, data, epochs=1)

    def test_nothing_to_train(self) -> None:
        student = build("mlp")
        student.module.requires_grad_(False)
        with pytest.raises(ModelError, match="requires_grad_"):
            recover(student, build("mlp", seed=1), examples(), epochs=1)
