"""Uploads to and downloads from the Hugging Face Hub. What fails is logged and does not stop a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import huggingface_hub

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.hub import HubConfig, HubFolder

logger = logging.getLogger(__name__)

# All that a state folder holds; nothing else is taken from a repository.
_STATE_FILES = ("*.safetensors", "*.json")


class HubApi(Protocol):
    """What is used of ``huggingface_hub.HfApi``."""

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> object: ...
    def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str, repo_type: str) -> object: ...
    def upload_folder(self, *, folder_path: Path, path_in_repo: str, repo_id: str, repo_type: str) -> object: ...


class Uploader:
    """Sends files and folders to one repository, one after the other."""

    def __init__(self, config: HubConfig, api: HubApi) -> None:
        self._config, self._api = config, api
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._latest: Future[object] | None = None  # of what is done one after the other

    def create_repository(self) -> None:
        """Make the repository unless it exists: private, if not asked to be public."""
        config = self._config
        self._try(
            f"creating the repository {config.huggingface_repo_id}",
            lambda: self._api.create_repo(
                config.huggingface_repo_id,
                repo_type=config.huggingface_repo_type,
                private=config.huggingface_repo_visibility != "public",
                exist_ok=True,
            ),
        )

    def upload(self, paths: Iterable[Path], *, wait: bool) -> None:
        """Send files and folders; the last of a run are waited for, and others too without ``--async_upload``."""
        for path in paths:
            self._latest = self._executor.submit(self._send, path)
        if self._latest is not None and (wait or not self._config.async_upload):
            self._latest.result()

    def when_sent(self, what: str, action: Callable[[], object]) -> None:
        """Call ``action`` once all is sent that was to be sent so far: at once, or later in the uploading thread.

        So nothing is removed that has yet to be uploaded, and training does not wait for the network.
        """
        if self._latest is None or self._latest.done():
            action()
        else:
            self._latest = self._executor.submit(self._try, what, action)

    def close(self) -> None:
        """Wait for what is still being sent."""
        self._executor.shutdown()

    def _send(self, path: Path) -> None:
        config = self._config
        parts = [*(config.huggingface_path_in_repo or "").replace("\\", "/").split("/"), path.name]
        place = "/".join(p for p in parts if p)
        common = {
            "path_in_repo": place,
            "repo_id": config.huggingface_repo_id,
            "repo_type": config.huggingface_repo_type,
        }
        send = (
            (lambda: self._api.upload_folder(folder_path=path, **common))
            if path.is_dir()
            else (lambda: self._api.upload_file(path_or_fileobj=path, **common))
        )
        if self._try(f"uploading {path.name} to {config.huggingface_repo_id}", send):
            logger.info("uploaded %s to %s/%s", path.name, config.huggingface_repo_id, place)

    def _try(self, what: str, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception as error:  # whatever the network or the Hub says, the files are safe on the disk
            logger.error("%s failed: %s", what, _without_token(error, self._config.huggingface_token))
            return False
        return True


def make_uploader(config: HubConfig) -> Uploader | None:
    """An uploader if a repository is given."""
    if config.huggingface_repo_id is None:
        return None
    return Uploader(config, huggingface_hub.HfApi(token=config.huggingface_token))


def download_state(folder: HubFolder, token: str | None) -> Path:
    """Fetch a state folder; returns where it lies.

    Raises:
        UserError: it cannot be fetched, or is not there.
    """
    try:
        root = huggingface_hub.snapshot_download(
            folder.repo_id,
            repo_type=folder.repo_type,
            revision=folder.revision,
            allow_patterns=[f"{folder.path}/{pattern}" for pattern in _STATE_FILES],
            token=token,
        )
    except Exception as error:  # network, rights, a missing repository or revision: many classes, one meaning
        raise UserError(
            f"--resume {folder.repo_id}/{folder.path}: cannot be fetched from the Hub "
            f"({_without_token(error, token)}); check the name, --huggingface_token and the connection"
        ) from None
    path = Path(root, folder.path)
    if not path.is_dir():
        raise UserError(f"--resume: the repository {folder.repo_id} has no folder {folder.path}")
    return path


def _without_token(error: Exception, token: str | None) -> str:
    text = f"{type(error).__name__}: {error}"
    return text.replace(token, "***") if token else text
