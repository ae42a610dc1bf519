"""Seconds of the linear layers of a block: dense bf16, FP8 weights that are dequantised, and FP8 products.

Each layer of the true sizes alone, forward and forward with the gradient of its input, at the tokens of a clip; the
error against the dense product; the sum is over one block of the av model with its numbers of layers.

    python benchmarks/fp8_products.py --device cuda
    python benchmarks/fp8_products.py --size tiny
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_tuner.common.tables import format_table
from musubi_tuner.quantization.fp8_products import Fp8Products, find_products
from musubi_tuner.quantization.linear import QuantizedLinear, use_products
from musubi_tuner.quantization.packed import Fp8


@dataclass(frozen=True)
class Layer:
    """Layers of one size in a block.

    Attributes:
        shape: (N, K).
        count: how many there are.
        tokens: rows of their input.
    """

    name: str
    shape: tuple[int, int]
    count: int
    tokens: int


def layers_of(width: int, tokens: int, audio_tokens: int, text_tokens: int) -> list[Layer]:
    """An av block: self and text attention, attention between the streams (half as wide), feed-forward."""
    audio = width // 2
    return [
        Layer("video q, k, v, out; text q, out", (width, width), 6, tokens),
        Layer("text k, v", (width, width), 2, text_tokens),
        Layer("between streams, from video", (audio, width), 3, tokens),
        Layer("between streams, to video", (width, audio), 1, tokens),
        Layer("video feed-forward, in", (4 * width, width), 1, tokens),
        Layer("video feed-forward, out", (width, 4 * width), 1, tokens),
        Layer("audio q, k, v, out; text q, out; between streams", (audio, audio), 10, audio_tokens),
        Layer("audio text k, v", (audio, audio), 2, text_tokens),
        Layer("audio feed-forward, in", (4 * audio, audio), 1, audio_tokens),
        Layer("audio feed-forward, out", (audio, 4 * audio), 1, audio_tokens),
    ]


SIZES = {
    "true": layers_of(4096, 6144, 126, 1024),
    "short": layers_of(4096, 640, 26, 1024),
    "tiny": layers_of(64, 96, 16, 32),
}


def contenders(weight: Tensor, products: Fp8Products | None) -> dict[str, nn.Module]:
    """The same weight in every way of holding it."""
    n, k = weight.shape
    dense = nn.Linear(k, n, bias=False, device=weight.device, dtype=weight.dtype).requires_grad_(False)
    dense.weight.copy_(weight)
    made: dict[str, nn.Module] = {
        "dense": dense,
        "dequantised": QuantizedLinear(Fp8().quantize(weight)),
        "dequantised, by row": QuantizedLinear(Fp8(None).quantize(weight)),
    }
    if products is not None:
        made["products"] = QuantizedLinear(Fp8(None).quantize(weight))
        use_products(made["products"], products)
    return made


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median of ``rounds`` after two that warm up."""
    taken = []
    for _ in range(rounds + 2):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(layer: Layer, products: Fp8Products | None, device: torch.device, rounds: int) -> dict[str, tuple]:
    """By contender: seconds forward, seconds of both passes, relative error of y and of dx."""
    generator = torch.Generator().manual_seed(0)
    (n, k), m = layer.shape, layer.tokens
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(device, torch.bfloat16)
    x = torch.randn(m, k, generator=generator).to(device, torch.bfloat16).requires_grad_()
    grad = torch.randn(m, n, generator=generator).to(device, torch.bfloat16)
    results, expected = {}, None
    for name, module in contenders(weight, products).items():

        def both(module: nn.Module = module) -> tuple[Tensor, Tensor]:
            y = module(x)
            return y.detach(), torch.autograd.grad(y, x, grad)[0]

        found = both()
        expected = expected or found
        errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, expected, strict=True)]
        with torch.no_grad():
            forward = seconds_of(lambda module=module: module(x), device, rounds)
        results[name] = (forward, seconds_of(both, device, rounds), *errors)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    products = find_products(device, backward=True)
    rows, sums = [], {}
    for layer in SIZES[args.size]:
        for name, (forward, both, *errors) in measure(layer, products, device, args.rounds).items():
            label = f"{layer.count} x {layer.name} {list(layer.shape)}, {layer.tokens} tokens"
            times = (forward * layer.count, both * layer.count)
            rows.append([label, name, *(f"{t * 1e3:.3f}" for t in times), *(f"{e:.2%}" for e in errors)])
            sums[name] = [a + b for a, b in zip(sums.get(name, (0, 0)), times, strict=True)]
    rows += [["block", name, *(f"{t * 1e3:.3f}" for t in times), "", ""] for name, times in sums.items()]
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    title = f"torch {torch.__version__}, {what}, products: {products}"
    headers = ["layers", "weights", "forward ms", "forward and backward ms", "error of y", "error of dx"]
    print(format_table(headers, rows, title=title))


if __name__ == "__main__":
    main()
