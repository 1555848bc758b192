"""The training loop: a budget of iterations or of time, exact resume, and a clean stop on signals."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from kg_detectron.training.average import WeightAverage
from kg_detectron.training.checkpoint import load_checkpoint, save_checkpoint
from kg_detectron.training.sampler import EndlessSampler
from kg_detectron.training.scalars import ScalarLog
from kg_detectron.training.schedule import CosineSchedule
from kg_detectron.training.seeds import seed_iteration

# What the loop minimises: images and targets of a batch -> losses, whose sum counts.
Losses = Callable[[list[Tensor], list[dict[str, Tensor]]], dict[str, Tensor]]


@dataclass(frozen=True)
class LoopSettings:
    """How long and in which steps a run trains. It ends with the first of the two budgets.

    Args:
        iterations: budget of iterations; None is unlimited.
        minutes: budget of time, of all stretches of the run together; None is unlimited.
        batch_size: images of an iteration.
        seed: of the run, 0 or more.
        max_gradient_norm: longer gradients are shortened to this length.
        checkpoint_minutes: time between checkpoints.
        log_period: iterations between lines of ``metrics.jsonl``.

    Raises:
        ValueError: without any budget.
    """

    iterations: int | None = None
    minutes: float | None = None
    batch_size: int = 4
    seed: int = 0
    max_gradient_norm: float = 10.0
    checkpoint_minutes: float = 5.0
    log_period: int = 20

    def __post_init__(self) -> None:
        if self.iterations is None and self.minutes is None:
            raise ValueError("iterations, minutes: expected at least one budget")


class Trainer:
    """Trains a model and keeps its run in a folder: ``checkpoint.pth``, and the losses in a `ScalarLog`.

    A run that was stopped continues exactly: the same samples, random numbers, optimiser state and moving average. With
    a budget of iterations the resumed run is bitwise the uninterrupted one. With a budget of time the learning rate
    follows the clock.

    Args:
        model: in training mode while it trains.
        losses: of a batch.
        optimizer: its groups may hold ``base_lr``; otherwise their ``lr`` is the base learning rate.
        samples: gives the image and the target of a `Sample`, such as `TrainingSamples`.
        sampler: the order of the samples; the loop sets its start.
        folder: of the run; made if missing.
        settings: see `LoopSettings`.
        schedule: of the learning rate.
        average: moving average of the weights, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        optimizer: Optimizer,
        samples: Dataset,
        sampler: EndlessSampler,
        folder: str | Path,
        settings: LoopSettings,
        schedule: CosineSchedule = CosineSchedule(),  # noqa: B008 (frozen)
        average: WeightAverage | None = None,
    ) -> None:
        self.model = model
        self.losses = losses
        self.optimizer = optimizer
        self.samples = samples
        self.sampler = sampler
        self.folder = Path(folder)
        self.settings = settings
        self.schedule = schedule
        self.average = average
        self.iteration = 0
        self.seconds = 0.0
        self.latest: dict[str, float] = {}
        self.stop_requested = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = ScalarLog(self.folder)
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])

    @property
    def checkpoint_file(self) -> Path:
        """The file that `resume` reads."""
        return self.folder / "checkpoint.pth"

    @property
    def progress(self) -> float:
        """The fraction of the budget that is spent."""
        parts = [0.0]
        if self.settings.iterations is not None:
            parts.append(self.iteration / max(1, self.settings.iterations))
        if self.settings.minutes is not None:
            parts.append(self.seconds / max(1e-9, 60 * self.settings.minutes))
        return max(parts)

    def resume(self) -> bool:
        """Continue from the checkpoint of the folder. Returns whether there is one."""
        if not self.checkpoint_file.exists():
            return False
        state = load_checkpoint(self.checkpoint_file)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        return True

    def save(self) -> None:
        """Write the checkpoint of the present state; errors as in `save_checkpoint`."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "seconds": self.seconds,
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        save_checkpoint(self.checkpoint_file, state)

    def train(self, after_iteration: Callable[["Trainer"], None] | None = None) -> bool:
        """Train until a budget is spent or a signal (SIGTERM, SIGINT) arrives, and save a checkpoint at the end.

        Args:
            after_iteration: called after every iteration; its time does not count for the budget.

        Returns:
            Whether the budget is spent: False if the run was stopped and can be resumed.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.model.train()
        self.log.start(self.iteration + 1)
        self.sampler.start = self.iteration * self.settings.batch_size
        order = iter(self.sampler)
        last_save = time.monotonic()
        sums: dict[str, float] = {}
        count = 0
        with self._signals():
            while self.progress < 1 and not self.stop_requested:
                begin = time.monotonic()
                batch = [self.samples[next(order)] for _ in range(self.settings.batch_size)]
                waited = time.monotonic() - begin
                values = self.latest = self.step([image for image, _ in batch], [target for _, target in batch])
                self.seconds += time.monotonic() - begin
                for name, value in (values | {"data_seconds": waited}).items():
                    sums[name] = sums.get(name, 0.0) + value
                count += 1
                if self.iteration % self.settings.log_period == 0:
                    self._log({name: value / count for name, value in sums.items()})
                    sums, count = {}, 0
                if time.monotonic() - last_save > 60 * self.settings.checkpoint_minutes:
                    self.save()
                    last_save = time.monotonic()
                if after_iteration is not None:
                    after_iteration(self)
        self.save()
        return self.progress >= 1

    def step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, float]:
        """One iteration. Returns the losses, their sum, and the norm of the gradient.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        seed_iteration(self.settings.seed, self.iteration, self.sampler.rank)
        factor = self.schedule(self.iteration, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        losses = self.losses(images, targets)
        total = cast(Tensor, sum(losses.values()))
        if not total.isfinite():
            raise FloatingPointError(f"iteration {self.iteration}: the loss is {float(total.detach())}")
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        self.iteration += 1
        return {
            **{name: float(value.detach()) for name, value in losses.items()},
            "loss": float(total.detach()),
            "gradient_norm": float(norm),
        }

    def _log(self, values: dict[str, float]) -> None:
        progress = {"minutes": round(self.seconds / 60, 3), "progress": round(self.progress, 5)}
        line = progress | {"lr": self.optimizer.param_groups[0]["lr"]}
        self.log.write(self.iteration, line | {name: round(v, 5) for name, v in values.items()})

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the loop after the present iteration. Only the main thread can receive them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(*_: object) -> None:
            self.stop_requested = True

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
