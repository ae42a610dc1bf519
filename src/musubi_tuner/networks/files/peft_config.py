"""PEFT's configuration of a LoRA file, which may tell alpha where the file itself does not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from musubi_tuner.common.errors import UserError
from musubi_tuner.common.text_files import read_text
from musubi_tuner.networks.names import diffusers_name

from .formats import Format

PEFT_METADATA = "lora_adapter_metadata"
_PEFT_CONFIG = "adapter_config.json"


def peft_config(path: Path, metadata: Mapping[str, str], fmt: Format) -> dict[str, Any]:
    """PEFT's configuration of a LoRA file: in its metadata, else in the file beside it; ``{}`` where there is none.

    Raises:
        UserError: it is not JSON.
    """
    try:
        if PEFT_METADATA in metadata:
            packed = json.loads(metadata[PEFT_METADATA])
            return {k.removeprefix("transformer."): v for k, v in packed.items()}
        beside = path.with_name(_PEFT_CONFIG)
        if fmt == "diffusers" and beside.is_file():
            return json.loads(read_text(beside))
    except json.JSONDecodeError as error:
        raise UserError(f"the LoRA's PEFT configuration is not JSON: {error}") from None
    return {}


def peft_alpha(config: Mapping[str, Any], name: str, rank: int) -> float | None:
    """alpha of a module by PEFT's rules: the first pattern that ends its path, else the common one."""
    alpha = config.get("lora_alpha")
    path = diffusers_name(name).partition(".")[2]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    if alpha is None:
        return None
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)
