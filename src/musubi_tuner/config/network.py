"""Flags of the network that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .flag import flag

TargetPreset = Literal["t2v", "v2v", "audio", "audio_ref_only_ic", "full", "no_gates"]

LYCORIS = "lycoris.kohya"


@dataclass(frozen=True)
class NetworkConfig:
    """Network."""

    network_module: str = flag("networks.lora_ltx2", "network to train")
    network_dim: int | None = flag(None, "rank (not given: the network's default, 4)")
    network_alpha: float = flag(1.0, "the delta is scaled by alpha / rank")
    network_dropout: float | None = flag(None, "dropout on the rank dimension")
    network_args: tuple[str, ...] = flag((), "options of the network, key=value")
    network_weights: Path | None = flag(None, "start from this LoRA file")
    scale_weight_norms: float | None = flag(None, "largest Frobenius norm of a delta; larger ones are scaled back")
    ema_decay: float | None = flag(None, "keep a running average of the network, saved as *-ema.safetensors (0.99)")
    ema_update_every: int = flag(1, "optimizer steps between two updates of the running average")
    lora_target_preset: TargetPreset = flag("t2v", "which linear layers are adapted")
    dim_from_weights: bool = flag(False, "modules, ranks and alphas of --network_weights, whatever the flags say")
    base_weights: tuple[Path, ...] = flag((), "LoRA, DoRA or LyCORIS files to merge into the base model first")
    base_weights_multiplier: tuple[float, ...] = flag((), "strength of each of --base_weights; not given: 1")
    lycoris_config: Path | None = flag(None, "TOML file of a LyCORIS network (--network_module lycoris.kohya)")
    init_lokr_norm: float | None = flag(None, "deviation at which the second factor of LoKr starts; not given: 0")
    training_comment: str | None = flag(None, "free text for the metadata")
    metadata: bool = flag(True, "write the full training metadata into the LoRA file")
