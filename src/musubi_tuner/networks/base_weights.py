"""The weights of a checkpoint that an adapter may change, under canonical names."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, TensorInfo
from musubi_tuner.models.checkpoint import Checkpoint
from musubi_tuner.models.ltx2.keys import transformer_keys
from musubi_tuner.models.ltx2.quantize import stored_transformer
from musubi_tuner.quantization.fp8 import dequantize_fp8
from musubi_tuner.quantization.stored import Stored, scale_matrix

_LISTED = 3


class BaseWeights:
    """The transformer and the text connectors of a checkpoint, of which only the header has been read.

    Attributes:
        file: the checkpoint's file.
        keys: tensor's official name -> key in the file.
        stored: which weights are FP8, and where their scales are.

    Raises:
        UserError: no checkpoint, no transformer in it, or one in NF4 or int8.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint = Checkpoint(path)
        self.path = self.checkpoint.path
        self.file = SafetensorsFile(path)
        try:
            transformer = transformer_keys(self.file.tensors)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        self.stored: Stored = stored_transformer(self.checkpoint)
        if self.stored.kind in ("int8", "nf4"):
            raise UserError(
                f"{self.path} holds {self.stored.kind.upper()} weights, a copy for training and generating; give the "
                "original, the bf16 or FP8 file"
            )
        self.keys = {**self.checkpoint.component_keys("connectors"), **transformer}

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Module -> shape [N, K] of every linear weight."""
        shapes = {n.removesuffix(".weight"): self.info(n).shape for n in self.keys if n.endswith(".weight")}
        return {module: shape for module, shape in shapes.items() if len(shape) == 2}

    def info(self, name: str) -> TensorInfo:
        return self.file.tensors[self.keys[name]]

    def scale(self, name: str) -> Tensor | None:
        """Scale of an FP8 weight, [1 or N, G] fp32; ``None`` for others and for a plain cast."""
        key = self.scale_key(name)
        if key is None:
            return None
        return scale_matrix(self.file.read_one(key, dtype=torch.float32), self.info(name).shape, key)

    def scale_key(self, name: str) -> str | None:
        scale = self.stored.scales.get(name)
        return None if scale is None else self.keys[scale]

    def dense(self, name: str, tensor: Tensor | None = None) -> Tensor:
        """A tensor in float32; ``tensor`` is it as stored, where it has been read already."""
        tensor = self.file.read_one(self.keys[name]) if tensor is None else tensor
        scale = self.scale(name)
        if scale is None:
            return tensor.float()
        flat = dequantize_fp8(tensor.reshape(tensor.shape[0], -1), scale, torch.float32)
        return flat.view(tensor.shape)

    def require(self, sizes: Iterable[tuple[str, tuple[int | None, int | None]]], source: str) -> None:
        """Check that the modules of an adapter, with their (N, K), are here; ``None``: any size.

        Raises:
            UserError: some are missing or have other sizes.
        """
        own = self.weights()
        sizes = list(sizes)
        if lost := [name for name, _ in sizes if name not in own]:
            names = ", ".join(lost[:_LISTED]) + (", ..." if len(lost) > _LISTED else "")
            raise UserError(
                f"{source}: {len(lost)} of its {len(sizes)} modules have no weight in {self.path.name} ({names}); "
                "it belongs to another model or version"
            )
        if wrong := [(name, shape) for name, shape in sizes if not fits(own[name], shape)]:
            name, (n, k) = wrong[0]
            k, n = k or "any", n or "any"
            raise UserError(
                f"{source}: {name} is made for a layer of {k} -> {n} features, that of {self.path.name} has "
                f"{own[name][1]} -> {own[name][0]}; it is a LoRA of another model"
            )


def fits(shape: tuple[int, ...], wanted: tuple[int | None, int | None]) -> bool:
    """Whether a weight has the (N, K) that an adapter is made for; ``None``: any."""
    return len(shape) == 2 and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))
