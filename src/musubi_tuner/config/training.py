"""Flags of ``ltx2_train_network.py``."""

from __future__ import annotations

from dataclasses import dataclass

from .compatibility import CompatibilityConfig
from .data import DataConfig
from .hub import HubConfig
from .losses import AudioLossConfig, LossConfig
from .memory import CalibrationConfig, CompileConfig, CudaConfig, MemoryConfig, TrainingQuantizationConfig
from .model import CheckpointConfig, GemmaConfig, PrecisionConfig, VersionConfig
from .network import NetworkConfig
from .optimizer import OptimizerConfig
from .references import ReferenceConfig
from .regularizers import AlignmentConfig, PreservationConfig
from .roles import RoleConfig
from .sampling import PreviewConfig, SampleConditioningConfig, SampleDecodeConfig
from .saving import SaveConfig
from .timesteps import TimestepConfig
from .tracking import ProcessesConfig, TrackingConfig, ValidationConfig


@dataclass(frozen=True)
class TrainNetworkConfig:
    """``ltx2_train_network.py``"""

    checkpoint: CheckpointConfig = CheckpointConfig()
    version: VersionConfig = VersionConfig()
    gemma: GemmaConfig = GemmaConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    quantization: TrainingQuantizationConfig = TrainingQuantizationConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    compilation: CompileConfig = CompileConfig()
    cuda: CudaConfig = CudaConfig()
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    timestep: TimestepConfig = TimestepConfig()
    loss: LossConfig = LossConfig()
    audio_loss: AudioLossConfig = AudioLossConfig()
    references: ReferenceConfig = ReferenceConfig()
    roles: RoleConfig = RoleConfig()
    preservation: PreservationConfig = PreservationConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    preview: PreviewConfig = PreviewConfig()
    conditioning: SampleConditioningConfig = SampleConditioningConfig()
    decode: SampleDecodeConfig = SampleDecodeConfig()
    save: SaveConfig = SaveConfig()
    hub: HubConfig = HubConfig()
    tracking: TrackingConfig = TrackingConfig()
    validation: ValidationConfig = ValidationConfig()
    processes: ProcessesConfig = ProcessesConfig()
    compatibility: CompatibilityConfig = CompatibilityConfig()
