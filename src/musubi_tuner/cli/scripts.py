"""The scripts and the flags of each."""

from __future__ import annotations

from collections.abc import Mapping

from musubi_tuner.config.caching import CacheLatentsConfig, CacheTextConfig
from musubi_tuner.config.convert import ConvertConfig
from musubi_tuner.config.demo import DemoConfig
from musubi_tuner.config.extract import ExtractConfig
from musubi_tuner.config.inspect import InspectConfig
from musubi_tuner.config.merge import MergeConfig
from musubi_tuner.config.merge_model import MergeModelConfig
from musubi_tuner.config.post_hoc_ema import EmaConfig
from musubi_tuner.config.quantize import QuantizeModelConfig
from musubi_tuner.config.sampling import GenerateVideoConfig
from musubi_tuner.config.training import TrainNetworkConfig

# In the order in which they are used.
SCRIPTS: Mapping[str, type] = {
    "ltx2_inspect_dataset.py": InspectConfig,
    "ltx2_cache_latents.py": CacheLatentsConfig,
    "ltx2_cache_text_encoder_outputs.py": CacheTextConfig,
    "ltx2_quantize_model.py": QuantizeModelConfig,
    "ltx2_train_network.py": TrainNetworkConfig,
    "ltx2_generate_video.py": GenerateVideoConfig,
    "ltx2_convert_lora.py": ConvertConfig,
    "ltx2_merge_lora.py": MergeConfig,
    "ltx2_merge_lora_to_model.py": MergeModelConfig,
    "ltx2_extract_lora.py": ExtractConfig,
    "ltx2_lora_post_hoc_ema.py": EmaConfig,
    "ltx2_demo.py": DemoConfig,
}
