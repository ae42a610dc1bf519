"""Attention kernels of other packages: missing, wrong, and used as they are meant."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from ltx2_tiny import tiny_config, tiny_inputs, tiny_model
from torch.nn.attention import SDPBackend

from musubi_tuner.common.errors import UserError
from musubi_tuner.models import attention_backends
from musubi_tuner.models.attention_backends import ATTENTION_BACKENDS, attention, check_backend
from musubi_tuner.models.ltx2.attention import plain_attention

CPU = torch.device("cpu")
PACKAGES = {
    "flash_attn": ("flash_attn", "flash_attn_func"),
    "flash3": ("flash_attn_interface", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """``install("flash3", function)`` stands for the package; later tests find none again."""
    attention_backends._kernel.cache_clear()

    def put(name: str, function) -> None:
        module, attribute = PACKAGES[name]
        parts = module.split(".")
        for depth in range(len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[: depth + 1]), ModuleType(parts[depth]))
        setattr(sys.modules[module], attribute, function)

    yield put
    attention_backends._kernel.cache_clear()


def check(name: str, dtype: torch.dtype = torch.float32) -> None:
    check_backend(name, device=CPU, dtype=dtype, head_dim=16)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(name, monkeypatch):
    attention_backends._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, PACKAGES[name][0], None)
    with pytest.raises(UserError, match=rf"{PACKAGES[name][0]}.* cannot be used: .*install .*use --sdpa"):
        check(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_right_kernel_passes_and_gets_no_masked_calls(name, dtype, install):
    calls = []

    def kernel(q, k, v):
        calls.append(q.shape)
        out = attention(q, k, v)
        return (out, None) if name == "flash3" else out

    install(name, kernel)
    check(name, dtype)
    assert len(calls) == 1
    q = torch.randn(1, 5, 2, 16, dtype=dtype)
    mask = torch.tensor([0.0, 0, -1e4, 0, -1e4], dtype=dtype).view(1, 1, 1, 5)
    torch.testing.assert_close(ATTENTION_BACKENDS[name](q, q, q, mask), attention(q, q, q, mask), rtol=0, atol=0)
    assert len(calls) == 1


def wrong_gradient(q, k, v):
    return attention(q, k.detach() + 0 * k, v)


WRONG = {
    "another scale": (lambda q, k, v: attention(1.3 * q, k, v), "output without a mask"),
    "another layout": (lambda q, k, v: attention(q, k.flip(2), v), "output without a mask"),
    "not a number": (lambda q, k, v: attention(q, k, v) * float("nan"), "output without a mask"),
    "gradients": (wrong_gradient, "gradients without a mask"),
}


@pytest.mark.parametrize(("kernel", "what"), WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_is_refused(kernel, what, install):
    install("flash_attn", kernel)
    with pytest.raises(UserError, match=rf"--flash_attn: {what} differ from PyTorch's attention"):
        check("flash_attn")


def test_a_backend_that_ignores_masks_is_refused(monkeypatch):
    monkeypatch.setitem(ATTENTION_BACKENDS._entries, "unmasked", lambda q, k, v, mask: attention(q, k, v))
    with pytest.raises(UserError, match="output with a mask differ"):
        check("unmasked")


def test_a_kernel_that_fails_is_refused(install):
    def kernel(q, k, v):
        raise RuntimeError("FlashAttention only supports fp16 and bf16\nmore")

    install("flash_attn", kernel)
    with pytest.raises(
        UserError, match="does not work with float32 on cpu: FlashAttention only supports fp16 and bf16;"
    ):
        check("flash_attn")


def test_every_name_works_in_the_model(install):
    config = tiny_config("2.3")
    inputs = tiny_inputs(config)
    model = tiny_model(config)
    expected = model(inputs)
    for name in PACKAGES:
        calls = []
        install(name, lambda q, k, v, calls=calls: calls.append(1) or attention(q, k, v))
        model.set_attention_backend(name)
        torch.testing.assert_close(model(inputs).video, expected.video, rtol=0, atol=0)
        assert len(calls) == 6 * config.num_layers
        with plain_attention(model):
            model(inputs)
        assert len(calls) == 6 * config.num_layers
        model(inputs)
        assert len(calls) == 12 * config.num_layers


@pytest.mark.parametrize("masked", [False, True])
def test_where_cudnn_cannot_serve_another_kernel_does(masked: bool):
    """Here it never can; what comes out is PyTorch's attention all the same."""
    q, k = torch.randn(2, 5, 2, 16), torch.randn(2, 7, 2, 16)
    mask = torch.zeros(2, 1, 1, 7).masked_fill(torch.arange(7) > 4, -1e4) if masked else None
    torch.testing.assert_close(
        ATTENTION_BACKENDS["cudnn_attn"](q, k, k, mask), attention(q, k, k, mask), rtol=0, atol=0
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_cudnn_that_would_never_serve_is_refused():
    with pytest.raises(
        UserError,
        match="--cudnn_attn: .* with float32 on cpu: cuDNN offers none here .*; use --sdpa",
    ):
        check("cudnn_attn")


def test_cudnn_comes_first_where_it_can(monkeypatch: pytest.MonkeyPatch):
    """As PyTorch sees it in the call; whether it can is the GPU's to say."""
    seen = []

    def watching(q, *_, **__):
        seen.append(torch._C._get_sdp_priority_order()[0])
        return q

    monkeypatch.setattr(attention_backends.F, "scaled_dot_product_attention", watching)
    q = torch.randn(1, 3, 2, 16)
    ATTENTION_BACKENDS["cudnn_attn"](q, q, q, None)
    before, _ = seen[0], attention(q, q, q)
    assert before == SDPBackend.CUDNN_ATTENTION.value
    assert seen[1] != SDPBackend.CUDNN_ATTENTION.value
