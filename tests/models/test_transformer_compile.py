"""Blocks under torch.compile and under per-block checkpointing, both attached from outside."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from ltx2_tiny import relative_error, tiny_config, tiny_inputs, tiny_model
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint

from musubi_tuner.common.av import AV


def input_gradients(model, inputs):
    """Of the squared outputs to the tokens; so every block's input needs a gradient, the first one's too."""
    leaves = inputs.map(lambda s: s.tokens.clone().requires_grad_(True))
    out = model(inputs.map_named(lambda name, s: replace(s, tokens=leaves[name])))
    sum(x.square().sum() for _, x in out.items()).backward()
    return leaves.map(lambda leaf: leaf.grad)


def assert_compiles_once(version, inputs_of, backend):
    torch._dynamo.reset()
    config = tiny_config(version, num_layers=4)
    inputs = inputs_of(config)
    expected = input_gradients(tiny_model(config), inputs)
    model = tiny_model(config)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return backend(graph, example_inputs)

    for block in model.transformer_blocks:
        block.forward = torch.compile(block.forward, backend=count, fullgraph=True)
    for name, grad in input_gradients(model, inputs).items():
        assert relative_error(grad, expected[name]) <= 1e-5
    assert len(graphs) == 1


@pytest.mark.parametrize("per_token", [False, True])
def test_all_blocks_share_one_graph(per_token):
    assert_compiles_once("2.3", partial(tiny_inputs, per_token=per_token), aot_eager)


def test_all_blocks_share_one_graph_with_one_stream():
    assert_compiles_once("2.0", lambda config: AV(video=tiny_inputs(config).video), aot_eager)


@pytest.mark.slow
def test_all_blocks_share_one_graph_of_the_default_compiler():
    assert_compiles_once("2.3", partial(tiny_inputs, per_token=True), compile_fx)


def test_checkpointing_each_block_changes_no_gradient():
    config = tiny_config("2.3")
    inputs = tiny_inputs(config, per_token=True)
    expected = input_gradients(tiny_model(config), inputs)
    model = tiny_model(config)
    for block in model.transformer_blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for name, grad in input_gradients(model, inputs).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=0)


def test_a_level_per_token_keeps_no_more_for_backward_than_one_per_sample():
    """Modulation by rows and an index: a block saves about 16 hidden states in both cases."""
    config = tiny_config("2.3")
    tokens = 512
    sizes = {}
    for per_token in (False, True):
        model = tiny_model(config, "video", dtype=torch.bfloat16)
        video = tiny_inputs(config, video_tokens=tokens, batch=1, per_token=per_token, dtype=torch.bfloat16).video
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def pack(tensor, saved=saved, parameters=parameters):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage  # kept, so that no address is used twice
            return tensor

        video.tokens.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(AV(video=video))
        del out
        hidden_state = tokens * config.width * 2
        sizes[per_token] = sum(s.nbytes() for s in saved.values()) / hidden_state / config.num_layers
    assert sizes[False] < 22
    assert sizes[True] < sizes[False] + 0.5
