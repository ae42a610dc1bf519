"""LoRA on Linear layers: ours against PEFT's, forward and backward, in turn within one process.

Same weights, factors, inputs and scale; outputs and gradients are compared before timing. "one": a layer by itself.
"three": to_q, to_k and to_v, which read one input; ours makes one product of their down factors. On a CPU the
process's own time is taken, on a GPU elapsed time around a synchronisation; the best round counts, since other programs
may hold the cores. Factors have the dtype of the base: PEFT casts the activations where they differ, so with float32
factors on a half-precision base the comparison would be unequal.

    python benchmarks/lora_linear.py
    python benchmarks/lora_linear.py --device cuda --rounds 30
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from musubi_tuner.common.tables import format_table
from musubi_tuner.networks.dora import DoRALinear
from musubi_tuner.networks.lora import LoRALinear, adapt_together


@dataclass(frozen=True)
class Case:
    tokens: int
    width: int
    rank: int
    count: int  # layers that read one input
    dora: bool
    dtype: torch.dtype
    device: str


Run = Callable[[Tensor], list[Tensor]]


def ours(case: Case, bases: list[nn.Linear]) -> tuple[Run, list[list[nn.Parameter]]]:
    kind = DoRALinear if case.dora else LoRALinear
    modules = [kind(base, case.rank, case.rank).to(case.device, case.dtype) for base in bases]
    for module, base in zip(modules, bases, strict=True):
        module.attach(base)
    trained = [[m.lora_down.weight, m.lora_up.weight, *([m.dora_scale] if case.dora else [])] for m in modules]
    return lambda x: adapt_together(modules, x), trained


def pefts(case: Case, bases: list[nn.Linear]) -> tuple[Run, list[list[nn.Parameter]]]:
    import peft

    config = peft.LoraConfig(
        r=case.rank, lora_alpha=case.rank, target_modules=[str(i) for i in range(case.count)], use_dora=case.dora
    )
    adapted = peft.inject_adapter_in_model(config, nn.ModuleList(bases))
    adapted.to(case.device, case.dtype)
    trained = []
    for layer in adapted:
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        lengths = [layer.lora_magnitude_vector["default"].weight] if case.dora else []
        trained.append([*factors, *lengths])
    return lambda x: [layer(x) for layer in adapted], trained


def make(case: Case) -> dict[str, tuple[Run, list[nn.Parameter]]]:
    """Both contenders with the same values."""
    torch.manual_seed(0)
    options = {"dtype": case.dtype, "device": case.device}
    first = [nn.Linear(case.width, case.width, **options).requires_grad_(False) for _ in range(case.count)]
    second = [nn.Linear(case.width, case.width, **options).requires_grad_(False) for _ in range(case.count)]
    for one, other in zip(first, second, strict=True):
        other.load_state_dict(one.state_dict())
    run_ours, trained = ours(case, first)
    run_peft, theirs = pefts(case, second)
    with torch.no_grad():
        for mine, other in zip(trained, theirs, strict=True):
            for a, b in zip(mine, other, strict=True):
                if a.shape == (case.width, case.rank):
                    nn.init.normal_(a, std=0.01)
                b.copy_(a.view_as(b))
    return {
        "ours": (run_ours, [p for ps in trained for p in ps]),
        "PEFT": (run_peft, [p for ps in theirs for p in ps]),
    }


def step(run: Run, x: Tensor, grads: list[Tensor]) -> list[Tensor]:
    outputs = run(x)
    torch.autograd.backward(outputs, grads)
    return outputs


def check_same_work(case: Case, contenders, x: Tensor, grads: list[Tensor]) -> None:
    found = {}
    for name, (run, trained) in contenders.items():
        x.grad = None
        outputs = [y.detach() for y in step(run, x, grads)]
        sums = sum(p.grad.double().square().sum() for p in trained).item()
        found[name] = [*outputs, x.grad, sums]
    tolerance = 1e-3 if case.dtype == torch.float32 else 3e-2
    *mine, my_sum = found["ours"]
    *other, other_sum = found["PEFT"]
    for a, b in zip(mine, other, strict=True):
        difference = (a.float() - b.float()).norm() / b.float().norm()
        if difference > tolerance:
            raise SystemExit(f"not the same work: {case}, relative difference {difference:.2e}")
    if abs(my_sum - other_sum) > 2 * tolerance * other_sum:
        raise SystemExit(f"not the same work: {case}, gradients {my_sum} and {other_sum}")


def measure(case: Case, rounds: int) -> list[object]:
    contenders = make(case)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, case.tokens, case.width, generator=generator).to(case.device, case.dtype).requires_grad_()
    grad = torch.randn(1, case.tokens, case.width, generator=generator).to(case.device, case.dtype)
    grads = [grad] * case.count
    check_same_work(case, contenders, x, grads)
    best = dict.fromkeys(contenders, float("inf"))
    for i in range(rounds):
        order = list(contenders.items())
        for name, (run, trained) in order if i % 2 else reversed(order):
            for p in (x, *trained):
                p.grad = None
            best[name] = min(best[name], timed(lambda run=run: step(run, x, grads), case.device))
    kind = ("DoRA " if case.dora else "") + ("one" if case.count == 1 else "three")
    dtype = str(case.dtype).removeprefix("torch.")
    row = [dtype, case.tokens, case.width, case.rank, kind]
    return [*row, *(f"{1e3 * best[n]:.1f}" for n in ("ours", "PEFT")), f"{best['ours'] / best['PEFT']:.2f}"]


def timed(work: Callable[[], object], device: str) -> float:
    if device == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--dora", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [
        Case(tokens, width, rank, count, args.dora, getattr(torch, dtype), args.device)
        for dtype in args.dtypes
        for tokens in args.tokens
        for width in args.widths
        for rank in args.ranks
        for count in (1, 3)
    ]
    rows = []
    for case in cases:
        rows.append(measure(case, args.rounds))
        print(*rows[-1], flush=True)
    headers = ["dtype", "tokens", "width", "rank", "layers", "ours ms", "PEFT ms", "ours / PEFT"]
    print(
        format_table(
            headers, rows, title=f"LoRA linear, forward and backward, {args.device}, torch {torch.__version__}"
        )
    )


if __name__ == "__main__":
    main()
