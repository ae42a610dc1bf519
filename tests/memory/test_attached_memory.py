"""Checkpointing, offloaded inputs, and layers computed in parts, against the plain model."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from memory_models import CPU, EagerTransfer, LateTransfer, assert_same, subject
from torch.utils import _python_dispatch

from musubi_tuner.assembly.transformer import attach_to_blocks
from musubi_tuner.config.memory import CompileSettings, MemorySettings
from musubi_tuner.memory.activation_offload import ActivationOffload
from musubi_tuner.memory.checkpointing import checkpoint_blocks, checkpointed_positions
from musubi_tuner.memory.chunking import chunk_feed_forward, split_attention

LAYERS = 4


def recomputations(made, step) -> list[int]:
    """How often a layer of each block computes in a step."""
    counts = [0] * LAYERS
    hooks = []
    for position, block in enumerate(made.blocks):

        def count(*_, position=position):
            counts[position] += 1

        hooks.append(block.attn1.to_out[0].register_forward_hook(count))
    step()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize(("count", "expected"), [(None, [2] * 4), (3, [2, 2, 2, 1]), (0, [1] * 4)])
def test_the_first_blocks_are_recomputed(count, expected):
    made = subject(LAYERS)
    plain = made.step()
    checkpoint_blocks([made.blocks[i] for i in checkpointed_positions(LAYERS, count)])
    assert recomputations(made, lambda: assert_same(made.step(), plain)) == expected


@pytest.mark.parametrize("transfer", [EagerTransfer, LateTransfer])
def test_inputs_of_blocks_are_kept_on_the_host(transfer):
    made = subject(LAYERS)
    expected = made.step()
    engine = transfer()
    checkpoint_blocks(made.blocks, offload=ActivationOffload(CPU, engine, min_bytes=0))
    for _ in range(2):
        engine.copied.clear()
        assert_same(made.step(), expected)
        # Both streams of all blocks but the last, there and back.
        assert len(engine.copied) == 2 * 2 * (LAYERS - 1)


def test_small_inputs_stay():
    made = subject(LAYERS)
    engine = EagerTransfer()
    checkpoint_blocks(made.blocks, offload=ActivationOffload(CPU, engine))
    made.step()
    assert engine.copied == []


def test_host_memory_is_used_again():
    made = subject(LAYERS)
    engine = EagerTransfer()
    buffers = []
    engine.host_buffer = lambda nbytes: buffers.append(nbytes) or torch.empty(nbytes, dtype=torch.uint8)
    checkpoint_blocks(made.blocks, offload=ActivationOffload(CPU, engine, min_bytes=0))
    for _ in range(3):
        made.step()
        gc.collect()
    assert len(buffers) == 2 * (LAYERS - 1)


def test_a_kept_graph_finds_its_inputs_again():
    def twice(made):
        made.network.zero_grad()
        loss = sum(x.square().sum() for _, x in made.model(made.inputs).items())
        loss.backward(retain_graph=True)
        made.model(made.inputs)  # would take host memory that was given back too early
        loss.backward()
        return [p.grad for p in made.network.parameters()]

    expected = twice(subject(LAYERS))
    made = subject(LAYERS)
    checkpoint_blocks(made.blocks, offload=ActivationOffload(CPU, EagerTransfer(), min_bytes=0))
    assert_same(twice(made), expected)


def close(ours, expected) -> None:
    """Of the largest value 1e-6 in outputs (three dimensions), and 1e-5 in gradients, which are sums of many terms."""
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= (1e-6 if b.ndim == 3 else 1e-5) * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("target", ["all", "video", "audio"])
def test_feed_forward_in_parts(target, checkpointed):
    made = subject(LAYERS, tokens=11)
    expected = made.step()
    rows = []
    names = {"all": ("ff", "audio_ff"), "video": ("ff",), "audio": ("audio_ff",)}[target]
    for name in names:
        getattr(made.blocks[0], name).net[2].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    chunk_feed_forward(made.blocks, target, 4)
    if checkpointed:
        checkpoint_blocks(made.blocks)
    close(made.step(), expected)
    assert set(rows) <= {4, 3, 2}, "11 video tokens are 4, 4, 3 and 10 audio tokens 4, 4, 2"
    assert (3 in rows, 2 in rows) == ("ff" in names, "audio_ff" in names)


TARGETS = {
    "self": {"attn1", "audio_attn1"},
    "text_cross": {"attn2", "audio_attn2"},
    "av_cross": {"audio_to_video_attn", "video_to_audio_attn"},
    "cross": {"attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"},
    "video": {"attn1", "attn2"},
    "audio": {"audio_attn1", "audio_attn2"},
    "all": {"attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"},
}


def masked(made):
    """Masks of every shape: of the text, and of queries by keys in one stream."""
    generator = torch.Generator().manual_seed(3)

    def add(name, stream):
        tokens = stream.tokens.shape[1]
        weights = torch.rand(2, tokens, tokens, generator=generator)
        text = torch.ones(2, stream.context.shape[1], dtype=torch.bool)
        text[1, 4:] = False
        return replace(stream, context_mask=text, attention_mask=weights if name == "video" else None)

    made.inputs = made.inputs.map_named(add)
    return made


@pytest.mark.parametrize("mode", ["batch", "query"])
@pytest.mark.parametrize("target", TARGETS)
def test_attention_in_parts(target, mode):
    made = masked(subject(LAYERS, tokens=11))
    expected = made.step()
    plain = [layer.attention_function for layer in made.blocks[0].children() if hasattr(layer, "attention_function")]
    split_attention(made.blocks, target, mode, 4)
    changed = {
        name
        for name, layer in made.blocks[0].named_children()
        if hasattr(layer, "attention_function") and layer.attention_function is not plain[0]
    }
    assert changed == TARGETS[target]
    close(made.step(), expected)


@pytest.mark.parametrize(("mode", "shape"), [("batch", (1, 11)), ("query", (2, 4))])
def test_a_part_is_as_large_as_asked_for(mode, shape):
    made = subject(LAYERS, tokens=11)
    seen = set()
    layer = made.blocks[0].attn1
    kernel = layer.attention_function

    def watch(q, k, v, mask):
        seen.add((q.shape[:2], k.shape[:2]))
        return kernel(q, k, v, mask)

    layer.attention_function = watch
    split_attention(made.blocks, "self", mode, 4)
    made.step()
    assert max(q[0] for q, _ in seen) == shape[0]
    assert max(q[1] for q, _ in seen) == shape[1]
    assert {k[1] for _, k in seen} == {11}


class LargestTensor(_python_dispatch.TorchDispatchMode):
    """Elements of the largest result of any operation."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_the_wide_activation_never_exists_whole():
    made = subject(2, mode="video", tokens=64)
    width = made.model.config.width
    with LargestTensor() as whole:
        made.step()
    chunk_feed_forward(made.blocks, "video", 8)
    with LargestTensor() as parts:
        made.step()
    assert whole.largest == 2 * 64 * 4 * width
    assert parts.largest < whole.largest


COMBINATIONS = {
    "everything": MemorySettings(
        split_attention="all",
        split_mode="query",
        split_queries=4,
        chunk_feed_forward="all",
        chunk_tokens=4,
        blocks_to_swap=3,
        checkpointing=True,
        offload_inputs=True,
    ),
    "partly checkpointed": MemorySettings(
        chunk_feed_forward="all", chunk_tokens=4, blocks_to_swap=3, checkpointing=True, blocks_to_checkpoint=2
    ),
    "not checkpointed": MemorySettings(
        split_attention="self", chunk_feed_forward="video", chunk_tokens=4, blocks_to_swap=2
    ),
}


@pytest.mark.parametrize("settings", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("dropout", [None, 0.3])
def test_combinations(settings, dropout):
    """In this order parts, swap and checkpointing fit into each other; dropout is drawn again as it was."""

    def run(memory):
        made = subject(LAYERS, tokens=11, dropout=dropout)
        attach_to_blocks(made.model, memory, None, device=CPU, draws=bool(dropout))
        torch.manual_seed(1)
        return made.step()

    # Dropout is drawn part by part, so that only runs with the same parts draw the same.
    plain = replace(settings, blocks_to_swap=0, checkpointing=False, offload_inputs=False)
    close(run(settings), run(plain if dropout else MemorySettings()))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_with_compiled_blocks(name):
    torch._dynamo.reset()
    made = subject(LAYERS, tokens=11)
    attach_to_blocks(made.model, COMBINATIONS[name], CompileSettings("aot_eager"), device=CPU)
    expected = subject(LAYERS, tokens=11).step()
    for a, b in zip(made.step(), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


def test_one_stream_alone():
    settings = COMBINATIONS["everything"]
    made = subject(LAYERS, mode="video", tokens=11)
    expected = made.step()
    attach_to_blocks(made.model, settings, None, device=CPU)
    close(made.step(), expected)
