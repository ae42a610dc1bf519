"""Flags of the Hugging Face Hub, and how a state folder on it is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .flag import flag

RepoType = Literal["model", "dataset", "space"]


@dataclass(frozen=True)
class HubConfig:
    """Hugging Face Hub."""

    huggingface_repo_id: str | None = flag(None, "upload each saved LoRA to this repository, OWNER/NAME")
    huggingface_repo_type: RepoType = flag("model", "kind of the repository")
    huggingface_path_in_repo: str | None = flag(None, "folder in the repository (not given: its root)")
    huggingface_token: str | None = flag(None, "access token (not given: that of hf auth login, or HF_TOKEN)")
    huggingface_repo_visibility: Literal["public", "private"] | None = flag(
        None, "of a repository that is created (not given: private)"
    )
    save_state_to_huggingface: bool = flag(False, "upload state folders as well")
    resume_from_huggingface: bool = flag(False, "--resume names a folder on the Hub: OWNER/NAME/PATH[:REVISION[:TYPE]]")
    async_upload: bool = flag(False, "go on training during uploads, except the last")


@dataclass(frozen=True)
class HubFolder:
    """A folder of a repository on the Hub."""

    repo_id: str
    path: str
    revision: str | None = None  # None: the main branch
    repo_type: RepoType = "model"


def hub_folder(text: str) -> HubFolder:
    """Read ``OWNER/NAME/PATH[:REVISION[:TYPE]]``.

    Raises:
        ValueError: with what was expected.
    """
    address, *options = text.split(":")
    parts = [p for p in address.replace("\\", "/").split("/") if p]
    revision, repo_type = (*options, "", "")[:2]
    if len(parts) < 3 or len(options) > 2 or repo_type not in ("", *get_args(RepoType)):
        raise ValueError(f"expected OWNER/NAME/PATH[:REVISION[:TYPE]], TYPE one of {', '.join(get_args(RepoType))}")
    return HubFolder("/".join(parts[:2]), "/".join(parts[2:]), revision or None, repo_type or "model")
