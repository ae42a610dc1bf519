"""Previews whose text embeddings are not those that are trained."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from cache_files import one_dataset, write_item

from musubi_tuner.config.sampling import PreviewConfig
from musubi_tuner.config.training import TrainNetworkConfig
from musubi_tuner.dataset.items import EncoderRecord, MadeBy
from musubi_tuner.training.previews import warn_of_other_connectors


@pytest.mark.parametrize(
    ("record", "precached", "told"),
    [
        (EncoderRecord("other", replaces="own"), False, True),
        (EncoderRecord("other", replaces="own"), True, False),  # they were encoded with the other file as well
        (EncoderRecord("own"), False, False),
        (None, False, False),  # a foreign cache
    ],
)
def test_connectors_of_another_file_are_told(tmp_path, caplog, record, precached, told) -> None:
    items = [write_item(tmp_path, "a"), replace(write_item(tmp_path, "b"), made_by=MadeBy(text=record))]
    config = TrainNetworkConfig(preview=PreviewConfig(use_precached_sample_prompts=precached))
    checkpoint = SimpleNamespace(encoder_id=lambda kind: "own")
    with caplog.at_level(logging.WARNING):
        warn_of_other_connectors(config, one_dataset(items), checkpoint)
    assert ("connectors of another file" in caplog.text) == told
