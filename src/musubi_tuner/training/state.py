"""State folders: what a run needs to go on exactly where it stopped.

A folder holds safetensors and JSON only, so nothing in it can execute on loading::

    network.safetensors         trained parameters, in their training dtype
    optimizer.safetensors       optimizer tensors, named state/<parameter>/<key>
    ema.safetensors             running average of the parameters, where there is one
    training_state.json         counters, optimizer scalars, loss history, settings
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from musubi_tuner.common.atomic import atomic_path, is_partial, is_replaced, target_of, to_disk
from musubi_tuner.common.dtypes import dtype_name
from musubi_tuner.common.errors import UserError
from musubi_tuner.common.safetensors_io import SafetensorsFile

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_STATE_FILE = "training_state.json"
_NETWORK_FILE = "network.safetensors"
_OPTIMIZER_FILE = "optimizer.safetensors"
_AVERAGE_FILE = "ema.safetensors"
_TENSOR, _TUPLE = "__tensor__", "__tuple__"  # what stands in the JSON for them
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

    @property
    def is_between_epochs(self) -> bool:
        """Whether an epoch has ended and the next has not begun, so that what is due after an epoch is due here.

        A state that is saved here may be the last thing that its run did, with what was due still ahead.
        """
        return self.epoch > 0 and self.batch_in_epoch == 0

    @property
    def epoch_loss(self) -> float:
        """Mean over the latest loss of each in-epoch step; 0 before the first."""
        return sum(self.epoch_losses) / max(1, len(self.epoch_losses))


def save_state(
    folder: Path,
    *,
    progress: Progress,
    network: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parameter_names: list[str],
    settings: Mapping[str, Any],
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a state folder aside and rename it.

    ``parameter_names`` are the optimizer's parameters in the order of its groups; ``settings`` are the values
    that must be equal when resuming; ``average`` is a running average of the weights.

    Raises:
        UserError: the optimizer keeps something that is neither tensor nor plain value, or NaN, which the next step
            would put into the weights.
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
        if average is not None:
            save_file({k: v.detach().cpu().contiguous() for k, v in average.items()}, temporary / _AVERAGE_FILE)
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
    averages = [_AVERAGE_FILE] if (folder / _AVERAGE_FILE).exists() else []
    for name in (_NETWORK_FILE, _OPTIMIZER_FILE, *averages):
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
    states = sorted(path.parent.name for path in folder.glob(f"*/{_STATE_FILE}"))
    inside = f"; it holds {', '.join(states)}: give the path of one of these" if states else ""
    return f"{found}; expected a folder written by --save_state of this trainer{inside}"


def check_network(folder: Path, network: nn.Module, *, later: tuple[str, ...] = ()) -> None:
    """Hold what a folder says of its network against one, without reading its weights.

    ``later``: ends of the names of tensors that the network does not have yet, and that are not compared.

    Raises:
        UserError: the folder belongs to a network of other modules, ranks or alphas.
    """
    file, current = SafetensorsFile(folder / _NETWORK_FILE), network.state_dict()
    saved = {name: info for name, info in file.tensors.items() if not name.endswith(later)}
    # An alpha is compared as well: it is a buffer, and the saved one would silently win over the flag.
    alphas = dict(file.read(name for name in saved if name.endswith(".alpha")))
    found = {name: _described(info.shape, info.dtype, alphas.get(name)) for name, info in saved.items()}
    wanted = {
        name: _described(tensor.shape, tensor.dtype, tensor if name in alphas else None)
        for name, tensor in current.items()
    }
    different = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{folder}: its network differs from this run's in {len(different)} of {len(current)} tensors: {name} is "
            f"{found.get(name, 'not there')}, here {wanted.get(name, 'not there')}; use the same network flags "
            "(--network_dim, --network_alpha, targets, --full_fp16, --full_bf16)"
        )


def _described(shape: Iterable[int], dtype: torch.dtype, value: Tensor | None) -> str:
    return f"{list(shape) if value is None else value.tolist()} ({dtype_name(dtype)})"


def restore_network(folder: Path, network: nn.Module) -> None:
    """Put the trained parameters back.

    Raises:
        UserError: the folder cannot be read, or belongs to another network.
    """
    saved = _load(folder / _NETWORK_FILE)
    check_network(folder, network)
    network.load_state_dict(saved)


def load_average(folder: Path) -> dict[str, Tensor] | None:
    """The running average that a state folder holds, if it holds one."""
    path = folder / _AVERAGE_FILE
    return _load(path) if path.exists() else None


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path}: cannot be read ({error}); resume from another state folder") from None


def check_optimizer(
    folder: Path, scalars: Mapping[str, Any], optimizer: torch.optim.Optimizer, parameter_names: list[str]
) -> None:
    """Hold the scalars of a folder against an optimizer.

    Raises:
        UserError: the folder belongs to another optimizer, to other parameters or to other groups of them.
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
    num_saved, num_groups = len(scalars["groups"]), len(optimizer.param_groups)
    if num_saved != num_groups:
        raise UserError(
            f"{folder}: holds {num_saved} groups of parameters, but this run has {num_groups}; use the same "
            "--audio_lr, --lr_args and --network_args"
        )


def restore_optimizer(
    folder: Path, scalars: Mapping[str, Any], optimizer: torch.optim.Optimizer, parameter_names: list[str]
) -> None:
    """Put the optimizer's tensors and scalars back, exactly as they were.

    Raises:
        UserError: the folder cannot be read, or belongs to another optimizer.
    """
    check_optimizer(folder, scalars, optimizer, parameter_names)
    tensors = _load(folder / _OPTIMIZER_FILE)
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(parameter_names):
        entries = {k: _decode(v, tensors) for k, v in scalars["state"].get(name, {}).items()}
        if entries:
            state[index] = entries
    reference = optimizer.state_dict()["param_groups"]
    pairs = zip(scalars["groups"], reference, strict=True)
    groups = [_group(saved, now, tensors) for saved, now in pairs]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _make_exact(optimizer, state)


def _group(saved: Mapping[str, Any], now: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A parameter group as it was, with this run's parameters and labels."""
    kept = {k: now[k] for k in ("params", "label") if k in now}
    return {k: _decode(v, tensors) for k, v in saved.items()} | kept


def _make_exact(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    # load_state_dict casts float state to the parameter's dtype; moments may be wider than their parameter.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        current = optimizer.state[parameters[index]]
        for key, value in entries.items():
            if key in current:
                current[key] = _exact(value, current[key])


def _exact(saved: Any, current: Any) -> Any:
    """``current`` in the dtype in which it was saved, on the device to which it was moved."""
    if isinstance(saved, Tensor) and isinstance(current, Tensor) and saved.dtype != current.dtype:
        return saved.to(current.device)
    if isinstance(saved, (list, tuple)) and isinstance(current, (list, tuple)):
        return type(saved)(_exact(s, c) for s, c in zip(saved, current, strict=True))
    return current


def _flatten_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, everything else with the names of the tensors in their places)."""
    document = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    state = {
        names[index]: {k: _encode(v, f"state/{names[index]}/{k}", tensors, optimizer) for k, v in entries.items()}
        for index, entries in document["state"].items()
    }
    groups = [
        {k: _encode(v, f"group/{index}/{k}", tensors, optimizer) for k, v in group.items() if k != "params"}
        for index, group in enumerate(document["param_groups"])
    ]
    return tensors, {"class": type(optimizer).__name__, "parameters": names, "state": state, "groups": groups}


def _encode(value: Any, path: str, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Any:
    """``value`` as JSON holds it; tensors in it go to ``tensors`` and leave their name behind."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        # A clone: safetensors refuses tensors that share memory (bitsandbytes' quantisation maps do).
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: path}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, f"{path}/{i}", tensors, optimizer) for i, v in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _encode(v, f"{path}/{k}", tensors, optimizer) for k, v in value.items()}
    raise UserError(
        f"{type(optimizer).__name__} keeps a {type(value).__name__} ({path}), which a state folder cannot hold: train "
        "without --save_state, or with another --optimizer_type"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`_encode`."""
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_decode(v, tensors) for v in value[_TUPLE])
    return {k: _decode(v, tensors) for k, v in value.items()}


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
