"""The moving average, the schedule, checkpoints, and the fast convolutions."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from kg_detectron.training import CosineSchedule, WeightAverage, load_checkpoint, save_checkpoint


def test_the_average_follows_the_formula() -> None:
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))
    average = WeightAverage(net, 0.5)
    expected = net[0].weight.detach().clone()
    for t, value in enumerate((1.0, 2.0, 4.0)):
        nn.init.constant_(net[0].weight, value)
        net[1].num_batches_tracked += 1
        average.update(net)
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(average.weights["0.weight"], expected)
    assert average.weights["1.num_batches_tracked"] == 3


def test_the_average_is_applied_and_taken_back() -> None:
    net = nn.Linear(2, 2)
    average = WeightAverage(net, 0.9)
    nn.init.constant_(net.weight, 5.0)
    with average.applied(net):
        assert torch.equal(net.weight, average.weights["weight"])
    assert (net.weight == 5).all()
    other = WeightAverage(nn.Linear(2, 2), 0.9)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.weights["weight"], average.weights["weight"])


def test_wrong_decay() -> None:
    with pytest.raises(ValueError, match="decay"):
        WeightAverage(nn.Linear(1, 1), 1.0)


def test_the_schedule_warms_up_and_ends_low() -> None:
    schedule = CosineSchedule(warmup=10, final=0.02)
    assert schedule(0, 0) == pytest.approx(0.1)
    assert schedule(9, 0) == pytest.approx(1)
    assert schedule(100, 0.5) == pytest.approx(0.51)
    assert schedule(200, 1) == schedule(300, 1.2) == pytest.approx(0.02)
    values = [schedule(50, i / 20) for i in range(21)]
    assert values == sorted(values, reverse=True)


def test_the_warm_up_takes_a_small_share_of_a_short_run() -> None:
    schedule = CosineSchedule(warmup=100, warmup_share=0.05)
    for iterations in (40, 150):
        factors = [schedule(i, i / iterations) for i in range(iterations)]
        assert factors[0] == pytest.approx(0.01)
        assert factors.index(max(factors)) == pytest.approx(0.05 * iterations, abs=1)
        assert max(factors) > 0.98
    long = [schedule(i, i / 10000) for i in range(10000)]
    assert long.index(max(long)) == 99


def test_checkpoints_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "checkpoint.pth"
    save_checkpoint(file, {"model": {"w": torch.ones(2)}, "iteration": 3})
    with pytest.raises(FloatingPointError, match="w"):
        save_checkpoint(file, {"model": {"w": torch.tensor([math.nan])}})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="space"):
        save_checkpoint(file, {"model": {"w": torch.zeros(2)}, "iteration": 4})
    assert load_checkpoint(file)["iteration"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
