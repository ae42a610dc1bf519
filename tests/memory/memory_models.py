"""Tiny transformers with a LoRA whose delta is not zero, and what a training step computes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ltx2_tiny import tiny_config, tiny_inputs, tiny_model
from torch import Tensor, nn

from musubi_tuner.common.av import AV
from musubi_tuner.models.ltx2.quantize import is_target
from musubi_tuner.models.ltx2.transformer import LTX2Transformer
from musubi_tuner.networks.adapter_network import AdapterNetwork
from musubi_tuner.networks.lora_ltx2 import create_network
from musubi_tuner.quantization.linear import pack_linear
from musubi_tuner.quantization.packed import Method

CPU = torch.device("cpu")


@dataclass
class Subject:
    """A model under test."""

    model: LTX2Transformer
    network: AdapterNetwork
    inputs: AV

    @property
    def blocks(self) -> list[torch.nn.Module]:
        return list(self.model.transformer_blocks)

    def outputs(self) -> list[Tensor]:
        with torch.no_grad():
            return [x for _, x in self.model(self.inputs).items()]

    def step(self) -> list[Tensor]:
        """Outputs, and the gradients of every LoRA parameter."""
        self.network.zero_grad()
        out = [x for _, x in self.model(self.inputs).items()]
        sum(x.square().sum() for x in out).backward()
        return [x.detach() for x in out] + [p.grad.clone() for p in self.network.parameters()]


def subject(
    layers: int = 6,
    *,
    mode: str = "av",
    version: str = "2.3",
    prepare: Callable[[LTX2Transformer], Any] = lambda model: None,
    tokens: int = 6,
    create: Callable[..., AdapterNetwork] = create_network,
    **network: Any,
) -> Subject:
    """``prepare`` may change the model before its network is made, by ``create``."""
    config = tiny_config(version, num_layers=layers)
    model = tiny_model(config, mode)
    prepare(model)
    torch.manual_seed(0)
    adapter = create(1.0, 4, 4, model, lora_target_preset="full", **network)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.2)
    adapter.apply_to(model)
    inputs = tiny_inputs(config, per_token=True, video_tokens=tokens, audio_tokens=tokens - 1)
    if mode != "av":
        inputs = AV(**{mode: inputs[mode]})
    return Subject(model, adapter, inputs)


def quantised_to(method: Method) -> Callable[[LTX2Transformer], None]:
    """For ``prepare``: what quantising while loading makes of a model."""

    def prepare(model: LTX2Transformer) -> None:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and is_target(f"{name}.weight") and method.fits(layer.weight.shape):
                pack_linear(model, name, method.quantize(layer.weight))

    return prepare


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class LateTransfer:
    """Copies as late as a GPU might: when something waits for them, and then all that were started before.

    Attributes:
        copied: bytes of each copy that was started.
    """

    def __init__(self) -> None:
        self.copied: list[int] = []
        self._queue: list[tuple[Tensor, Tensor]] = []
        self._done = 0

    def copy(self, target: Tensor, source: Tensor) -> int:
        self.copied.append(source.numel() * source.element_size())
        self._queue.append((target, source))
        return len(self._queue)

    def wait(self, ticket: int) -> None:
        for target, source in self._queue[self._done : ticket]:
            target.copy_(source)
        self._done = max(self._done, ticket)

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def finish(self) -> None:
        self.wait(len(self._queue))


class EagerTransfer(LateTransfer):
    """Copies as early as possible: at once."""

    def copy(self, target: Tensor, source: Tensor) -> int:
        ticket = super().copy(target, source)
        self.finish()
        return ticket
