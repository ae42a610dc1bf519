"""Which model version's defaults apply."""

from __future__ import annotations

import logging

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.model import VersionConfig
from musubi_tuner.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


def resolve_version(config: VersionConfig, *, explicit: bool, checkpoint: Checkpoint) -> str:
    """``--ltx_version`` held against the checkpoint; not given, the checkpoint decides.

    Raises:
        UserError: they disagree and ``--ltx_version_check_mode`` is ``error``.
    """
    found = checkpoint.version
    if not explicit:
        logger.info("--ltx_version not given: using %s, detected in %s", found, checkpoint.path.name)
        return found
    if found == config.ltx_version or config.ltx_version_check_mode == "off":
        return config.ltx_version
    message = (
        f"--ltx_version {config.ltx_version}, but {checkpoint.path} is an LTX-{found} checkpoint; "
        f"use --ltx_version {found}"
    )
    if config.ltx_version_check_mode == "error":
        raise UserError(message)
    logger.warning(message)
    return config.ltx_version
