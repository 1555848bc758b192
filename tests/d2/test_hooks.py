"""The training hooks: validation loss, early stopping, losses that are not finite, signals, seeding."""

import contextlib
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import CallbackHook, EvalHook, PeriodicCheckpointer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from kg_detectron.d2.hooks import (
    EarlyStopping,
    FiniteLosses,
    Seeding,
    StopOnSignal,
    StopTraining,
    ValidationLoss,
    validation_losses,
)
from kg_detectron.training.sampler import EndlessSampler


class NoisyModel(nn.Module):
    """Like Detectron2's models: losses in training mode alone, random sampling, figures of its own in the storage."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(3, 1).eval()
        self.head = nn.Linear(3, 1)

    def forward(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        assert self.training, "losses come in training mode"
        get_event_storage().put_scalar("mask_rcnn/accuracy", random.random() + np.random.rand())
        features = self.drop(self.norm(torch.stack(batch)))
        sample = torch.rand(len(batch), 1)
        return {"a": (self.head(features) * sample).square().mean(), "b": self.frozen(features).square().mean()}


@pytest.fixture
def model() -> NoisyModel:
    torch.manual_seed(0)
    model = NoisyModel().train()
    model.frozen.eval()
    model.norm.running_mean.fill_(0.5)
    return model


def images(seed: int, number: int = 5) -> list[list[torch.Tensor]]:
    """Batches of one image each."""
    return [[image] for image in torch.randn(number, 3, generator=torch.Generator().manual_seed(seed))]


def states() -> tuple:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_nothing_changes(model):
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    first = validation_losses(model, images(1))
    torch.rand(3), np.random.rand(3)  # the training went on
    assert validation_losses(model, images(1)) == first
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_generators_stay(model):
    before = states()
    validation_losses(model, images(1))
    assert states() == before


def test_generators_and_modes_stay_after_an_error(model):
    before = states()
    with pytest.raises(TypeError):
        validation_losses(model, [None])
    assert states() == before and model.norm.training


def test_mean_over_images_in_the_statistics_of_testing(model):
    batches = [[torch.ones(3)], [torch.zeros(3), torch.ones(3) * 2]]  # of one image and of two
    with torch.no_grad():
        each = {
            value: model.frozen((torch.ones(3) * value - 0.5) / (1 + model.norm.eps) ** 0.5).item() ** 2
            for value in (0, 1, 2)
        }
    losses = validation_losses(model, batches)
    assert losses["b"] == pytest.approx(sum(each.values()) / 3, rel=1e-5)
    assert set(losses) == {"a", "b"}


def test_processes_are_averaged(model, monkeypatch):
    mine = validation_losses(model, images(1, 2))
    monkeypatch.setattr(comm, "all_gather", lambda share: [share, ({"a": 1.0, "b": 3.0}, 1)])
    both = validation_losses(model, images(1, 2))
    assert both["a"] == pytest.approx((2 * mine["a"] + 1) / 3)
    assert both["b"] == pytest.approx((2 * mine["b"] + 3) / 3)


def test_empty_validation_set(model):
    with pytest.raises(ValueError, match="no image"):
        validation_losses(model, [])


def train(model: nn.Module, hooks: list[HookBase], iterations: int, start: int = 0) -> SimpleTrainer:
    def endless():
        generator = torch.Generator().manual_seed(start)
        while True:
            yield list(torch.randn(4, 3, generator=generator))

    trainer = SimpleTrainer(model, endless(), torch.optim.SGD(model.parameters(), 0.1))
    trainer.register_hooks(hooks)
    with contextlib.suppress(StopTraining):
        trainer.train(start, iterations)
    return trainer


def test_training_goes_on_as_if_there_were_no_validation():
    weights = []
    for hooks in ([], [ValidationLoss(2, lambda: images(1))]):
        torch.manual_seed(3)
        model = NoisyModel()
        train(model, hooks, 6)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


class History(HookBase):
    """Notes what stands in the training's storage after each iteration."""

    def __init__(self):
        self.iterations: dict[str, list[int]] = {}
        self.values: dict[str, float] = {}
        self.finished_at: int | None = None

    def after_step(self):
        for name, (value, iteration) in self.trainer.storage.latest().items():
            if iteration == self.trainer.iter:
                self.iterations.setdefault(name, []).append(iteration)
                self.values[name] = value

    def after_train(self):
        self.finished_at = self.trainer.iter
        assert self.trainer.iter == self.trainer.max_iter


@pytest.mark.parametrize("period, expected", [(2, [1, 3, 5, 6]), (0, [6]), (7, [6])])
def test_validation_comes_every_period_and_at_the_end(model, period, expected):
    history = History()
    train(model, [ValidationLoss(period, lambda: images(1)), history], 7)
    for name in ("total_loss", "a", "b"):
        assert history.iterations[f"validation/{name}"] == expected
    values = history.values
    assert values["validation/total_loss"] == pytest.approx(values["validation/a"] + values["validation/b"])
    assert history.iterations["mask_rcnn/accuracy"] == list(range(7))  # the training's own


def test_loader_is_built_once_and_only_when_needed(model):
    built = []

    def build():
        built.append(1)
        return images(1)

    hook = ValidationLoss(2, build)
    assert not built
    train(model, [hook], 6)
    assert len(built) == 1


# Early stopping


class Scripted(HookBase):
    """Stands for the validation loss: a value every second iteration."""

    def __init__(self, values: list[float]):
        self.values = values

    def after_step(self):
        if self.trainer.iter % 2:
            self.trainer.storage.put_scalar("validation/total_loss", self.values[self.trainer.iter // 2])


def run(folder, values: list[float], *, iterations: int = 20, start: int = 0, resume: bool = False, **options):
    """-> (early stopping, history) after training to the end or until it stops."""
    torch.manual_seed(0)
    model = NoisyModel()
    checkpointer = DetectionCheckpointer(model, str(folder))
    stopping, history = EarlyStopping(checkpointer, **options), History()
    if resume:
        stopping.load_state_dict(torch.load(folder / "state.pth", weights_only=True)["hooks"]["EarlyStopping"])
    trainer = train(model, [Scripted(values), stopping, history], iterations, start)
    torch.save(trainer.state_dict(), folder / "state.pth")
    return stopping, history


def saved_iteration(folder, name: str) -> int:
    return torch.load(folder / f"{name}.pth", weights_only=True)["iteration"]


def test_stops_after_patience_and_keeps_the_best(tmp_path):
    values = [5.0, 3.0, 4.0, 3.5, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    stopping, history = run(tmp_path, values, patience=3)
    # Evaluations end iterations 1, 3, 5, ...; the third without a fall, of 9.0, is the fifth.
    assert history.finished_at == 10
    assert stopping.best == 3.0
    assert saved_iteration(tmp_path, "model_best") == 3
    assert saved_iteration(tmp_path, "model_final") == 9


def test_small_falls_do_not_count_but_are_kept(tmp_path):
    values = [10.0, 9.95, 9.9, 9.85, 9.0, 8.95, 8.9, 8.85, 8.8, 8.75]
    stopping, history = run(tmp_path, values, patience=4, min_delta=0.02)
    # Three bad ones; 9.0 is more than 2 % below 10.0; three bad ones; 8.8 is more than 2 % below 9.0; a bad one.
    assert history.finished_at == 20
    assert stopping.best == 8.75 and saved_iteration(tmp_path, "model_best") == 19
    stopping, history = run(tmp_path, values, patience=3, min_delta=0.02)
    assert history.finished_at == 8
    assert stopping.best == 9.85 and saved_iteration(tmp_path, "model_best") == 7


def test_many_small_falls_add_up(tmp_path):
    values = [10.0 - 0.15 * n for n in range(10)]
    _, history = run(tmp_path, values, patience=2, min_delta=0.02)
    assert history.finished_at == 20


@pytest.mark.parametrize("patience, finished_at", [(0, 20), (2, 6)])
def test_patience_zero_never_stops(tmp_path, patience, finished_at):
    stopping, history = run(tmp_path, [1.0] + [float("nan")] * 9, patience=patience)
    assert history.finished_at == finished_at
    assert stopping.best == 1.0 and saved_iteration(tmp_path, "model_best") == 1


def test_state_survives_resuming(tmp_path):
    values = [5.0, 3.0, 4.0, 3.5, 9.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    stopping, _ = run(tmp_path, values, iterations=6, patience=3)
    assert stopping.state_dict() == {"best": 3.0, "reference": 3.0, "bad_evaluations": 1}
    stopping, history = run(tmp_path, values, start=6, resume=True, patience=3)
    assert history.finished_at == 10  # as without the interruption
    assert saved_iteration(tmp_path, "model_best") == 3
    _, history = run(tmp_path, values, start=10, resume=True, patience=3)
    assert history.finished_at == 10 and not history.iterations  # stopped stays stopped


def test_the_last_evaluation_comes_once(tmp_path):
    torch.manual_seed(0)
    model, evaluated = NoisyModel(), []
    stopping = EarlyStopping(DetectionCheckpointer(model, str(tmp_path)), patience=3)
    hooks = [Scripted([5.0, 3.0, 4.0, 3.5, 9.0, 9.0]), stopping]
    trainer = train(model, [*hooks, EvalHook(2, lambda: evaluated.append(stopping.trainer.iter))], 12)
    assert evaluated == [1, 3, 5, 7, 10]  # the last one after the training
    assert trainer.iter == 10


def test_no_evaluation_no_decision(tmp_path):
    _, history = run(tmp_path, [], iterations=1, patience=1)
    assert history.finished_at == 1 and not (tmp_path / "model_best.pth").exists()


@pytest.mark.parametrize("options", [{"patience": -1}, {"min_delta": 1.0}, {"min_delta": -0.1}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"SOLVER\.EARLY_STOPPING"):
        EarlyStopping(None, **options)


# Losses that are not finite


class BrokenModel(nn.Module):
    """Its loss ``b`` is the given value from the fourth call on."""

    def __init__(self, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.value = value
        self.calls = 0

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"a": self.weight, "b": self.weight * (self.value if self.calls > 3 else 2.0)}


def named_batches(count: int):
    yield from ([{"file_name": f"{n}_{k}.png"} for k in "xy"] for n in range(count))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_loss_names_itself_and_the_images(tmp_path, value):
    model = BrokenModel(value)
    trainer = SimpleTrainer(model, named_batches(9), torch.optim.SGD(model.parameters(), 0.1))
    after = []
    checkpointer = DetectionCheckpointer(model, str(tmp_path))
    trainer.register_hooks([FiniteLosses(), CallbackHook(after_step=lambda trainer: after.append(model.weight.item()))])
    trainer.register_hooks([PeriodicCheckpointer(checkpointer, 1)])
    with pytest.raises(FloatingPointError, match=rf"iteration 3: b is {value}, on the images 3_x\.png, 3_y\.png"):
        trainer.train(0, 9)
    assert model.weight.item() == after[-1] and len(after) == 3
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000002.pth")


def test_only_losses_of_the_training_stop_it():
    """A validation loss that is not finite is no fall; early stopping takes care of it."""
    model = BrokenModel(1.0)
    trainer = SimpleTrainer(model, named_batches(9), torch.optim.SGD(model.parameters(), 0.0))

    def validate(trainer):
        model.value = float("nan")
        assert np.isnan(validation_losses(model, named_batches(4))["b"])
        model.value = 1.0

    trainer.register_hooks([FiniteLosses(), CallbackHook(after_step=validate)])
    trainer.train(0, 5)


# Signals


def signalled(folder, number: int, iteration: int, iterations: int = 6) -> tuple[list[int], int | None]:
    """-> (iterations that were done, exit status) of a training that gets a signal in an iteration."""
    torch.manual_seed(0)
    model, done = NoisyModel(), []

    def step(trainer):
        done.append(trainer.iter)
        if trainer.iter == iteration:
            signal.raise_signal(number)

    hooks = [CallbackHook(after_step=step), StopOnSignal(DetectionCheckpointer(model, str(folder)))]
    try:
        train(model, hooks, iterations)
    except SystemExit as exit:
        return done, exit.code
    return done, None


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_iteration_and_saves(tmp_path, number, status):
    handlers = [signal.getsignal(each) for each in StopOnSignal.SIGNALS]
    assert signalled(tmp_path, number, iteration=2) == ([0, 1, 2], status)
    assert saved_iteration(tmp_path, "model_stopped") == 2
    assert [signal.getsignal(each) for each in StopOnSignal.SIGNALS] == handlers


def test_signal_in_the_last_iteration_lets_the_training_end(tmp_path):
    assert signalled(tmp_path, signal.SIGTERM, iteration=5) == ([0, 1, 2, 3, 4, 5], None)


def test_signal_of_another_process_stops_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, signal.SIGTERM])
    assert signalled(tmp_path, signal.SIGTERM, iteration=-1) == ([0], 143)


def test_second_signal_ends_at_once(tmp_path):
    child = os.fork()
    if child == 0:
        StopOnSignal.ECHO_SECONDS = 0.05

        def twice(trainer):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)
            signal.raise_signal(signal.SIGINT)
            (tmp_path / "went on").touch()

        train(NoisyModel(), [CallbackHook(before_step=twice), StopOnSignal(None)], 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT
    assert not (tmp_path / "went on").exists()


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path):
    """As of a terminal, which signals all processes, and of a launcher, which passes the signal on."""
    again = CallbackHook(after_step=lambda trainer: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="143"):
        train(
            NoisyModel(),
            [CallbackHook(before_step=lambda trainer: signal.raise_signal(signal.SIGTERM)), again]
            + [StopOnSignal(DetectionCheckpointer(NoisyModel(), str(tmp_path)))],
            3,
        )
    assert saved_iteration(tmp_path, "model_stopped") == 0


# Seeding


def test_a_resumed_run_keeps_its_seed_and_its_place():
    hooks = [Seeding(EndlessSampler(10, seed), batch_size=4) for seed in (1, 2)]
    states = []
    recorder = CallbackHook(after_step=lambda trainer: states.append(hooks[0].state_dict()))
    train(NoisyModel(), [hooks[0], recorder], 5, start=2)
    assert [state["samples"] for state in states] == [4, 8, 12]
    hooks[1].load_state_dict(states[-1])
    assert (hooks[1].sampler.seed, hooks[1].sampler.start) == (1, 12)
    train(NoisyModel(), [hooks[1], CallbackHook(after_step=lambda trainer: states.append(hooks[1].state_dict()))], 6, 5)
    assert states[-1] == {"seed": 1, "samples": 16}


def test_iterations_do_not_hand_on_random_numbers():
    """What one iteration draws more than another run's does not reach the next."""
    draws = []
    for more in (0, 3):
        drawn = []

        def draw(trainer, drawn=drawn, more=more):
            drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
            torch.rand(more), np.random.rand(more), [random.random() for _ in range(more)]

        train(NoisyModel(), [Seeding(EndlessSampler(3, 0), 1), CallbackHook(after_step=draw)], 4)
        draws.append(drawn)
    assert draws[0] == draws[1] and len(set(draws[0])) == 4
