"""Exponential moving average (EMA) of a model's weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Moving average of all floating-point parameters and buffers; other buffers are copied.

    After update number t, counted from 0, the decay is the smaller of `decay` and (1 + t) / (10 + t), so that the first
    weights are soon forgotten.

    Args:
        model: whose weights are averaged.
        decay: weight of the previous average, 0 to below 1.

    Raises:
        ValueError: for another decay.
    """

    def __init__(self, model: nn.Module, decay: float = 0.998) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected 0 to below 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the present weights of the model into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, values = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averages.append(self.weights[name])
                values.append(value)
            else:
                self.weights[name].copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside the context the model has the averaged weights, afterwards its own again."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.weights)
        try:
            yield model
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """What a checkpoint needs."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.updates = int(state["updates"])
        for name, value in self.weights.items():
            value.copy_(state["weights"][name])
