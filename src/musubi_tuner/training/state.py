"""State folders: what a run needs to go on exactly where it stopped.

A folder holds safetensors and JSON only, so nothing in it can execute on loading::

    network.safetensors         trained parameters, in their training dtype
    optimizer.safetensors       optimizer tensors, named state/<parameter>/<key>
    training_state.json         counters, optimizer scalars, loss history, settings
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from musubi_tuner.common.atomic import atomic_path, is_partial, is_replaced, target_of, to_disk
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_STATE_FILE = "training_state.json"
_NETWORK_FILE = "network.safetensors"
_OPTIMIZER_FILE = "optimizer.safetensors"
_FOREIGN = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")  # accelerate's, as other trainers write them


@dataclass
class Progress:
    """Where a run is. Random numbers need no state: they are keyed by these counters and the seed."""

    seed: int
    global_step: int = 0
    epoch: int = 0  # 0-based epoch that the next batch belongs to
    batch_in_epoch: int = 0  # batches of that epoch that each process has been dealt
    batches_per_epoch: int = 0  # of the process that gets most
    skipped_steps: int = 0  # optimizer steps dropped for a non-finite loss or gradient
    epoch_losses: list[float] = field(default_factory=list)  # latest loss of each in-epoch step
    epoch_loss_index: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)  # fp16 gradient scaler
    audio_balance: dict[str, float] = field(default_factory=dict)  # running means of the audio balance
    audio_supervision: dict[str, int] = field(default_factory=dict)  # batches counted by the supervision monitor
    last_step: dict[str, float] = field(default_factory=dict)  # losses and rate of the latest step, for the sidecar


def save_state(
    folder: Path,
    *,
    progress: Progress,
    network: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parameter_names: list[str],
    settings: Mapping[str, Any],
) -> None:
    """Write a state folder aside and rename it.

    ``parameter_names`` are the optimizer's parameters in the order of its groups; ``settings`` are the values
    that must be equal when resuming.

    Raises:
        UserError: the optimizer holds NaN, which the next step would put into the weights.
    """
    tensors, scalars = _flatten_optimizer(optimizer, parameter_names)
    broken = next((name for name, t in tensors.items() if t.is_floating_point() and t.isnan().any()), None)
    if broken is not None:
        raise UserError(
            f"step {progress.global_step}: the optimizer's {broken} holds NaN; its state is not saved, resume from an "
            "earlier one with a lower --learning_rate"
        )
    document = {
        "format_version": FORMAT_VERSION,
        "progress": asdict(progress),
        "settings": dict(settings),
        "optimizer": scalars,
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_file({k: v.detach().cpu().contiguous() for k, v in network.items()}, temporary / _NETWORK_FILE)
        save_file(tensors, temporary / _OPTIMIZER_FILE)
        (temporary / _STATE_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            to_disk(file)


def read_progress(folder: Path) -> tuple[Progress, dict[str, Any], dict[str, Any]]:
    """(progress, settings, optimizer scalars) of a state folder.

    Raises:
        UserError: not a folder, not one of ours, or of another format version.
    """
    if folder.is_file():
        raise UserError(
            f"--resume {folder}: is a file, expected a state folder (NAME-state); to start from a LoRA file use "
            "--network_weights"
        )
    path = folder / _STATE_FILE
    if not path.is_file():
        raise UserError(f"{folder}: {_what_else(folder)}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version {document['format_version']}, expected {FORMAT_VERSION}; resume with the "
                "version of the trainer that wrote it"
            )
        found = Progress(**document["progress"]), document["settings"], document["optimizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); resume from another state folder") from None
    for name in (_NETWORK_FILE, _OPTIMIZER_FILE):
        SafetensorsFile(folder / name)  # says what is wrong with a file
    return found


def _what_else(folder: Path) -> str:
    """What a path is that is no state folder of ours."""
    foreign = next((name for name in _FOREIGN if (folder / name).is_file()), None)
    if foreign is not None:
        return (
            f"is a state of accelerate ({foreign}), as other trainers save it; such files can run code when they are "
            "read, so they are not. A new run can start from its LoRA: --network_weights "
            f"{folder / 'model.safetensors'}"
        )
    found = f"has no {_STATE_FILE}" if folder.is_dir() else "is not a folder"
    return f"{found}; expected a folder written by --save_state of this trainer"


def restore_network(folder: Path, network: nn.Module) -> None:
    """Put the trained parameters back.

    Raises:
        UserError: the folder belongs to a network of other modules, ranks or alphas.
    """
    saved, current = _load(folder / _NETWORK_FILE), network.state_dict()
    # An alpha is compared as well: it is a buffer, and the saved one would silently win over the flag.
    different = [
        name
        for name in {**saved, **current}
        if name not in saved
        or name not in current
        or saved[name].shape != current[name].shape
        or (name.endswith(".alpha") and saved[name] != current[name].cpu())
    ]
    if different:
        raise UserError(
            f"{folder}: its network differs from this run's in {len(different)} of {len(current)} tensors, e.g. "
            f"{different[0]}; use the same network flags (--network_dim, --network_alpha, targets)"
        )
    network.load_state_dict(saved)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path}: cannot be read ({error}); resume from another state folder") from None


def restore_optimizer(
    folder: Path, scalars: Mapping[str, Any], optimizer: torch.optim.Optimizer, parameter_names: list[str]
) -> None:
    """Put the optimizer's tensors and scalars back, exactly as they were.

    Raises:
        UserError: the folder belongs to another optimizer or to other parameters.
    """
    if scalars["class"] != type(optimizer).__name__:
        raise UserError(
            f"{folder}: holds the state of optimizer {scalars['class']}, but this run uses "
            f"{type(optimizer).__name__}; use the same --optimizer_type"
        )
    if scalars["parameters"] != parameter_names:
        raise UserError(
            f"{folder}: holds {len(scalars['parameters'])} trained tensors, but this run trains "
            f"{len(parameter_names)} others; use the same network flags"
        )
    tensors = _load(folder / _OPTIMIZER_FILE)
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(parameter_names):
        entries = dict(scalars["state"].get(name, {}))
        prefix = f"state/{name}/"
        entries |= {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if entries:
            state[index] = _nested(entries)
    reference = optimizer.state_dict()["param_groups"]
    groups = [{**saved, "params": now["params"]} for saved, now in zip(scalars["groups"], reference, strict=True)]
    groups = [{k: _untupled(v, now.get(k)) for k, v in g.items()} for g, now in zip(groups, reference, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _make_exact(optimizer, state)


def _untupled(value: Any, like: Any) -> Any:
    return tuple(value) if isinstance(like, tuple) and isinstance(value, list) else value


def _make_exact(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    # load_state_dict casts float state to the parameter's dtype; moments may be wider than their parameter.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        for key, value in entries.items():
            current = optimizer.state[parameters[index]].get(key)
            if isinstance(value, Tensor) and isinstance(current, Tensor) and current.dtype != value.dtype:
                optimizer.state[parameters[index]][key] = value.to(current.device)


def _leaves(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a/b", value) for nested dictionaries: bitsandbytes wraps its quantised state in one."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _flatten_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    document = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in document["state"].items():
        for key, value in _leaves(entries):
            if isinstance(value, Tensor):
                # A clone: safetensors refuses tensors that share memory (bitsandbytes' quantisation maps do).
                tensors[f"state/{names[index]}/{key}"] = value.detach().cpu().clone().contiguous()
            else:
                scalars.setdefault(names[index], {})[key] = value
    groups = [{k: v for k, v in g.items() if k != "params"} for g in document["param_groups"]]
    return tensors, {
        "class": type(optimizer).__name__,
        "parameters": names,
        "state": scalars,
        "groups": groups,
    }


def find_latest_state(output_dir: Path, output_name: str) -> Path | None:
    """The complete state folder of this name with the highest step, for ``--autoresume``."""
    # Not every name that starts like this one's: "style" must not go on from a state of "style2".
    ours = re.compile(re.escape(output_name) + r"(-\d{6,}|-step\d{8,})?-state")
    candidates = []
    for path in sorted(output_dir.glob("*-state*")):
        # A folder that was about to be replaced when the process ended is complete, under a name of its own.
        if not ours.fullmatch(target_of(path).name) or (is_partial(path) and not is_replaced(path)):
            continue
        try:
            progress, _, _ = read_progress(path)
        except UserError as error:
            logger.warning("--autoresume: skipping %s", error)
            continue
        candidates.append((progress.global_step, path))
    return max(candidates)[1] if candidates else None
