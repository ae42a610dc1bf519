"""Two ways of saving memory together, against the plain model; which pairs are refused is on a page of the docs."""

from __future__ import annotations

import ast
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from unittest import mock

import pytest
import torch
from memory_models import CPU, quantised_to, subject
from memory_pairs import PAGE, PAIRS, REFUSED, Technique, given, page, parsed, refusals, said_of, share_a_value
from torch import Tensor
from torch.nn import Parameter

from musubi_tuner.assembly.quantization import quantization_settings
from musubi_tuner.assembly.transformer import attach_to_blocks
from musubi_tuner.config import rules_memory
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.memory.activation_offload import ActivationOffload
from musubi_tuner.networks.resolve import resolve_network_module
from musubi_tuner.training import distributed
from musubi_tuner.training.fused_backward import FusedBackward
from musubi_tuner.training.optimizers import create_optimizer
from musubi_tuner.training.weights import WeightAverage

Pair = tuple[Technique, ...]
DECAY = 0.9


@dataclass
class Trained:
    """What the steps found; each list has an entry a step."""

    start: list[Tensor]
    losses: list[Tensor] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)
    average: list[Tensor] | None = None


def train(techniques: Pair, *, steps: int = 2) -> Trained:
    """Train a tiny model with what the flags ask for, by the functions that a run uses."""
    config = parsed(techniques).config
    quantization = quantization_settings(config.quantization, CPU)
    prepare = quantised_to(quantization.method) if quantization else lambda model: None
    create = resolve_network_module(config.network.network_module).create_network
    options = dict(option.split("=") for option in config.network.network_args)
    made = subject(3, tokens=11, prepare=prepare, create=create, **options)
    attach_to_blocks(made.model, config.memory.settings, config.compilation.settings, device=CPU)
    parameters, gradients = list(made.network.parameters()), {}
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.__setitem__(p, p.grad.clone()))
    optimizer = optimizer_of(config, parameters)
    fused = FusedBackward(optimizer) if config.optimizer.fused_backward_pass else None
    average = None if config.network.ema_decay is None else WeightAverage(made.network, config.network.ema_decay)
    found = Trained([p.detach().clone() for p in parameters])
    for step in range(steps):
        found.losses.append(backward(made, config.optimizer.gradient_accumulation_steps, fused))
        with processes(max(t.processes for t in techniques) if techniques else 1):
            distributed.average_gradients(parameters)
        if fused:
            fused.end_step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average(step + 1)
        found.gradients.append([gradients[p] for p in parameters])
        found.weights.append([p.detach().clone() for p in parameters])
    found.average = None if average is None else list(average.state_dict().values())
    return found


def backward(made, accumulation: int, fused: FusedBackward | None) -> Tensor:
    whole = torch.zeros(())
    for _ in range(accumulation):
        loss = sum(x.square().mean() for _, x in made.model(made.inputs).items()) / accumulation
        (fused or loss).backward(*([loss] if fused else []))
        whole = whole + loss.detach()
    return whole


def optimizer_of(config: TrainNetworkConfig, parameters: list[Parameter]) -> torch.optim.Optimizer:
    name = config.optimizer.optimizer_type
    groups = [{"params": parameters, "lr": 1e-2, "label": "unet"}]
    return create_optimizer(name, groups, ["min_8bit_size=16"] if name.endswith("8bit") else [])


def processes(count: int) -> AbstractContextManager:
    """So many processes, of which all have the same gradients."""
    if count == 1:
        return nullcontext()
    calls = {"is_initialized": lambda: True, "get_world_size": lambda: count}
    return mock.patch.multiple(distributed.dist, **calls, all_reduce=lambda tensor, op=None: tensor.mul_(count))


@pytest.fixture(autouse=True)
def _small_inputs_are_offloaded_too():
    with mock.patch.dict(ActivationOffload.__init__.__kwdefaults__, min_bytes=0):
        yield


@cache
def reference(changes: Pair) -> Trained:
    return train(changes)


def cases(*, compiled: bool) -> list:
    works = [p for p in PAIRS if not share_a_value(*p) and not refusals(p)]
    chosen = [p for p in works if compiled == any(t.name == "compile" for t in p)]
    return [pytest.param(pair, id=" + ".join(t.name for t in pair)) for pair in chosen]


def assert_the_same_training(pair: Pair) -> None:
    rounds = any(t.rounds for t in pair)
    # After the first step AdamW's weights have moved by the rate, however small and inexact their gradients are.
    found, expected = train(pair, steps=1 if rounds else 2), reference(tuple(t for t in pair if t.changes))
    bound = {"rtol": 1e-5, "atol": 1e-6} if rounds else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found.losses[0], expected.losses[0], **bound)
    for ours, theirs in zip(found.gradients[0], expected.gradients[0], strict=True):
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * largest if rounds else 0)
    if rounds:
        return
    assert found.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(found.weights[-1], expected.weights[-1], strict=True))
    if found.average is not None:
        for start, first, second, average in zip(found.start, *found.weights, found.average, strict=True):
            by_hand = DECAY * (DECAY * start + (1 - DECAY) * first) + (1 - DECAY) * second
            torch.testing.assert_close(average, by_hand)


@pytest.mark.parametrize("pair", cases(compiled=False))
def test_a_pair_trains_as_the_plain_model(pair: Pair):
    assert_the_same_training(pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", cases(compiled=True))
def test_a_pair_with_compiled_blocks_trains_as_the_plain_model(pair: Pair):
    torch._dynamo.reset()
    assert_the_same_training(pair)
    torch._dynamo.reset()


def with_another_optimizer() -> list:
    pairs = [p for p in cases(compiled=False) if all(t.changes for t in p.values[0])]
    return [p for p in pairs if "--optimizer_type" in p.values[0][1].flags]


@pytest.mark.parametrize("pair", with_another_optimizer())
def test_optimizers_get_the_gradients_of_the_base_or_network(pair: Pair):
    """Both change what is trained: the optimizer alone, given the gradients of the base alone, makes the same step."""
    base, optimizer = pair
    found, expected = reference(pair), reference((base,))
    assert all(torch.equal(a, b) for a, b in zip(found.gradients[0], expected.gradients[0], strict=True))
    parameters = [Parameter(value.clone()) for value in expected.start]
    for parameter, gradient in zip(parameters, expected.gradients[0], strict=True):
        parameter.grad = gradient.clone()
    optimizer_of(parsed((optimizer,)).config, parameters).step()
    assert all(torch.equal(a, b) for a, b in zip(found.weights[0], parameters, strict=True))


@pytest.mark.parametrize("name", ["FP8", "int8", "NF4"])
def test_a_quantised_base_is_another_within_bounds(name: str):
    """An error of weights of 3 % (FP8), 1 % (int8) and 9 % (NF4) leaves gradients that point the same way."""
    technique = next(t for p in PAIRS for t in p if t.name == name)
    found, plain = reference((technique,)), reference(())
    bound = {"FP8": 0.02, "int8": 0.005, "NF4": 0.06}[name]
    assert 0 < (found.losses[0] / plain.losses[0] - 1).abs() < bound
    ours, theirs = (torch.cat([g.flatten() for g in t.gradients[0]]) for t in (found, plain))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 1 - bound


def test_the_page_is_what_the_rules_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/memory/memory_pairs.py"


def printed_by(function: ast.FunctionDef) -> list[str]:
    """Patterns of the messages that a function of rules yields."""
    yielded = [n.value for n in ast.walk(function) if isinstance(n, ast.Yield)]
    yielded += [n.value.elt for n in ast.walk(function) if isinstance(n, ast.YieldFrom) and hasattr(n.value, "elt")]
    parts = [n.values if isinstance(n, ast.JoinedStr) else [n] for n in yielded]
    return ["".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".*" for p in text) for text in parts]


def test_the_page_has_every_rule_of_memory():
    """So a rule that is added later is added to the page."""
    rules = ast.parse(Path(rules_memory.__file__).read_text(encoding="utf-8"))
    patterns = [p for node in rules.body if isinstance(node, ast.FunctionDef) for p in printed_by(node)]
    said = re.findall(r"`([^`]*)`", PAGE.read_text(encoding="utf-8"))
    missing = [pattern for pattern in patterns if not any(re.fullmatch(pattern, text) for text in said)]
    assert len(patterns) > 25
    assert not missing


@pytest.mark.parametrize("flags", REFUSED)
def test_what_the_page_calls_refused_is_refused_for_one_reason(flags: str):
    assert len(said_of(given(flags))) == 1


def test_the_rules_refuse_what_cannot_be():
    """Without them the page would list pairs that work only on paper."""
    refused = {frozenset(t.name for t in p) for p in PAIRS if refusals(p) and not share_a_value(*p)}
    assert refused == {
        frozenset(names)
        for names in (
            *combinations(("FP8", "int8", "NF4"), 2),
            ("fused backward", "accumulation"),
            ("fused backward", "2 processes"),
        )
    }
