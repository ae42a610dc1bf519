"""What every way of loading Gemma shares: folders, tokenizers, key names, the empty text model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from musubi_tuner.common.errors import UserError

from .component_loading import build_empty

if TYPE_CHECKING:  # transformers takes a second or two to import, and few runs encode prompts
    from transformers import PretrainedConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Heads of language model keys, most specific first: multimodal export, Transformers 5, text-only export.
_LANGUAGE_MODEL_PREFIXES = ("language_model.model.", "model.language_model.", "model.")


def find_model_folder(root: Path) -> Path:
    """The folder at or below ``root`` that holds ``model*.safetensors`` and ``config.json``.

    Raises:
        UserError: there is none, or more than one.
    """
    return _find_folder(root, "model*.safetensors", "the weights (model*.safetensors) beside a config.json", True)


def load_config(folder: Path) -> PretrainedConfig:
    """The ``config.json`` of a Gemma folder.

    Raises:
        UserError: it is damaged, or of another kind of model.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # missing or wrong entries raise all kinds
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{file}: not a readable configuration ({reason}); download it again") from error
    if not config.model_type.startswith("gemma"):
        raise UserError(f"{file}: is of a model of type {config.model_type}; expected Gemma 3, give its folder")
    return config


def load_tokenizer(root: Path) -> Tokenizer:
    """The tokenizer at or below ``root``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer.model"):
        if root.is_dir() and any(root.rglob(name)):
            folder = _find_folder(root, name, "a tokenizer", False)
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # the tokenizer libraries raise all kinds
                raise UserError(
                    f"{folder / name}: not a readable tokenizer ({type(error).__name__}: {error}); download it again"
                ) from error
    raise UserError(f"{root} has no tokenizer (tokenizer.json or tokenizer.model); give a complete Gemma folder")


def _find_folder(root: Path, pattern: str, what: str, with_config: bool) -> Path:
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected the Hugging Face folder of Gemma")
    folders = sorted({file.parent for file in root.rglob(pattern)}, key=lambda folder: len(folder.parts))
    if with_config:
        folders = [folder for folder in folders if (folder / "config.json").is_file()]
    if not folders:
        raise UserError(f"{root} does not hold {what}; expected the Hugging Face folder of Gemma")
    if len(folders) > 1 and len(folders[0].parts) == len(folders[1].parts):
        raise UserError(f"{root} holds {what} twice, in {folders[0]} and {folders[1]}; name one of them")
    return folders[0]


def language_model_name(key: str) -> str | None:
    """Name inside the text model of a key of any Gemma export; ``None`` for vision, head and tokenizer."""
    for prefix in _LANGUAGE_MODEL_PREFIXES:
        name = key.removeprefix(prefix)
        if name != key and name.startswith(("embed_tokens.", "layers.", "norm.")):
            return name
    return None


def build_text_model(config: PretrainedConfig) -> nn.Module:
    """The language model of ``config`` with its parameters on the meta device."""
    from transformers import AutoModel

    text_config = config.get_text_config()
    # fp32 while building: the rotary frequencies are computed here and must not be rounded.
    return build_empty(lambda: AutoModel.from_config(text_config, dtype=torch.float32))
