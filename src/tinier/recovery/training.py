"""The one training loop: what a run trains, one step, an epoch, and where it is."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tinier.data.base import Examples
from tinier.errors import InputError
from tinier.graph import trace as tracing
from tinier.modules.masked import plain_name
from tinier.network import Network
from tinier.recovery.averaging import Averaged
from tinier.recovery.base import FeatureLoss, Loss, Penalty, Pull
from tinier.recovery.batches import Augment, Inputs, batches_of
from tinier.recovery.inside import AnyLoss, Inside
from tinier.recovery.layout import layout_of, lying, store
from tinier.recovery.optimizers import optimizer_of
from tinier.recovery.pairing import pair_layers
from tinier.recovery.pulls import step_size
from tinier.recovery.recompute import recomputed
from tinier.recovery.saved_training import (
    State,
    optimizer_tensors,
    prefixed,
    read,
    restore_optimizer,
    under,
    write,
)
from tinier.recovery.settings import (
    PRECISIONS,
    Recovered,
    Settings,
    same_outputs,
    schedule,
    snapshot,
)
from tinier.recovery.teaching import Answers
from tinier.recovery.workers import Workers

EachStep = Callable[[nn.Module, float], None]

MOST_GRADIENT = 1.0  # norm to which larger gradients are cut
SNAPSHOT_STEPS = 50  # distance of the weights that are gone back to when training diverges
# Below this loss the student is the teacher, to the rounding of float32; Adam would follow the rounding errors.
EQUAL = 1e-7
SKIPPED = 25  # steps in a row that float16 may overflow in while its scale falls


class Run:
    """One training: what it trains, and where it is; the arguments are those of `recover`."""

    def __init__(
        self,
        student: Network,
        teacher: Network,
        train: Examples,
        losses: tuple[AnyLoss, ...],
        valid: Examples | None,
        settings: Settings,
        augment: Augment | None,
        each_step: EachStep | None,
        pairs: Mapping[str, str] | None = None,
    ) -> None:
        self.started = time.monotonic()
        self.settings, self.losses, self.train, self.valid = settings, losses, train, valid
        self.augment, self.each_step = augment, each_step
        self.workers = Workers(settings.device)
        self.network, self.teacher = student.copy(), teacher
        features = any(isinstance(loss, FeatureLoss) for loss in losses)
        paired = pair_layers(student, teacher, pairs) if features else ()
        self.module = self.network.module
        if self.workers.device.type != "cpu":
            self.module.to(self.workers.device)
            self.teacher = teacher.copy()
            self.teacher.module.to(self.workers.device)
        self.batch = min(settings.batch, len(train))
        least = self.workers.count * settings.accumulate
        if self.batch < least:
            raise InputError(
                f"batch={self.batch}: with {self.workers.count} processes and accumulate={settings.accumulate}, "
                f"a step needs at least {least} examples"
            )
        # Whole batches only: batch norms cannot learn from the single example that may be left over.
        self.per_epoch = len(train) // self.batch
        whole = settings.epochs
        self.total = math.inf if whole is None else max(1, round(whole * self.per_epoch))
        self.inside = Inside(self.network, self.teacher, losses, paired, train, settings)
        remember = augment is None and not self.inside.pairs
        self.answers = Answers(self.teacher, len(train), remember)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.parameters += [p for p in self.inside.terms.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(self.module, self.parameters, settings.lr)
        self.lr = self.optimizer.param_groups[0]["lr"]
        half = settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.workers.device.type, enabled=half)
        self.average = Averaged(self.module, settings.ema) if settings.ema else None
        self.steps, self.stopped, self.skipped, self.elapsed = 0, "", 0, 0.0
        self.history, self.validation = [0.0], list[float]()
        self.best: dict[str, Tensor] = {}

    def trained(
        self,
        student: Network,
        penalties: Sequence[Penalty],
        progress: Callable[[float, float], None] | None,
    ) -> Recovered:
        module = self.module
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(tracing.evaluating(module))
            torch.manual_seed(self.settings.seed)
            outputs = [loss for loss in self.losses if isinstance(loss, Loss)]
            if not penalties and outputs and self._equal(outputs):
                return self._result()
            few, _ = next(self.train.subset(range(min(2, self.batch))).batches(2))
            self.layout = layout_of(module, self._here(few))
            if self.batch > 1:
                for part in module.modules():
                    if isinstance(part, _BatchNorm):
                        part.train()
            stack.enter_context(self.inside)
            if self.settings.recompute:
                stack.enter_context(recomputed(module))
            named = {plain_name(n): p for n, p in module.named_parameters(remove_duplicate=False)}
            trained = {name: p for name, p in named.items() if p.requires_grad}
            pulls = [penalty.on(student, trained) for penalty in penalties]
            self._go_on()
            good, saved = snapshot(module), time.monotonic()
            batches = batches_of(
                self.train, self.batch, self.settings.seed, self.augment, self.steps
            )
            while (done := self._done()) < 1 and not self.stopped:
                if self.steps % SNAPSHOT_STEPS == 0:
                    good = snapshot(module)
                value = self._step(*next(batches), done, pulls)
                if self.stopped:
                    module.load_state_dict(good)
                    break
                if self.steps % self.per_epoch == 0:
                    self._epoch(pulls)
                if progress is not None:
                    progress(min(1.0, self._done()), value)
                if self.settings.checkpoint and time.monotonic() - saved >= self.settings.every:
                    self._save()
                    saved = time.monotonic()
            if not self.stopped and not all(v.isfinite().all() for v in snapshot(module).values()):
                self.stopped = self._diverged("the weights became nan")
                module.load_state_dict(good)
            elif self.average is not None:
                module.load_state_dict(self.average.values)
            if self.valid is not None and self.best:
                if self.steps % self.per_epoch:  # the last epoch's part
                    self._validate()
                module.load_state_dict(self.best)
            if self.settings.checkpoint:
                self._save()
            for pull in pulls:
                pull.finish()
            module.zero_grad(set_to_none=True)
            store(module, torch.contiguous_format)
        return self._result()

    def _step(
        self, index: Tensor, inputs: Inputs, labels: Tensor | None, done: float, pulls: list[Pull]
    ) -> float:
        """One step of the optimizer; ``stopped`` says why there was none."""
        if self.each_step is not None:
            self.each_step(self.module, done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * schedule(done)
        self.optimizer.zero_grad()
        mine = self.workers.share(torch.arange(len(index)))
        value, terms = 0.0, [0.0] * len(self.losses)
        for rows in mine.tensor_split(self.settings.accumulate):
            found = self._losses(
                index[rows],
                {name: tensor[rows] for name, tensor in inputs.items()},
                None if labels is None else labels[rows],
            )
            # Shares of processes may differ by one example; their mean is that of all examples.
            share = len(rows) * self.workers.count / len(index)
            self.scaler.scale(torch.stack(found).sum() * share).backward()
            terms = [t + share * one.item() for t, one in zip(terms, found, strict=True)]
        self.workers.average_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, MOST_GRADIENT).item()
        terms = [self.workers.mean(term) for term in terms]
        value = sum(terms)
        for pull in pulls:
            if (extra := pull.loss(done)) is not None:
                extra.backward()
                value += extra.item()
        if math.isfinite(value) and not math.isfinite(norm) and self.scaler.is_enabled():
            self.skipped += 1  # the scale was too large, and falls
        else:
            self.skipped = 0
        if not math.isfinite(value) or (not math.isfinite(norm) and not self.skipped):
            self.stopped = self._diverged(self._culprit(terms, value))
            return value
        if self.skipped > SKIPPED:
            self.stopped = self._diverged(f"gradients overflowed {SKIPPED} times in a row")
            return value
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for pull in pulls:
            pull.after_step(step_size(self.optimizer))
        if self.average is not None:
            self.average.update(self.module)
        inside = self.steps % self.per_epoch
        if self.steps and not inside:
            self.history.append(0.0)
        self.history[-1] += (value - self.history[-1]) / (inside + 1)
        self.steps += 1
        return value

    def _losses(self, index: Tensor, inputs: Inputs, labels: Tensor | None) -> list[Tensor]:
        """The losses of some examples, each a scalar."""
        here = self._here(inputs)
        kind = PRECISIONS[self.settings.precision]
        with torch.autocast(self.workers.device.type, kind, enabled=kind is not None):
            targets = self.answers(index, here)
            outputs = tracing.call(self.module, lying(here, self.layout))
        if self.steps == 0:
            same_outputs(outputs, targets)
        known = None if labels is None else labels.to(self.workers.device)
        return self.inside.losses(outputs, targets, known)

    def _epoch(self, pulls: list[Pull]) -> None:
        """What follows a pass over the data."""
        self.workers.average_buffers(self.module)
        for pull in pulls:
            pull.after_epoch(self._done())
        if self.valid is None:
            return
        self._validate()
        waited = len(self.validation) - 1 - self.validation.index(min(self.validation))
        if self.settings.patience and waited >= self.settings.patience:
            self.stopped = (
                f"the loss on the validation part had its least value {waited} epochs ago"
            )

    def _validate(self) -> None:
        """The loss on the validation part; the weights are kept where it is the smallest so far."""
        assert self.valid is not None
        module, last = self.module, snapshot(self.module)
        if self.average is not None:
            module.load_state_dict(self.average.values)
        total = 0.0
        with tracing.evaluating(module), torch.no_grad():
            for inputs, labels in self.valid.batches(self.batch):
                here = self._here(inputs)
                targets, outputs = (
                    self.teacher(here),
                    tracing.call(module, lying(here, self.layout)),
                )
                known = None if labels is None else labels.to(self.workers.device)
                found = self.inside.losses(outputs, targets, known)
                total += len(next(iter(inputs.values()))) * torch.stack(found).sum().item()
        self.validation.append(total / len(self.valid))
        if self.validation[-1] <= min(self.validation):
            self.best = snapshot(module)
        module.load_state_dict(last)

    def _equal(self, losses: Sequence[Loss]) -> bool:
        """Whether there is nothing to recover: no loss on the first batches, in evaluation mode."""
        few = self.train.subset(range(min(len(self.train), 4 * self.batch)))
        for inputs, labels in few.batches(self.batch):
            here = self._here(inputs)
            outputs, targets = self.network(here), self.teacher(here)
            same_outputs(outputs, targets)
            known = None if labels is None else labels.to(self.workers.device)
            if not all(abs(loss(outputs, targets, known).item()) <= EQUAL for loss in losses):
                return False
        return True

    def _here(self, inputs: Inputs) -> Inputs:
        return {name: value.to(self.workers.device) for name, value in inputs.items()}

    def _seconds(self) -> float:
        """Time taken, that of the runs before it was killed included."""
        return self.elapsed + time.monotonic() - self.started

    def _done(self) -> float:
        """The part that is over, of the steps or of the time."""
        limit = self.settings.seconds
        late = 0.0 if limit is None else self.workers.agree(self._seconds() / limit)
        return max(self.steps / self.total, late)

    def _culprit(self, terms: list[float], value: float) -> str:
        """Which loss is not finite."""
        for loss, term in zip(self.losses, terms, strict=True):
            if not math.isfinite(term):
                return f"the loss {loss.name} became {term}"
        what = (
            f"the loss became {value}"
            if not math.isfinite(value)
            else "its gradients are not finite"
        )
        return what

    def _diverged(self, what: str) -> str:
        return (
            f"{what} at step {self.steps + 1}; the last good weights were taken. "
            f"A learning rate below {self.lr:g} may help"
        )

    def _result(self) -> Recovered:
        self.module.to("cpu")
        return Recovered(
            self.network,
            tuple(self.history),
            self.steps / self.per_epoch,
            self._seconds(),
            self.stopped,
            tuple(self.validation),
        )

    def _asked(self) -> dict[str, Any]:
        """What tells this training from others."""
        first = self.train.subset(range(min(len(self.train), 64)))
        weights = hashlib.sha256()
        for name, value in sorted(self.first.items()):
            weights.update(name.encode())
            weights.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        left = {"checkpoint", "every", "device"}
        numbers = {k: v for k, v in asdict(self.settings).items() if k not in left}
        return {
            **numbers,
            "losses": [repr(loss) for loss in self.losses],
            "pairs": [[pair.student, pair.teacher] for pair in self.inside.pairs],
            "examples": len(self.train),
            "first examples": first.digest(),
            "student": weights.hexdigest(),
            "processes": self.workers.count,
        }

    def _save(self) -> None:
        """Write the state."""
        if not self.workers.first:
            return
        assert self.settings.checkpoint is not None
        numbers = {
            "steps": self.steps,
            "stopped": self.stopped,
            "seconds": self._seconds(),
            "history": self.history,
            "validation": self.validation,
            "averaged": self.average.steps if self.average else 0,
            "scaler": self.scaler.state_dict(),
        }
        tensors = {
            **prefixed("module", self.module.state_dict()),
            **prefixed("optimizer", optimizer_tensors(self.optimizer)),
            **prefixed("average", self.average.values if self.average else {}),
            **prefixed("best", self.best),
            **prefixed("terms", self.inside.terms.state_dict()),
            **prefixed("answers", self.answers.state()),
            "random": torch.get_rng_state(),
        }
        write(self.settings.checkpoint, State(self._asked(), numbers, tensors))

    def _go_on(self) -> None:
        """Take over the state that an earlier run of the same call left."""
        folder = self.settings.checkpoint
        if folder is None:
            return
        self.first = snapshot(self.module)
        state = read(folder, self._asked())
        if state is None:
            return
        numbers, tensors = state.numbers, state.tensors
        self.steps, self.stopped = numbers["steps"], numbers["stopped"]
        self.elapsed, self.history = numbers["seconds"], numbers["history"]
        self.validation = numbers["validation"]
        self.scaler.load_state_dict(numbers["scaler"])
        self.module.load_state_dict(under("module", tensors))
        restore_optimizer(self.optimizer, under("optimizer", tensors))
        if self.average is not None:
            self.average.restore(under("average", tensors), numbers["averaged"])
        self.best = under("best", tensors)
        self.inside.terms.load_state_dict(under("terms", tensors))
        self.answers.restore(under("answers", tensors))
        torch.set_rng_state(tensors["random"])
