"""The Gemma text encoder: prompts to the hidden states of every layer.

Only the language model is built, from a Hugging Face folder or from one safetensors file, and streamed to its
device shard by shard; the vision tower, the projector and the output head are not read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.progress import bytes_progress
from musubi_tuner.common.safetensors_io import SafetensorsFile

from .component_loading import fill
from .gemma_parts import build_text_model, find_model_folder, language_model_name, load_config, load_tokenizer
from .gemma_single_file import load_single_file

if TYPE_CHECKING:  # transformers takes a second or two to import, and few runs encode prompts
    from transformers import BitsAndBytesConfig, PretrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

logger = logging.getLogger(__name__)

MAX_LENGTH = 1024  # tokens of a padded prompt; a multiple of the connectors' registers
_TRIM_MULTIPLE = 64  # prompts of a batch are computed at this granularity instead of at full length


@dataclass(frozen=True)
class Quantization:
    """bitsandbytes quantisation of the text encoder."""

    bits: Literal[4, 8]
    quant_type: Literal["nf4", "fp4"] = "nf4"  # 4-bit only
    double_quant: bool = True  # 4-bit only
    compute_dtype: torch.dtype | None = None  # 4-bit only; None: that of the model


class Gemma:
    """A Gemma language model with its tokenizer.

    Attributes:
        hidden_size: width of a state (3840 for 12B).
        num_states: layers + 1 (49 for 12B): the embedding, every layer, the last one after the final norm.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, *, max_length: int = MAX_LENGTH) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.hidden_size: int = model.config.hidden_size
        self.num_states: int = model.config.num_hidden_layers + 1
        self._quantised = bool(getattr(model, "is_quantized", False))

    @property
    def device(self) -> torch.device:
        return self._model.get_input_embeddings().weight.device

    def to(self, device: torch.device | str) -> Gemma:
        """Move the weights; a quantised model stays where it is."""
        if not self._quantised:
            self._model.to(device)
        return self

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both [B, max_length] int64: beginning-of-sequence first, padded on the left."""
        bos, pad = self._tokenizer.bos_token_id, self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        ids = torch.full((len(prompts), self.max_length), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self._tokenizer(prompt.strip(), truncation=True, max_length=self.max_length)["input_ids"]
            if bos is not None and tokens[:1] != [bos]:  # Gemma 4's tokenizer adds none
                tokens = [bos, *tokens][: self.max_length]
            ids[row, self.max_length - len(tokens) :] = torch.tensor(tokens)
            mask[row, self.max_length - len(tokens) :] = 1
        return ids, mask

    def excess_tokens(self, prompt: str) -> int:
        """Tokens of a prompt beyond ``max_length``, which are not read."""
        text = prompt.strip()
        num_bytes = len(text.encode("utf-8", "replace"))
        if num_bytes < self.max_length:  # a token is a byte at least
            return 0
        # Without a limit the tokenizer warns that the model would fail, which is not given so many.
        tokens = self._tokenizer(text, truncation=True, max_length=num_bytes + 2)["input_ids"]
        begins = self._tokenizer.bos_token_id in (None, tokens[0])
        return max(len(tokens) + (not begins) - self.max_length, 0)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """All hidden states [B, max_length, D, L] and the token mask [B, max_length] int64.

        Only as many positions are computed as the longest prompt of the call needs; the padding before them is
        zero. Positions are counted as in the full row, so every token gets the embedding it would have there.
        """
        ids, mask = self.tokenize(prompts)
        longest = int(mask.sum(dim=1).max())
        kept = min(self.max_length, -(-longest // _TRIM_MULTIPLE) * _TRIM_MULTIPLE)
        first = self.max_length - kept
        output = self._model(
            input_ids=ids[:, first:].to(self.device),
            attention_mask=mask[:, first:].to(self.device),
            position_ids=torch.arange(first, self.max_length, device=self.device)[None].expand(len(prompts), -1),
            output_hidden_states=True,
            use_cache=False,
        )
        states = torch.stack(output.hidden_states, dim=-1)  # [B, kept, D, L]
        return F.pad(states, (0, 0, 0, 0, first, 0)), mask.to(states.device)


def load_gemma(
    root: str | Path | None,
    *,
    safetensors: str | Path | None = None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: Quantization | None = None,
    offload_weights: bool = True,
    max_length: int = MAX_LENGTH,
) -> Gemma:
    """Load the text encoder.

    Args:
        root: Hugging Face folder (searched recursively) with config, weights and tokenizer; beside
            ``safetensors`` it gives the tokenizer and the config only.
        safetensors: one file with the language model, perhaps fp8, perhaps with its tokenizer.
        dtype: of the weights; fp8 linear weights of a single file stay fp8 and compute in it.
        device: where it runs; quantised models need CUDA.
        quantization: through bitsandbytes, folders only.
        offload_weights: keep the fp8 weights of a single file on the CPU between uses.
        max_length: tokens to which prompts are padded.

    Raises:
        UserError: nothing to load, files that are missing or do not belong together, options that exclude
            each other.
    """
    if root is None and safetensors is None:
        raise UserError("no text encoder: give --gemma_root (a Gemma folder) or --gemma_safetensors (one file)")
    if quantization is not None:
        check_quantization(quantization, device, single_file=safetensors is not None)
    if safetensors is not None:
        model, tokenizer = load_single_file(
            safetensors, root=root, dtype=dtype, device=device, offload_weights=offload_weights
        )
        return Gemma(model, tokenizer, max_length=max_length)
    assert root is not None
    folder = find_model_folder(Path(root))
    config = load_config(folder)  # before the tokenizer, whose library would blame itself
    tokenizer = load_tokenizer(Path(root))
    if quantization is not None:
        return Gemma(_load_quantised(folder, quantization, dtype, device), tokenizer, max_length=max_length)
    return Gemma(_load_folder(folder, config, dtype=dtype, device=device), tokenizer, max_length=max_length)


def check_quantization(quantization: Quantization, device: torch.device | str, *, single_file: bool = False) -> None:
    """Raise what can be known before loading.

    Raises:
        UserError: with a single file, without CUDA, or without bitsandbytes.
    """
    flag = f"--gemma_load_in_{quantization.bits}bit"
    if single_file:
        raise UserError(f"{flag} works with --gemma_root only; a single file is loaded as it is stored")
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        raise UserError(f"{flag} needs a CUDA device, got {device}; leave it out to load Gemma unquantised")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(f'{flag} needs bitsandbytes: pip install "bitsandbytes>=0.48"') from None


def _load_folder(
    folder: Path, config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Stream the shards into the text model.

    ``from_pretrained`` of the text class would not do: it finds none of the keys of a multimodal folder and
    leaves random weights behind, with only a report printed.
    """
    if getattr(config, "quantization_config", None):
        raise UserError(f"{folder} is already quantised; use the original folder, with --gemma_load_in_8bit or 4bit")
    model = build_text_model(config)
    shards = [SafetensorsFile(path) for path in sorted(folder.glob("model*.safetensors"))]
    tensors = _read_language_model(shards, dtype=dtype, device=device)
    return fill(model, tensors, source=f"{folder}: Gemma", device=device)


def _read_language_model(
    shards: Sequence[SafetensorsFile], *, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[str, Tensor]]:
    for shard in shards:
        names = {key: name for key in shard.tensors if (name := language_model_name(key)) is not None}
        sizes = {key: shard.tensors[key].nbytes for key in names}
        tensors = shard.read(names, device=device, dtype=dtype)
        for key, tensor in bytes_progress(tensors, sizes, desc=f"Gemma, {shard.path.name}"):
            yield names[key], tensor


def _load_quantised(
    folder: Path, quantization: Quantization, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Through Transformers, which quantises while it loads; only the language model is kept."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        local_files_only=True,
        dtype=dtype,
        device_map={"": torch.device(device)},
        quantization_config=_bitsandbytes_config(quantization, dtype),
    )
    text_model = model.model.language_model
    text_model.is_quantized = True
    return text_model.eval().requires_grad_(False)


def _bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=quantization.compute_dtype or dtype,
    )
