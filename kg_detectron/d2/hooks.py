"""Training hooks: seeding, losses that are not finite, the validation loss and early stopping on it, signals.

Register them among Detectron2's: `Seeding`, `FiniteLosses` and `MeanStatistics` first. `ValidationLoss`, then
`EarlyStopping`, after `IterationTimer` and `LRScheduler`, so that the step's time leaves out the validation and the
checkpoints made here hold the stepped schedule; before `PeriodicCheckpointer` and `EvalHook`, so that those see the
state and the end of the training. `StopOnSignal` between these two: the last checkpoint of all is made before it,
evaluation can wait.
"""

import contextlib
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from kg_detectron.training.sampler import EndlessSampler
from kg_detectron.training.seeds import seed_iteration

logger = logging.getLogger(__name__)


class StopTraining(BaseException):
    """A hook ends the training early. `train` catches it (`contextlib.suppress(StopTraining)`) round Detectron2's.

    Not an `Exception`, like KeyboardInterrupt: Detectron2's loop logs those as failures with a traceback. The hooks'
    `after_train` runs in either case.
    """


class Seeding(HookBase):
    """Seed every iteration, and keep the run's seed and its place among the samples in the checkpoints.

    The randomness of an iteration depends on the seed, its number and the process alone. With `EndlessSampler` a
    resumed run is therefore the run that was interrupted, on any number of workers.

    Args:
        sampler: of the training's loader; its seed is the run's. When a checkpoint is loaded, both follow it.
        batch_size: samples an iteration, over all processes.
    """

    def __init__(self, sampler: EndlessSampler, batch_size: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size

    def before_step(self) -> None:
        seed_iteration(self.sampler.seed, self.trainer.iter, comm.get_rank())

    def state_dict(self) -> dict[str, int]:
        """After an iteration: where the next one begins."""
        done = self.trainer.iter + 1 - self.trainer.start_iter
        return {"seed": self.sampler.seed, "samples": self.sampler.start + done * self.batch_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["seed"] != self.sampler.seed:
            logger.warning("SEED: the resumed run keeps its own, %d, not %d", state["seed"], self.sampler.seed)
        self.sampler.seed = state["seed"]
        self.sampler.start = state["samples"]


class FiniteLosses(HookBase):
    """Stop at a loss that is infinite or not a number, before it reaches the weights.

    The FloatingPointError names the iteration, the losses and the images (``file_name``) of this process's batch.
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def before_step(self) -> None:
        self._handle = self.trainer.model.register_forward_hook(self._check)

    def after_step(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def after_train(self) -> None:
        if self._handle is not None:  # of an iteration that did not come to its end
            self._handle.remove()

    def _check(self, model: nn.Module, inputs: tuple[list[dict[str, Any]]], losses: dict[str, torch.Tensor]) -> None:
        # Together, so that a GPU is waited for once.
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
        broken = [f"{name} is {value}" for name, value in zip(losses, values, strict=True) if not np.isfinite(value)]
        if broken:
            files = ", ".join(str(image["file_name"]) for image in inputs[0])
            raise FloatingPointError(
                f"iteration {self.trainer.iter}: {', '.join(broken)}, on the images {files}. "
                "The weights are as they were before this iteration; nothing was saved"
            )


class MeanStatistics(HookBase):
    """Give the norm layers of all processes the mean of their running statistics, after each iteration.

    So all processes validate and evaluate the model that the main one saves.
    """

    def after_step(self) -> None:
        if comm.get_world_size() == 1:
            return
        statistics = [
            buffer
            for module in self.trainer.model.modules()
            if isinstance(module, _NormBase) and module.training
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        if statistics:
            together = torch.cat([buffer.flatten() for buffer in statistics])
            distributed.all_reduce(together)
            together /= comm.get_world_size()
            for buffer, mean in zip(statistics, together.split([b.numel() for b in statistics]), strict=True):
                buffer.copy_(mean.view_as(buffer))


@contextlib.contextmanager
def _losses_only(model: nn.Module) -> Iterator[None]:
    """Training mode, in which Detectron2's models return losses, but with the norm layers and dropout as in testing."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module in model.modules():
        if isinstance(module, (_NormBase, _DropoutNd)):
            module.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    """Leave all random generators as they were found."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def validation_losses(model: nn.Module, loader: Iterable[list[dict[str, Any]]], seed: int = 0) -> dict[str, float]:
    """Mean of each loss of ``model`` over the images of ``loader``, over all processes.

    Nothing of the model, the random generators or the event storage changes. Every batch is computed with the same
    ``seed``, since Mask R-CNN samples its proposals at random.

    Errors: a ValueError where no process has an image.
    """
    model = getattr(model, "module", model)  # without DistributedDataParallel: processes may hold unequal shares
    totals: dict[str, float] = {}
    images = 0
    # Models log figures of their own in training mode; this storage keeps them out of the training's.
    with _kept_rng(), _losses_only(model), torch.no_grad(), EventStorage():
        for batch in loader:
            torch.manual_seed(seed)
            for name, loss in model(batch).items():
                totals[name] = totals.get(name, 0.0) + float(loss) * len(batch)
            images += len(batch)
    shares = comm.all_gather((totals, images))
    images = sum(count for _, count in shares)
    if not images:
        raise ValueError("the validation set has no image")
    names = sorted({name for share, _ in shares for name in share})
    return {name: sum(share.get(name, 0.0) for share, _ in shares) / images for name in names}


class ValidationLoss(HookBase):
    """Compute the losses on validation images every ``period`` iterations and after the last one.

    ``build_loader`` returns a finite loader with targets. The results go to the storage as ``validation/total_loss``
    and ``validation/<name>`` for each part. ``period`` 0 leaves the last iteration only.
    """

    def __init__(self, period: int, build_loader: Callable[[], Iterable[list[dict[str, Any]]]], seed: int = 0):
        self.period = period
        self.build_loader = build_loader
        self.seed = seed
        self._loader: Iterable[list[dict[str, Any]]] | None = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done != self.trainer.max_iter and (self.period <= 0 or done % self.period):
            return
        if self._loader is None:
            self._loader = self.build_loader()
        losses = validation_losses(self.trainer.model, self._loader, self.seed)
        total = sum(losses.values())
        for name, value in {"total_loss": total, **losses}.items():
            self.trainer.storage.put_scalar(f"validation/{name}", value, smoothing_hint=False)
        logger.info("validation loss %.4f after %d iterations", total, done)


class EarlyStopping(HookBase):
    """Keep the best model as ``model_best.pth``; stop when the validation loss no longer falls (paper, section 3).

    An evaluation is good where the loss is below that of the last good one by more than ``min_delta``, a fraction of
    it. After ``patience`` evaluations in a row that are not, all hooks finish the iteration and `StopTraining` is
    raised; the trainer then counts as finished, so that hooks make their last evaluation, and the model is saved as
    ``model_final.pth``. ``patience`` 0 never stops. The state is part of the checkpoints.
    """

    def __init__(
        self,
        checkpointer: DetectionCheckpointer,
        *,
        patience: int = 0,
        min_delta: float = 0.0,
        metric: str = "validation/total_loss",
    ):
        if patience < 0 or not 0 <= min_delta < 1:
            raise ValueError(
                f"SOLVER.EARLY_STOPPING: PATIENCE must not be negative and MIN_DELTA must be in [0, 1), "
                f"got {patience} and {min_delta}"
            )
        self.checkpointer = checkpointer
        self.patience = patience
        self.min_delta = min_delta
        self.metric = metric
        self.best = float("inf")  # of all evaluations, whose model is kept
        self.reference = float("inf")  # of the last good evaluation
        self.bad_evaluations = 0

    @property
    def stopped(self) -> bool:
        return 0 < self.patience <= self.bad_evaluations

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "reference": self.reference, "bad_evaluations": self.bad_evaluations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best = state["best"]
        self.reference = state["reference"]
        self.bad_evaluations = int(state["bad_evaluations"])

    def after_step(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self.metric, (None, None))
        if iteration != self.trainer.iter:
            return
        if value < self.reference * (1 - self.min_delta):
            self.reference = value
            self.bad_evaluations = 0
        else:
            self.bad_evaluations += 1
        if value < self.best:
            self.best = value
            self.checkpointer.save("model_best", iteration=iteration)
        if self.stopped:
            logger.info("stopping: %s has not fallen over %d evaluations", self.metric, self.bad_evaluations)
            self.trainer.max_iter = self.trainer.iter + 1  # the last iteration, as the other hooks now see it
            self.checkpointer.save("model_final", iteration=iteration)

    def before_step(self) -> None:
        # A run that had stopped and is resumed comes here too, before it takes another step.
        if self.stopped:
            self.trainer.max_iter = self.trainer.iter
            raise StopTraining


class StopOnSignal(HookBase):
    """On SIGINT and SIGTERM finish the iteration, save ``model_stopped.pth`` and exit; on a second one end at once.

    Raises SystemExit with status 128 + the signal's number, as shells have it, in all processes after the same
    iteration, whichever of them got the signal. In the last iteration, and after it, the run is saved and only its
    evaluation is left: then a signal does what it does elsewhere.

    A terminal or a scheduler signals all processes, and their launcher passes on what it gets: what comes within
    `ECHO_SECONDS` of the first signal is taken for the same one.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    ECHO_SECONDS = 1.0

    def __init__(self, checkpointer: DetectionCheckpointer) -> None:
        self.checkpointer = checkpointer
        self.received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def before_train(self) -> None:
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def after_train(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now - self._received_at > self.ECHO_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self._received_at = number, now
        logger.warning("%s: stopping after this iteration; once more stops at once", signal.Signals(number).name)

    def after_step(self) -> None:
        number = next((received for received in comm.all_gather(self.received) if received is not None), None)
        if number is None or self.trainer.iter + 1 >= self.trainer.max_iter:
            return
        self.checkpointer.save("model_stopped", iteration=self.trainer.iter)
        comm.synchronize()  # a process that exits lets the launcher end the others
        logger.warning("stopped after iteration %d; go on with --resume", self.trainer.iter)
        raise SystemExit(128 + number)
