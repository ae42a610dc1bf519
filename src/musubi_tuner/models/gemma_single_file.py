"""Gemma from one safetensors file, as ComfyUI and the LTX-2.5 release ship it: perhaps fp8, with its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile, TensorInfo

from .checkpoint import parse_metadata
from .component_loading import fill
from .gemma_parts import build_text_model, language_model_name, load_config, load_tokenizer

if TYPE_CHECKING:  # transformers takes a second or two to import, and few runs encode prompts
    from transformers import Gemma3TextConfig, PretrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (".weight_scale", ".scale_weight")
_IGNORED = (".comfy_quant", ".input_scale")


class Fp8Linear(nn.Module):
    """A linear layer whose weight stays fp8 and is dequantised for every call: ``W = fp8 * scale``.

    With ``offload`` the weight stays on the CPU between uses and is copied to the device of the input.
    """

    def __init__(self, weight: Tensor, scale: Tensor, *, offload: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight)  # [out, in] fp8
        self.register_buffer("scale", scale)  # scalar or [out, 1], fp32
        self.offload = offload

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.device)
        dense = (weight.to(torch.float32) * self.scale.to(x.device)).to(x.dtype)
        return F.linear(x, dense)

    def _apply(self, fn: Any, recurse: bool = True) -> Fp8Linear:
        # ``Module.to`` of the model around it must neither move an offloaded weight nor cast fp8.
        if not self.offload:
            self.weight = fn(self.weight.view(torch.uint8)).view(self.weight.dtype)
            self.scale = fn(self.scale)
        return self


def load_single_file(
    path: str | Path,
    *,
    root: str | Path | None = None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    offload_weights: bool = True,
) -> tuple[nn.Module, Tokenizer | SentencePieceTokenizer]:
    """Language model and tokenizer of one file.

    Args:
        path: the file.
        root: folder whose ``config.json`` and tokenizer stand in for what the file lacks.
        dtype: of the weights and of the computation; fp8 linear weights are kept as they are.
        device: where it runs.
        offload_weights: keep fp8 weights on the CPU between uses.

    Raises:
        UserError: the file holds no Gemma, an unknown quantisation, or no tokenizer.
    """
    file = SafetensorsFile(path)
    tokenizer = _tokenizer(file, root)
    names = {name: key for key in file.tensors if (name := language_model_name(key)) is not None}
    if "embed_tokens.weight" not in names:
        raise UserError(
            f"{path} holds no Gemma language model (no embed_tokens.weight below 'model.', "
            "'model.language_model.' or 'language_model.model.'); give a Gemma text encoder file"
        )
    _refuse_packed(file, names)
    config = _config(file, names, root)
    model = build_text_model(config)
    fp8 = [
        name
        for name, key in names.items()
        if name.endswith(".weight") and file.tensors[key].dtype in _FP8 and name != "embed_tokens.weight"
    ]
    for name in fp8:
        _install_fp8(model, file, names, name, device=device, offload=offload_weights)
    skip = {*fp8, *(n for n in names if n.endswith((*_SCALES, *_IGNORED)))}
    # Assigned buffers count as state; hand them back so that the strict check sees a complete model.
    ready = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    module_name = {key: name for name, key in names.items() if name not in skip}
    dense = {module_name[key]: t for key, t in file.read(module_name, device=device, dtype=dtype)}
    _rescale_dense(file, names, dense)
    return fill(model, {**ready, **dense}.items(), source=f"{path}: Gemma", device=device), tokenizer


def _install_fp8(
    model: nn.Module,
    file: SafetensorsFile,
    names: Mapping[str, str],
    name: str,
    *,
    device: torch.device | str,
    offload: bool,
) -> None:
    """Put an :class:`Fp8Linear` in the place of the linear layer that ``name`` is the weight of."""
    place = name.removesuffix(".weight")
    weight = file.read_one(names[name], device="cpu" if offload else device)
    linear = Fp8Linear(weight, _scale(file, names, place), offload=offload)
    model.set_submodule(place, linear)


def _scale(file: SafetensorsFile, names: Mapping[str, str], place: str) -> Tensor:
    """The dequantisation scale of a layer, scalar or [out, 1]; 1 where the file has none."""
    for suffix in _SCALES:
        if key := names.get(place + suffix):
            scale = file.read_one(key, dtype=torch.float32)
            return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
    return torch.ones(())


def _rescale_dense(file: SafetensorsFile, names: Mapping[str, str], dense: dict[str, Tensor]) -> None:
    """An fp8 embedding table becomes dense, by its scale."""
    key = names["embed_tokens.weight"]
    if file.tensors[key].dtype in _FP8:
        table = dense["embed_tokens.weight"]
        scale = _scale(file, names, "embed_tokens").to(table.device)
        if scale.numel() != 1 or scale.item() != 1.0:
            dense["embed_tokens.weight"] = (table.float() * scale).to(table.dtype)


def _refuse_packed(file: SafetensorsFile, names: Mapping[str, str]) -> None:
    for name, key in names.items():
        packed = name.endswith(".weight") and not file.tensors[key].dtype.is_floating_point
        if packed or name.endswith(".weight_scale_2"):
            raise UserError(
                f"{file.path}: {key} is quantised in a packed format (NVFP4 or integers), which is not supported; "
                "use the bf16 or fp8 file"
            )


def _config(file: SafetensorsFile, names: Mapping[str, str], root: str | Path | None) -> PretrainedConfig:
    """The configuration in the metadata, beside the file, below ``root``, or read from the shapes, in this order."""
    from transformers import AutoConfig

    embedded = parse_metadata(file.metadata).get("gemma_config")
    if isinstance(embedded, dict) and embedded.get("model_type"):
        return AutoConfig.for_model(**embedded)
    for folder in (file.path.parent, *(() if root is None else (Path(root),))):
        if (folder / "config.json").is_file():
            return load_config(folder)
    return _config_from_shapes({name: file.tensors[key] for name, key in names.items()})


def _config_from_shapes(tensors: Mapping[str, TensorInfo]) -> Gemma3TextConfig:
    """Gemma 3 as released in 4B, 12B and 27B: what no shape shows is the same in all, but for the query scale."""
    from transformers import Gemma3TextConfig

    vocabulary, hidden = tensors["embed_tokens.weight"].shape
    head_dim = tensors["layers.0.self_attn.q_norm.weight"].shape[0]
    heads = tensors["layers.0.self_attn.q_proj.weight"].shape[0] // head_dim
    layers = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name)))
    return Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=tensors["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=tensors["layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        head_dim=head_dim,
        query_pre_attn_scalar=hidden // heads if hidden == 5376 else 256,  # 27B: 168
        rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=1024,
        sliding_window_pattern=6,
        max_position_embeddings=131072,
        rope_parameters={
            # The factor of 8 belongs to every released size from 4B up.
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )


def _tokenizer(file: SafetensorsFile, root: str | Path | None) -> Tokenizer | SentencePieceTokenizer:
    if root is not None:
        return load_tokenizer(Path(root))
    if "tokenizer_json" in file.tensors:
        return _wrap(FastTokenizer.from_buffer(file.read_bytes("tokenizer_json")))
    if "spiece_model" in file.tensors:
        return SentencePieceTokenizer(file.read_bytes("spiece_model"))
    raise UserError(
        f"{file.path} carries no tokenizer (no tensor 'tokenizer_json' or 'spiece_model'); give --gemma_root as "
        "well, a folder with Gemma's tokenizer"
    )


def _wrap(tokenizer: FastTokenizer) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    known = tokenizer.get_vocab()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        **{role: token for role, token in special.items() if token in known},
    )


class SentencePieceTokenizer:
    """As much of a Hugging Face tokenizer as :class:`~musubi_tuner.models.gemma.Gemma` asks for."""

    def __init__(self, proto: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._pieces = SentencePieceProcessor(model_proto=proto)
        self.bos_token_id: int = self._pieces.bos_id()
        self.eos_token_id: int = self._pieces.eos_id()
        self.pad_token_id: int | None = self._pieces.pad_id() if self._pieces.pad_id() >= 0 else None

    def __call__(self, text: str, *, truncation: bool, max_length: int | None) -> dict[str, list[int]]:
        # SentencePiece itself adds no beginning-of-sequence token; Gemma was trained with one.
        ids = [self.bos_token_id, *self._pieces.encode(text)]
        return {"input_ids": ids[:max_length] if truncation else ids}
