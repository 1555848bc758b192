"""The training loop: exact resume, budgets, signals, failures."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kg_detectron.training import CosineSchedule, EndlessSampler, LoopSettings, Sample, Trainer, WeightAverage
from kg_detectron.training.seeds import generator_of_sample


class Numbers(torch.utils.data.Dataset):
    """A random image of each sample, and its mean as target."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        image = torch.from_numpy(generator_of_sample(sample.seed, sample.position).random((3, 4, 4))).float()
        return image + sample.index, {"mean": image.mean()}


class Net(nn.Module):
    """Dropout takes random numbers, batch normalisation has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Conv2d(4, 1, 2))

    def loss(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        wanted = torch.stack([target["mean"] for target in targets])
        return {"loss_mean": (self.layers(torch.stack(images)).flatten() - wanted).square().mean()}


def make_trainer(folder: Path, **settings: object) -> Trainer:
    torch.manual_seed(0)
    net = Net()
    options = {"batch_size": 2, "seed": 5, "log_period": 2} | settings
    return Trainer(
        net,
        net.loss,
        torch.optim.AdamW(net.parameters(), 0.01),
        Numbers(),
        EndlessSampler(7, 5),
        folder,
        LoopSettings(**options),
        CosineSchedule(warmup=3),
        WeightAverage(net, 0.9),
    )


def assert_equal(left: object, right: object) -> None:
    """Bitwise equality of nested states."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", iterations=12)
    assert whole.train()

    first = make_trainer(tmp_path / "parts", iterations=12)

    def stop_after_five(trainer: Trainer) -> None:
        trainer.stop_requested = trainer.iteration == 5

    assert not first.train(stop_after_five)
    second = make_trainer(tmp_path / "parts", iterations=12)
    torch.rand(3)  # the state of the generators must not matter
    assert second.resume()
    assert second.iteration == 5
    assert second.train()
    assert_equal(whole.model.state_dict(), second.model.state_dict())
    assert_equal(whole.optimizer.state_dict(), second.optimizer.state_dict())
    assert_equal(whole.average.state_dict(), second.average.state_dict())


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert not make_trainer(tmp_path, iterations=1).resume()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    trainer = make_trainer(tmp_path, iterations=1000)
    before = signal.getsignal(number)
    assert not trainer.train(lambda t: os.kill(os.getpid(), number) if t.iteration == 3 else None)
    assert signal.getsignal(number) is before
    assert trainer.iteration <= 5
    other = make_trainer(tmp_path, iterations=1000)
    assert other.resume()
    assert other.iteration == trainer.iteration


def test_a_budget_of_time_ends_the_run_and_its_schedule(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, minutes=1.0 / 60)
    assert trainer.train()
    assert 1 <= trainer.seconds < 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["lr"] < 0.001
    assert [line["iteration"] for line in lines] == sorted(line["iteration"] for line in lines)
    assert {"loss_mean", "loss", "gradient_norm", "minutes", "progress"} <= lines[-1].keys()


def test_one_budget_is_needed() -> None:
    with pytest.raises(ValueError, match="budget"):
        LoopSettings()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, iterations=10)
    trainer.train()
    kept = trainer.checkpoint_file.read_bytes()
    broken = make_trainer(tmp_path, iterations=10)
    broken.losses = lambda images, targets: {"loss_mean": sum(p.sum() for p in broken.model.parameters()) * torch.nan}
    with pytest.raises(FloatingPointError, match="iteration 0"):
        broken.train()
    assert trainer.checkpoint_file.read_bytes() == kept
