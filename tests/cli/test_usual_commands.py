"""The commands of the usual recipes parse and pass the rules; those that use what does not exist yet are refused.

They are refused by the names of these flags, and for nothing else.
"""

from __future__ import annotations

import re

import pytest
from usual_commands import Command, commands

from musubi_tuner.cli.parser import parse
from musubi_tuner.cli.scripts import SCRIPTS
from musubi_tuner.config import rules_caching
from musubi_tuner.config.rules_quantize import quantize_rules
from musubi_tuner.config.rules_training import all_rules
from musubi_tuner.config.unavailable import unavailable

RULES = {
    "ltx2_train_network.py": all_rules,
    "ltx2_cache_latents.py": lambda p: [
        *rules_caching.required(p.config),
        *rules_caching.latents(p.config),
        *rules_caching.references(p.config),
        *rules_caching.sample_latents(p.config),
    ],
    "ltx2_cache_text_encoder_outputs.py": lambda p: [*rules_caching.required(p.config), *rules_caching.text(p.config)],
    "ltx2_merge_lora.py": lambda p: [],
    "ltx2_quantize_model.py": quantize_rules,
}
# Files that are not here, and flags that ``...`` stands for.
EXPECTED = re.compile(r": not found\b|is required|^not available in this version|^give --gemma_root")


@pytest.mark.parametrize("command", commands(), ids=str)
def test_command(command: Command):
    parsed = parse(SCRIPTS[command.script], command.arguments, prog=command.script, description="")
    refusals = list(unavailable(parsed.config))
    assert len(refusals) == bool(command.refuses), "one message"
    assert set(re.findall(r"--(\w+)[^;(]* \(", refusals[0])) == command.refuses if refusals else True
    others = [v for v in RULES[command.script](parsed) if not EXPECTED.search(v)]
    assert others == []
