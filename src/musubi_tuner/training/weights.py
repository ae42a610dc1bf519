"""What acts on the trained weights between optimizer steps: max-norm, and a running average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.networks.adapter_network import AdapterNetwork

# Called after each optimizer step with the number of steps so far; returns numbers to log by their full names.
WeightAction = Callable[[int], Mapping[str, float]]


class MaxNorm:
    """Keeps the norm of every delta at or below a limit (``--scale_weight_norms``)."""

    def __init__(self, network: AdapterNetwork, limit: float) -> None:
        self._network, self._limit = network, limit

    def __call__(self, step: int) -> dict[str, float]:
        device = next(self._network.parameters()).device
        scaled, mean, largest = self._network.apply_max_norm_regularization(self._limit, device)
        return {
            "max_norm/keys_scaled": float(scaled),
            "max_norm/average_key_norm": mean,
            "max_norm/max_key_norm": largest,
        }


class WeightAverage:
    """Exponential moving average of the network's parameters, in float32 (``--ema_decay``).

    It starts at the network's weights; every ``every`` steps ``average = decay * average + (1 - decay) * weights``.
    """

    def __init__(self, network: torch.nn.Module, decay: float, every: int = 1) -> None:
        self._decay, self._every = decay, every
        self._parameters = dict(network.named_parameters())
        self._average = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        if step % self._every == 0:
            for name, average in self._average.items():
                average.lerp_(self._parameters[name].float(), 1 - self._decay)
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter names."""
        return dict(self._average)

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Put a saved average back.

        Raises:
            UserError: it belongs to a network of other parameters.
        """
        if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in self._average.items()}:
            raise UserError("the state's average of the weights is of another network; use the same network flags")
        for name, average in self._average.items():
            average.copy_(saved[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run a block with the average as the network's weights, in float32; those in training are back after it."""
        kept = {name: p.data for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self._average[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = kept[name]
