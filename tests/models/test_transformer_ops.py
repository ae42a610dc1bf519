"""The hand-written gradients against finite differences and against plain PyTorch, and the masks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck

from musubi_tuner.models.ltx2.adaln import Levels, distinct_levels, gated_add, modulate, sinusoid
from musubi_tuner.models.ltx2.attention import text_mask, weight_mask
from musubi_tuner.models.ltx2.norm import rms_norm
from musubi_tuner.models.ltx2.rope import RopeTable, apply_rope, rope_table

F64 = torch.float64


def randn(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator).requires_grad_(grad)


@pytest.fixture(params=["one row a sample", "rows by index"])
def rows_and_index(request):
    if request.param == "one row a sample":
        return (2, 1, 4), None
    return (3, 4), torch.tensor([[0, 2, 2, 0, 2], [0, 0, 0, 2, 0]])  # row 1 is read by nobody


def test_modulate(rows_and_index):
    shape, index = rows_and_index
    x, scale, shift = randn(2, 5, 4), randn(*shape, seed=1), randn(*shape, seed=2)
    assert gradcheck(lambda *a: modulate(*a, index), (x, scale, shift))
    scale_t, shift_t = (r if index is None else r[index] for r in (scale, shift))
    torch.testing.assert_close(modulate(x, scale, shift, index), x * scale_t + shift_t)


def test_gated_add(rows_and_index):
    shape, index = rows_and_index
    x, y, gate = randn(2, 5, 4), randn(2, 5, 4, seed=1), randn(*shape, seed=2)
    assert gradcheck(lambda *a: gated_add(*a, index), (x, y, gate))
    torch.testing.assert_close(gated_add(x, y, gate, index), x + y * (gate if index is None else gate[index]))


def test_modulate_shared_by_the_batch():
    assert gradcheck(modulate, (randn(2, 5, 4), randn(1, 1, 4, seed=1), randn(1, 1, 4, seed=2)))


@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm(weighted):
    x = randn(2, 3, 8)
    weight = randn(8, seed=1) if weighted else None
    arguments = (x, weight) if weighted else (x,)
    assert gradcheck(lambda *a: rms_norm(*a, eps=1e-3), arguments)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-3), torch.nn.functional.rms_norm(x, (8,), weight, 1e-3))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(interleaved):
    angles = randn(2, 3, 2, 4, seed=1, grad=False)
    table = RopeTable(angles.cos(), angles.sin(), interleaved)
    x = randn(2, 3, 2, 8)
    assert gradcheck(lambda x: apply_rope(x, table), (x,))
    pairs = x.unflatten(-1, (4, 2)) if interleaved else x.unflatten(-1, (2, 4)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.view_as_real(turned)
    expected = expected.flatten(-2) if interleaved else expected.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(apply_rope(x, table), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_results_are_rounded_once(dtype):
    x, y = (randn(1, 5, 8, seed=s).to(dtype) for s in (0, 1))
    scale, shift = (randn(1, 1, 8, seed=s).float() for s in (2, 3))
    angles = randn(1, 5, 1, 4, seed=4, grad=False).float()
    table = RopeTable(angles.cos(), angles.sin())
    heads = x.unflatten(-1, (1, 8))
    for rounded, exact in (
        (modulate(x, scale, shift), modulate(x.float(), scale, shift)),
        (gated_add(x, y, scale), gated_add(x.float(), y.float(), scale)),
        (apply_rope(heads, table), apply_rope(heads.float(), table)),
        (rms_norm(x, eps=1e-6), rms_norm(x.float(), eps=1e-6)),
    ):
        assert rounded.dtype == dtype
        torch.testing.assert_close(rounded, exact.to(dtype), rtol=0, atol=0)


def test_frozen_modulation_saves_only_rows_for_backward():
    """Also with a level per token: nothing of the size of the hidden state."""
    x, y = (torch.randn(1, 64, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    rows, index = torch.randn(2, 16), torch.randint(0, 2, (1, 64))
    angles = torch.randn(1, 64, 2, 4)
    table = RopeTable(angles.cos(), angles.sin())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        modulate(x, rows, rows, index)
        gated_add(x, y, rows, index)
        apply_rope(x.unflatten(-1, (2, 8)), table)
    assert saved
    pointers = {t.data_ptr() for t in (rows, index, table.cos, table.sin)}
    assert {t.data_ptr() for t in saved} <= pointers


def test_distinct_levels():
    assert distinct_levels(torch.tensor([[0.5], [0.5]])).index is None
    timesteps = torch.tensor([[0.0, 0.5, 0.5], [0.25, 0.0, 0.25]])
    levels = distinct_levels(timesteps)
    assert isinstance(levels, Levels)
    torch.testing.assert_close(levels.values[levels.index], timesteps, rtol=0, atol=0)
    assert levels.values.tolist() == [0.0, 0.25, 0.5, 0.0]  # three, rounded up to a power of two


def test_sinusoid_closed_form():
    t = torch.tensor([0.0, 1.0, 937.25])
    out = sinusoid(t)
    assert out.dtype == torch.float32
    assert out.shape == (3, 256)
    for j in (0, 1, 64, 127):
        angle = t.double() * 10000 ** (-j / 128)
        torch.testing.assert_close(out[:, j].double(), angle.cos(), rtol=0, atol=1e-3)
        torch.testing.assert_close(out[:, 128 + j].double(), angle.sin(), rtol=0, atol=1e-3)


def test_rope_table_closed_form():
    """True sizes: 682 frequencies by three axes, two unrotated pairs in front, heads in order."""
    coords = torch.tensor([[[[0.04, 0.36]], [[32.0, 64.0]], [[-96.0, -64.0]]]])  # [1, 3, 1, 2]
    table = rope_table(coords, max_pos=(20, 2048, 2048), width=4096, heads=32)
    assert table.cos.shape == (1, 1, 32, 64)
    cos, sin = table.cos.flatten().double(), table.sin.flatten().double()
    assert cos[:2].tolist() == [1.0, 1.0]
    assert sin[:2].tolist() == [0.0, 0.0]
    for k, axis, fraction in ((0, 0, 0.2 / 20), (100, 1, 48 / 2048), (681, 2, -80 / 2048)):
        angle = torch.pi / 2 * 10000 ** (k / 681) * (2 * fraction - 1)
        place = 2 + 3 * k + axis
        expected = torch.tensor(angle, dtype=F64)
        torch.testing.assert_close(cos[place], expected.cos(), rtol=0, atol=2e-3)
        torch.testing.assert_close(sin[place], expected.sin(), rtol=0, atol=2e-3)


def test_rope_ladder_is_monotonic_up_to_theta():
    end = torch.tensor([[[[20.0, 20.0]]]])  # scaled position 1: the angles are the frequencies
    table = rope_table(end, max_pos=(20,), width=64, heads=2, theta=1.5)
    angles = torch.atan2(table.sin, table.cos).flatten().tolist()
    assert angles[0] == pytest.approx(torch.pi / 2)
    assert angles[-1] == pytest.approx(torch.pi * 0.75)
    assert all(a < b for a, b in pairwise(angles))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hiding_a_whole_row_stays_finite_in_every_kernel(dtype):
    """Kernels add scores in the dtype of the mask, or scale it by log2(e) in fp32; either must not overflow."""
    masks = (text_mask(torch.zeros(1, 3, dtype=torch.bool), dtype), weight_mask(torch.zeros(1, 1, 3), dtype))
    for mask in masks:
        assert mask.dtype == dtype
        assert bool((mask - 1000).isfinite().all())
        assert bool((mask.float() * math.log2(math.e)).isfinite().all())
    visible = weight_mask(torch.tensor([[[1.0, 0.5, 0.0]]]), dtype).float().softmax(dim=-1)
    torch.testing.assert_close(visible.flatten(), torch.tensor([2 / 3, 1 / 3, 0.0]), rtol=1e-2, atol=0)
