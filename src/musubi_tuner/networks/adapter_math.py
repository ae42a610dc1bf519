"""What the tensors of an adapted layer change, in closed form: LoRA, LoHa, LoKr, IA3.

A layer's tensors are named as in a file of LyCORIS (``lora_up.weight``, ``hada_w1_a``, ``lokr_w2_b``, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.quantization.rows import row_chunks

Kind = Literal["lora", "loha", "lokr", "ia3"]

UP, DOWN = "lora_up.weight", "lora_down.weight"
DORA = "dora_scale"
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = (("lokr_w1", ("lokr_w1_a", "lokr_w1_b")), ("lokr_w2", ("lokr_w2_a", "lokr_w2_b")))


def kind_of(roles: Mapping[str, object]) -> Kind:
    """Which algorithm a layer's tensors are of.

    Raises:
        UserError: of none that is understood, or one is missing or foreign.
    """
    names = set(roles) - {"alpha", DORA}
    if names == {UP, DOWN}:
        return "lora"
    if names == set(_LOHA):
        return "loha"
    if names == {"weight", "on_input"}:
        return "ia3"
    if all((whole in names) != names.issuperset(parts) for whole, parts in _LOKR):
        expected = {n for whole, parts in _LOKR for n in ([whole] if whole in names else parts)}
        if names == expected:
            return "lokr"
    raise UserError(f"tensors {', '.join(sorted(roles))} are of no algorithm known here (LoRA, LoHa, LoKr, IA3)")


def rank_of(kind: Kind, tensors: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by; ``None`` where there is no factor of a rank."""
    if kind == "lora":
        return tensors[DOWN].shape[0]
    if kind == "loha":
        return tensors["hada_w1_b"].shape[0]
    for name in ("lokr_w2_b", "lokr_w1_b"):
        if name in tensors:
            return tensors[name].shape[0]
    return None


def scale_of(kind: Kind, tensors: Mapping[str, Tensor], alpha: float | None) -> float:
    """alpha / r; 1 without a rank or an alpha."""
    rank = rank_of(kind, tensors)
    return 1.0 if rank is None or alpha is None else alpha / rank


def shape_of(kind: Kind, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """(N, K) of the layer; ``None`` for a width that the tensors do not tell.

    Raises:
        UserError: they do not fit each other.
    """
    if kind == "lora":
        _fit(tensors, UP, DOWN)
        return tensors[UP].shape[0], tensors[DOWN].shape[1]
    if kind == "loha":
        _fit(tensors, "hada_w1_a", "hada_w1_b")
        _fit(tensors, "hada_w2_a", "hada_w2_b")
        shapes = {(tensors[f"hada_w{i}_a"].shape[0], tensors[f"hada_w{i}_b"].shape[1]) for i in (1, 2)}
        if len(shapes) > 1 or tensors["hada_w1_b"].shape[0] != tensors["hada_w2_b"].shape[0]:
            raise UserError("its two products have different sizes or ranks")
        return shapes.pop()
    if kind == "lokr":
        (a, c), (b, d) = lokr_shapes(tensors)
        return a * b, c * d
    if tensors["weight"].dim() != 1:
        raise UserError("weight: expected one dimension")
    size = tensors["weight"].shape[0]
    return (None, size) if bool(tensors["on_input"]) else (size, None)


def lokr_shapes(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of both factors of the Kronecker product."""
    return _factor_shape(tensors, 1), _factor_shape(tensors, 2)


def _factor_shape(tensors: Mapping[str, Tensor], index: int) -> tuple[int, int]:
    whole, parts = _LOKR[index - 1]
    if whole in tensors:
        if len(tensors[whole].shape) != 2:
            raise UserError(f"{whole}: expected two dimensions")
        return tuple(tensors[whole].shape)
    _fit(tensors, *parts)
    return tensors[parts[0]].shape[0], tensors[parts[1]].shape[1]


def _fit(tensors: Mapping[str, Tensor], left: str, right: str) -> None:
    a, b = tensors[left].shape, tensors[right].shape
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise UserError(f"{left} {list(a)} and {right} {list(b)} are no pair [out, r] and [r, in]")
    if a[1] == 0:
        raise UserError(f"{left} has rank 0")


def lokr_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both factors of the Kronecker product, [a, c] and [b, d]."""
    found = []
    for whole, (a, b) in _LOKR:
        found.append(tensors[whole] if whole in tensors else tensors[a] @ tensors[b])
    return found[0], found[1]


def delta_rows(kind: Kind, tensors: Mapping[str, Tensor], scale: float, rows: slice) -> Tensor:
    """Some rows of the change of the weight, [n, K], in the tensors' dtype; not of IA3, which needs the weight."""
    if kind == "lora":
        return (tensors[UP][rows] * scale) @ tensors[DOWN]
    if kind == "loha":
        first, second = (tensors[f"hada_w{i}_a"][rows] @ tensors[f"hada_w{i}_b"] for i in (1, 2))
        return first.mul_(second).mul_(scale)
    first, second = lokr_factors(tensors)
    outputs = torch.arange(*rows.indices(first.shape[0] * second.shape[0]), device=first.device)
    left, right = first[outputs // second.shape[0]], second[outputs % second.shape[0]]  # [n, c], [n, d]
    return (left[:, :, None] * right[:, None, :]).flatten(1).mul_(scale)


@torch.no_grad()
def delta_norm(kind: Kind, tensors: Mapping[str, Tensor], scale: float) -> float:
    """Frobenius norm of the change of the weight, float32; of IA3 that of its factors."""
    wide = {k: t.float() for k, t in tensors.items()}
    if kind == "lora":
        up, down = wide[UP], wide[DOWN]
        return abs(scale) * math.sqrt(max(float(((up.T @ up).double() * (down @ down.T).double()).sum()), 0.0))
    if kind == "lokr":
        first, second = lokr_factors(wide)
        return abs(scale) * float(first.double().norm()) * float(second.double().norm())
    if kind == "ia3":
        return float(wide["weight"].norm())
    N, K = shape_of(kind, wide)
    squares = [float(delta_rows(kind, wide, scale, rows).double().square().sum()) for rows in row_chunks(N, K)]
    return math.sqrt(sum(squares))
