"""One layer adapted by an algorithm of the LyCORIS library (Yeh et al. 2024, arXiv:2309.14859).

The library makes the parameters and computes with them. Its modules do not enter the model: what a network adds is
computed beside the base layer, ``y = base(x) + multiplier * dW x``, so the base may be half precision, quantised or
come and go block by block. Rebuilding ``W + dW`` instead would round a small dW away where W is half precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lycoris.functional.locon import bypass_forward_diff as locon_product
from lycoris.functional.loha import bypass_forward_diff as loha_product
from lycoris.functional.lokr import kron_bypass
from lycoris.modules import IA3Module, LoConModule, LohaModule, LokrModule
from torch import Tensor, nn

from musubi_tuner.networks.adapter_math import (
    DORA,
    DOWN,
    UP,
    Kind,
    delta_rows,
    kind_of,
    lokr_shapes,
    rank_of,
    scale_of,
    shape_of,
)
from musubi_tuner.networks.attached import AttachedLinear, Switch
from musubi_tuner.quantization.rows import row_chunks

from .options import LayerOptions

logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # what it has to say of its choices is said here

_MODULES = {"lora": LoConModule, "locon": LoConModule, "loha": LohaModule, "lokr": LokrModule, "ia3": IA3Module}
_TINY = 1e-30


class LycorisLinear(AttachedLinear):
    """The change of one Linear layer with in_features K and out_features N.

    Args:
        base: the layer to adapt; only its sizes are read.
        tensors: its parameters under their names in a file; ``alpha`` and, of DoRA, ``dora_scale`` apart.
        alpha: dW is scaled by alpha / r; 0 means r.
        dora: axis of the lengths that are trained apart: 0 for one of each output, 1 of each input, ``None``: none.
        dropouts: of elements of what is added; of components of the rank, else of outputs, for a whole batch; of all
            that is added, in a call.
    """

    start_down = None

    def __init__(
        self,
        base: nn.Linear,
        tensors: Mapping[str, Tensor],
        alpha: float,
        *,
        dora: int | None = None,
        dropouts: tuple[float, float, float] = (0.0, 0.0, 0.0),
        switch: Switch | None = None,
    ) -> None:
        super().__init__(switch)
        self.kind: Kind = kind_of(tensors)
        self.in_features, self.out_features = base.in_features, base.out_features
        for name, tensor in tensors.items():
            self._register(name, tensor)
        self.rank = rank_of(self.kind, tensors) or 0
        self.dropout, self.rank_dropout, self.module_dropout = dropouts
        self.dora = dora
        if dora is not None:
            shape = (base.out_features, 1) if dora == 0 else (1, base.in_features)
            self.dora_scale = nn.Parameter(torch.ones(shape))
        self._has_lengths = self._over_base = False
        self.alpha_value, self.multiplier = float(alpha or self.rank or 1.0), 1.0
        if self.kind != "ia3":
            self.register_buffer("alpha", torch.tensor(self.alpha_value))

    def _register(self, name: str, tensor: Tensor) -> None:
        holder, _, last = name.rpartition(".")
        if holder:
            self.add_module(holder, nn.Module())
        owner = getattr(self, holder) if holder else self
        if tensor.is_floating_point():
            owner.register_parameter(last, nn.Parameter(tensor.detach().float()))
        else:
            owner.register_buffer(last, tensor)

    # --- tensors ---

    def tensors(self) -> dict[str, Tensor]:
        """Its factors under their names in a file, without alpha and lengths."""
        return {k: t for k, t in self.state_dict(keep_vars=True).items() if k not in ("alpha", DORA)}

    @property
    def scale(self) -> float:
        """alpha / r."""
        return scale_of(self.kind, self.tensors(), self.alpha_value)

    def set_multiplier(self, value: float) -> None:
        self.multiplier = value

    def set_alpha(self, value: float) -> None:
        self.alpha_value = value
        self.alpha.fill_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LycorisLinear:
        super()._apply(fn, recurse)
        if self.kind != "ia3":  # casting to half precision must not round it
            self.alpha = torch.tensor(self.alpha_value, device=self.alpha.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._has_lengths = self._has_lengths or f"{prefix}{DORA}" in state_dict

    # --- lengths of DoRA ---

    def attach(self, base: nn.Module) -> None:
        super().attach(base)
        self._stacked = not self._is_own(base)
        if self.dora is None:
            return
        if not self._has_lengths:
            self.set_lengths(self._norms(with_change=False))
        elif self._over_base:
            self.set_lengths(self.dora_scale.detach())

    @torch.no_grad()
    def set_lengths(self, lengths: Tensor, *, over_base: bool | None = None) -> None:
        """``m``, or with ``over_base`` what :meth:`lengths` makes of it, after the factors were set."""
        self._over_base = self._over_base if over_base is None else over_base
        if self._over_base and self._base is not None:
            lengths = lengths.to(self._norms()) * self._norms() / self._norms(with_change=False)
            self._over_base = False
        self.dora_scale.copy_(lengths)
        self._has_lengths = True

    @torch.no_grad()
    def lengths(self, *, over_base: bool = False) -> Tensor:
        """``m``; with ``over_base`` as ComfyUI wants it, which divides the length of an output by |W|, not |V|."""
        lengths = self.dora_scale.detach().float()
        if not (over_base and self.dora == 0):
            return lengths
        return lengths * (self._norms(with_change=False) / self._norms()).to(lengths.dtype)

    @torch.no_grad()
    def _norms(self, *, with_change: bool = True) -> Tensor:
        """|W + dW| along rows [N, 1] or columns [1, K], in the lengths' dtype, a few rows in memory at a time."""
        dtype = torch.promote_types(self.dora_scale.dtype, torch.float32)
        weight = self._base.dense_weight(dtype) if hasattr(self._base, "dense_weight") else self._base.weight.detach()
        tensors, scale = {k: t.detach().to(dtype) for k, t in self.tensors().items()}, self.scale
        squares = []
        for rows in row_chunks(*weight.shape):
            part = weight[rows].to(self.dora_scale.device, dtype)
            if with_change:
                part = part + delta_rows(self.kind, tensors, scale, rows)
            squares.append(part.square().sum(dim=1 - self.dora, keepdim=True))
        total = torch.cat(squares) if self.dora == 0 else torch.stack(squares).sum(dim=0)
        return total.clamp(min=_TINY).sqrt()

    # --- computing ---

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]: the base layer's output plus what the network adds."""
        below = self._base_forward(x)
        if not self.switch.on:
            return below
        added = self._added(x, below)
        return below + (self._drop(added) if self.training else added)

    def _added(self, x: Tensor, below: Tensor) -> Tensor:
        """``multiplier * (W' - W) x``."""
        if self.kind == "ia3":
            return self._scaled_channels(x, below, self.weight * self.multiplier, on_input=bool(self.on_input))
        if self.dora is None:
            return self._product(x, self.multiplier * self.scale)
        gain = self.multiplier * (self.dora_scale / self._norms()).flatten()
        if self.dora == 0:
            plain = self._scaled_channels(x, below, gain - self.multiplier, on_input=False)
            return plain + self._product(x, self.scale) * gain.to(x.dtype)
        plain = self._scaled_channels(x, below, gain - self.multiplier, on_input=True)
        return plain + self._product(x * gain.to(x.dtype), self.scale)

    def _scaled_channels(self, x: Tensor, below: Tensor, factors: Tensor, *, on_input: bool) -> Tensor:
        """``W (x * factors)`` or ``(W x) * factors``; only what the base computes is asked for."""
        factors = factors.to(x.dtype)
        if not on_input and not self._stacked:
            own = below
        else:
            own = type(self._base).forward(self._base, x * factors if on_input else x)
        product = own if self._base.bias is None else own - self._base.bias
        return product if on_input else product * factors

    def _product(self, x: Tensor, gamma: float) -> Tensor:
        """``gamma * dW x``, by the library."""
        tensors = {k: t.to(x.dtype) for k, t in self.tensors().items()}
        if self.kind == "lokr":
            names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
            return kron_bypass(x, *map(tensors.get, names), scale=gamma)
        if self.kind == "loha":
            names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
            # Of no dimension and on the CPU it is a number that takes part in no device and no dtype.
            number = torch.tensor(gamma, dtype=torch.float64)
            return loha_product(x, None, *(tensors[n] for n in names), None, None, gamma=number)
        down = tensors[DOWN]
        if self.training and self.rank_dropout:
            down = down * self._keep(down.shape[0], down)[:, None]
        return locon_product(x, None, down, tensors[UP], None, gamma=gamma)

    def _drop(self, added: Tensor) -> Tensor:
        if self.dropout:
            added = F.dropout(added, self.dropout)
        if self.rank_dropout and self.kind != "lora":
            added = added * self._keep(added.shape[-1], added)
        if self.module_dropout:
            # Multiplied rather than skipped: a branch on a random number would break a compiled block.
            added = added * (torch.rand((), device=added.device) >= self.module_dropout).to(added.dtype)
        return added

    def _keep(self, count: int, like: Tensor) -> Tensor:
        return (torch.rand(count, device=like.device) >= self.rank_dropout).to(like.dtype) / (1 - self.rank_dropout)

    def extra_repr(self) -> str:
        return f"{self.kind}, rank={self.rank}, alpha={self.alpha_value:g}"


def make_layer(base: nn.Linear, options: LayerOptions, lokr_norm: float | None, switch: Switch) -> LycorisLinear:
    """A new layer, with the parameters that the library makes for these sizes, at the library's start.

    ``lokr_norm``: LoKr's first factor starts at ones and the elements of the second with this standard deviation.
    """
    # On the meta device: of the layer the library needs nothing but its sizes, and it must not hold on to it.
    stand_in = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    made = _MODULES[options.algo](
        "",
        stand_in,
        lora_dim=options.dim,
        alpha=options.alpha or options.dim,
        factor=options.factor,
        decompose_both=options.decompose_both,
        full_matrix=options.full_matrix,
        unbalanced_factorization=options.unbalanced_factorization,
        rs_lora=options.rs_lora,
        train_on_input=options.train_on_input,
        bypass_mode=True,
    )
    tensors = {name: p.detach() for name, p in made.named_parameters()}
    if options.algo == "ia3":
        tensors["on_input"] = made.on_input
    if options.algo == "lokr" and lokr_norm is not None:
        _start_lokr(tensors, lokr_norm)
    return LycorisLinear(
        base,
        tensors,
        # With rs_lora it is that by which alpha / r is the scale.
        1.0 if options.algo == "ia3" else float(made.alpha),
        dora=None if not options.dora_wd else 0 if options.wd_on_output else 1,
        dropouts=(options.dropout, options.rank_dropout, options.module_dropout),
        switch=switch,
    )


def _start_lokr(tensors: dict[str, Tensor], norm: float) -> None:
    if "lokr_w1" in tensors:
        tensors["lokr_w1"].fill_(1.0)
    else:
        tensors["lokr_w1_a"].fill_(1.0)
        tensors["lokr_w1_b"].fill_(1.0 / tensors["lokr_w1_b"].shape[0])
    if "lokr_w2" in tensors:
        tensors["lokr_w2"].normal_(std=norm)
        return
    # A sum of r products of two numbers of deviation s has the deviation s^2 * sqrt(r).
    rank = tensors["lokr_w2_b"].shape[0]
    for name in ("lokr_w2_a", "lokr_w2_b"):
        tensors[name].normal_(std=(norm / rank**0.5) ** 0.5)


def kept_per_token(layer: LycorisLinear) -> int:
    """Values that the backward pass needs of each token besides the layer's input, where nothing is fused.

    IA3 needs outputs in the place of inputs; of LoHa, dW is kept, whatever the number of tokens.
    """
    tensors = layer.tensors()
    # The products with W and dW that are scaled afterwards, or that with W alone where inputs are scaled.
    lengths = 0 if layer.dora is None else (2 - layer.dora) * layer.out_features
    if layer.kind == "lora":
        return layer.rank + lengths
    if layer.kind == "lokr":
        (_, c), (b, _) = lokr_shapes(tensors)
        second = tensors["lokr_w2_b"].shape[0] if "lokr_w2_b" in tensors else 0
        return c * (b + second) + lengths
    return lengths


def fits(layer_shape: tuple[int, int], kind: Kind, tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors are of a layer of (N, K)."""
    return all(found in (None, size) for found, size in zip(shape_of(kind, tensors), layer_shape, strict=True))
