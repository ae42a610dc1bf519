"""What a run is about to do, and what it did, as plain tables."""

from __future__ import annotations

import logging

from musubi_tuner.common.tables import format_bytes, format_table
from musubi_tuner.networks.lora_ltx2 import LoRANetwork

logger = logging.getLogger(__name__)


def log_training_plan(network: LoRANetwork, *, mode: str, facts: dict[str, object]) -> None:
    """Modules and parameters per modality, and the run's length."""
    counts = {kind: count for kind, count in network.summary().items() if count.modules}
    rows = [[kind, count.modules, count.params, format_bytes(4 * count.params)] for kind, count in counts.items()]
    logger.info(format_table(["stream", "modules", "parameters", "fp32 size"], rows, title="What will be trained"))
    logger.info(format_table(["setting", "value"], list(facts.items())))
    for wanted in {"video": ("video",), "audio": ("audio",), "av": ("video", "audio")}[mode]:
        if wanted not in counts:
            logger.warning(
                "mode %s, but no %s module is trained; see --lora_target_preset and include_patterns",
                mode,
                wanted,
            )
