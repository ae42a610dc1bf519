"""Rules of saving, resuming and uploading."""

from __future__ import annotations

from collections.abc import Iterable

from .hub import HubConfig, hub_folder
from .rules_common import missing
from .saving import SaveConfig


def resume_exists(save: SaveConfig, hub: HubConfig) -> Iterable[str]:
    """``--resume`` names a folder that is there, or one on the Hub."""
    if not hub.resume_from_huggingface:
        yield from missing({"resume": save.resume})
        return
    if save.resume is None:
        yield "--resume_from_huggingface needs --resume OWNER/NAME/PATH[:REVISION[:TYPE]]"
        return
    try:
        hub_folder(str(save.resume))
    except ValueError as error:
        yield f"--resume {save.resume}: {error}"


def rotation(save: SaveConfig) -> Iterable[str]:
    """Files are removed only as others are written."""
    kept = {
        "save_last_n_epochs": (save.save_last_n_epochs, "save_every_n_epochs", save.save_every_n_epochs),
        "save_last_n_epochs_state": (save.save_last_n_epochs_state, "save_every_n_epochs", save.save_every_n_epochs),
        "save_last_n_steps": (save.save_last_n_steps, "save_every_n_steps", save.save_every_n_steps),
        "save_last_n_steps_state": (save.save_last_n_steps_state, "save_every_n_steps", save.save_every_n_steps),
    }
    for name, (keep, needed, every) in kept.items():
        if keep is not None and every is None:
            yield f"--{name} needs --{needed}"


def uploads(save: SaveConfig, hub: HubConfig) -> Iterable[str]:
    """Flags that only matter to uploads, without one."""
    if hub.huggingface_repo_id is not None:
        if hub.huggingface_repo_id.count("/") != 1:
            yield f"--huggingface_repo_id {hub.huggingface_repo_id}: expected OWNER/NAME"
        if hub.save_state_to_huggingface and not (save.save_state or save.save_state_on_train_end):
            yield "--save_state_to_huggingface needs --save_state or --save_state_on_train_end"
        return
    asked = {
        "huggingface_path_in_repo": hub.huggingface_path_in_repo,
        "huggingface_repo_visibility": hub.huggingface_repo_visibility,
        "save_state_to_huggingface": hub.save_state_to_huggingface,
        "async_upload": hub.async_upload,
    }
    yield from (f"--{name} needs --huggingface_repo_id" for name, value in asked.items() if value)
