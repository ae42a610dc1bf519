"""The official video VAE described in diffusers' terms: configuration and parameter names.

Official metadata lists encoder and decoder as ``[name, params]`` blocks that alternate ``res_x``,
``compress_*``, ..., ``res_x``; diffusers' ``AutoencoderKLLTX2Video`` has lists per property instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from musubi_tuner.common.errors import UserError

Block = tuple[str, dict[str, Any]]

_DOWN = {
    "compress_space_res": "spatial",
    "compress_time_res": "temporal",
    "compress_all_res": "spatiotemporal",
}
_UP = {"compress_space": "spatial", "compress_time": "temporal", "compress_all": "spatiotemporal"}


def _res(*layers: int) -> list[list[Any]]:
    return [["res_x", {"num_layers": n}] for n in layers]


def _alternate(res: Sequence[Any], compress: Sequence[Any]) -> list[Any]:
    return [block for pair in zip(res, compress, strict=False) for block in pair] + [res[-1]]


# The released VAEs, for files that have lost their metadata.
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "2.0": {
        "encoder_blocks": _alternate(
            _res(4, 6, 6, 2, 2),
            [
                ["compress_space_res", {"multiplier": 2}],
                ["compress_time_res", {"multiplier": 2}],
                ["compress_all_res", {"multiplier": 2}],
                ["compress_all_res", {"multiplier": 2}],
            ],
        ),
        "decoder_blocks": _alternate(_res(5, 5, 5, 5), [["compress_all", {"residual": True, "multiplier": 2}]] * 3),
    },
    "2.3": {
        "encoder_blocks": _alternate(
            _res(4, 6, 4, 2, 2),
            [
                ["compress_space_res", {"multiplier": 2}],
                ["compress_time_res", {"multiplier": 2}],
                ["compress_all_res", {"multiplier": 2}],
                ["compress_all_res", {"multiplier": 1}],
            ],
        ),
        "decoder_blocks": _alternate(
            _res(4, 6, 4, 2, 2),
            [
                ["compress_space", {"multiplier": 2}],
                ["compress_time", {"multiplier": 2}],
                ["compress_all", {"multiplier": 1}],
                ["compress_all", {"multiplier": 2}],
            ],
        ),
        "spatial_padding_mode": "zeros",
    },
}


def infer_config(names: Iterable[str]) -> dict[str, Any]:
    """Metadata of the released VAE that has these parameters: 2.3 (and 2.5) has one more level.

    The halves differ by the depth of their first residual stacks when only one of them is at hand.
    """
    names = set(names)
    deep_decoder = any(name.startswith("decoder.up_blocks.8.") for name in names)
    encoder_only = not any(name.startswith("decoder.") for name in names)
    shallow_encoder = not any(name.startswith("encoder.down_blocks.4.res_blocks.4.") for name in names)
    return KNOWN_CONFIGS["2.3" if deep_decoder or (encoder_only and shallow_encoder) else "2.0"]


def diffusers_config(section: Mapping[str, Any], *, timestep_conditioning: bool = False) -> dict[str, Any]:
    """Arguments of ``AutoencoderKLLTX2Video`` from the metadata section ``vae``.

    Raises:
        UserError: the section describes a VAE that the class cannot represent.
    """
    flat = _flatten_nested(section)
    _refuse_unsupported(flat)
    latent = flat.get("latent_channels", 128)
    patch = flat.get("patch_size", 4)
    encoder_res, down = _split_blocks(flat["encoder_blocks"], _DOWN, "encoder_blocks")
    decoder_res, up = _split_blocks(flat["decoder_blocks"], _UP, "decoder_blocks")
    padding = flat.get("spatial_padding_mode")
    down_types = [_DOWN[name] for name, _ in down]
    return {
        "in_channels": flat.get("in_channels", 3),
        "out_channels": flat.get("out_channels", 3),
        "latent_channels": latent,
        "patch_size": patch,
        "patch_size_t": 1,
        "resnet_norm_eps": 1e-6,
        "scaling_factor": 1.0,
        "timestep_conditioning": timestep_conditioning,
        "layers_per_block": [p["num_layers"] for _, p in encoder_res],
        "downsample_type": down_types,
        "down_block_types": ["LTX2VideoDownBlock3D"] * len(down),
        "spatio_temporal_scaling": [True] * len(down),
        "block_out_channels": _products(latent, [p.get("multiplier", 2) for _, p in down]),
        "encoder_causal": True,
        "encoder_spatial_padding_mode": flat.get("encoder_spatial_padding_mode") or padding or "zeros",
        # The decoder is listed from the output inwards. diffusers turns most lists round itself, but not
        # upsample_type.
        "decoder_layers_per_block": [p["num_layers"] for _, p in decoder_res],
        "decoder_inject_noise": [bool(p.get("inject_noise", False)) for _, p in decoder_res],
        "decoder_spatio_temporal_scaling": [True] * len(up),
        "decoder_block_out_channels": _products(
            flat.get("decoder_base_channels", 128), [p.get("multiplier", 1) for _, p in up]
        ),
        "upsample_type": [_UP[name] for name, _ in reversed(up)],
        "upsample_factor": [p.get("multiplier", 1) for _, p in up],
        "upsample_residual": [bool(p.get("residual", False)) for _, p in up],
        "decoder_causal": bool(flat.get("causal_decoder", False)),
        "decoder_spatial_padding_mode": flat.get("decoder_spatial_padding_mode") or padding or "reflect",
        "spatial_compression_ratio": patch * 2 ** sum(t != "temporal" for t in down_types),
        "temporal_compression_ratio": 2 ** sum(t != "spatial" for t in down_types),
    }


def to_diffusers_name(name: str, config: Mapping[str, Any]) -> str | None:
    """diffusers' name of an official parameter (``vae.`` removed); ``None`` for one that is not used.

    ``config`` is that of :func:`diffusers_config`.
    """
    if name.startswith("per_channel_statistics."):
        return {"mean-of-means": "latents_mean", "std-of-means": "latents_std"}.get(name.partition(".")[2])
    if match := re.fullmatch(r"(encoder\.down_blocks|decoder\.up_blocks)\.(\d+)\.(.+)", name):
        blocks, index, rest = match[1], int(match[2]), match[3].replace("res_blocks.", "resnets.", 1)
        return f"{_block_name(blocks, index, config)}.{rest}"
    name = name.replace("decoder.last_time_embedder.", "decoder.time_embedder.", 1)
    return name.replace("decoder.last_scale_shift_table", "decoder.scale_shift_table", 1)


def to_official_name(name: str, config: Mapping[str, Any]) -> str:
    """Inverse of :func:`to_diffusers_name`."""
    if name in ("latents_mean", "latents_std"):
        return "per_channel_statistics." + {"latents_mean": "mean-of-means", "latents_std": "std-of-means"}[name]
    count = {
        "encoder.down_blocks": 2 * len(config["layers_per_block"]) - 1,
        "decoder.up_blocks": 2 * len(config["decoder_layers_per_block"]) - 1,
    }
    for blocks, number in count.items():
        for index in range(number):
            own = _block_name(blocks, index, config) + "."
            rest = name.removeprefix(own)
            # A residual stack and the sampler inside it share a prefix: "up_blocks.0." and
            # "up_blocks.0.upsamplers.0."
            if rest != name and not rest.startswith(("upsamplers.", "downsamplers.")):
                return f"{blocks}.{index}.{rest.replace('resnets.', 'res_blocks.', 1)}"
    name = name.replace("decoder.time_embedder.", "decoder.last_time_embedder.", 1)
    return re.sub(r"^decoder\.scale_shift_table", "decoder.last_scale_shift_table", name)


def _block_name(blocks: str, index: int, config: Mapping[str, Any]) -> str:
    """diffusers' place of entry ``index`` of an official block list."""
    if blocks == "encoder.down_blocks":
        if index == 2 * len(config["layers_per_block"]) - 2:
            return "encoder.mid_block"
        return f"{blocks}.{index // 2}" + (".downsamplers.0" if index % 2 else "")
    if index == 0:
        return "decoder.mid_block"
    return f"{blocks}.{(index - 1) // 2}" + (".upsamplers.0" if index % 2 else "")


def _flatten_nested(section: Mapping[str, Any]) -> dict[str, Any]:
    """The 2.5 layout has ``encoder`` and ``decoder`` sub-sections with ``blocks``."""
    flat = dict(section)
    for half in ("encoder", "decoder"):
        nested = section.get(half)
        if not isinstance(nested, Mapping):
            continue
        if "blocks" in nested:
            flat[f"{half}_blocks"] = nested["blocks"]
        if "spatial_padding_mode" in nested:
            flat[f"{half}_spatial_padding_mode"] = nested["spatial_padding_mode"]
        if half == "encoder":
            flat["latent_channels"] = nested.get("out_channels", flat.get("latent_channels", 128))
            for key in ("in_channels", "patch_size", "norm_layer", "latent_log_var"):
                if key in nested:
                    flat[key] = nested[key]
        elif "base_channels" in nested:
            flat["decoder_base_channels"] = nested["base_channels"]
    return flat


def _refuse_unsupported(flat: Mapping[str, Any]) -> None:
    for key, only in (("dims", 3), ("norm_layer", "pixel_norm"), ("latent_log_var", "uniform")):
        if flat.get(key, only) != only:
            raise UserError(f"video VAE: {key} is {flat[key]!r} in the checkpoint's metadata; only {only!r} is known")
    for key in ("encoder_blocks", "decoder_blocks"):
        if not flat.get(key):
            raise UserError(f"video VAE: the checkpoint's metadata section 'vae' has no {key}")


def _split_blocks(blocks: Sequence[Any], kinds: Mapping[str, str], title: str) -> tuple[list[Block], list[Block]]:
    """The residual stacks and the resampling blocks between them."""
    parsed = [(name, {"num_layers": p} if isinstance(p, int) else dict(p)) for name, p in blocks]
    res, compress = parsed[0::2], parsed[1::2]
    if len(parsed) % 2 == 0 or any(n != "res_x" for n, _ in res) or any(n not in kinds for n, _ in compress):
        raise UserError(
            f"video VAE: {title} is {[name for name, _ in parsed]}; expected res_x alternating with "
            f"{', '.join(kinds)}, starting and ending with res_x"
        )
    return res, compress


def _products(first: int, factors: Sequence[int]) -> list[int]:
    return [first * math.prod(factors[: i + 1]) for i in range(len(factors))]
