"""Rules of attention kernels, memory, quantisation, compilation and the GPU."""

from __future__ import annotations

from collections.abc import Iterable

from .memory import (
    BlockMemoryConfig,
    CalibrationConfig,
    CompileConfig,
    CudaConfig,
    MemoryConfig,
    QuantizationConfig,
    TrainingQuantizationConfig,
)
from .network import NetworkConfig

_BLOCK_SIZES = [2**n for n in range(5, 12)]


def blocks(memory: BlockMemoryConfig) -> Iterable[str]:
    """One attention kernel at most, sizes that make sense, and options only with what they belong to."""
    kernels = {
        "sdpa": memory.sdpa,
        "cudnn_attn": memory.cudnn_attn,
        "flash_attn": memory.flash_attn,
        "flash3": memory.flash3,
        "xformers": memory.xformers,
    }
    given = [f"--{name}" for name, asked in kernels.items() if asked]
    if len(given) > 1:
        yield f"{', '.join(given)} exclude each other; give one"
    at_least = {
        "blocks_to_swap": memory.blocks_to_swap,
        "ffn_chunk_size": memory.ffn_chunk_size,
        "split_attn_chunk_size": memory.split_attn_chunk_size,
    }
    yield from (f"--{name}: expected 0 or more, got {value}" for name, value in at_least.items() if value < 0)
    if memory.use_pinned_memory_for_block_swap and memory.blocks_to_swap == 0:
        yield "--use_pinned_memory_for_block_swap needs --blocks_to_swap"
    if memory.split_attn_target is None and (memory.split_attn_mode is not None or memory.split_attn_chunk_size > 0):
        yield "--split_attn_mode and --split_attn_chunk_size need --split_attn_target"
    elif memory.split_attn_chunk_size > 0 and memory.split_attn_mode != "query":
        yield "--split_attn_chunk_size needs --split_attn_mode query"


def training(memory: MemoryConfig) -> Iterable[str]:
    """What only training has: kernels without a backward pass, checkpointing."""
    if memory.sage_attn:
        yield "--sage_attn has no backward pass and cannot train; use --sdpa"
    if memory.blocks_to_checkpoint < -1:
        yield f"--blocks_to_checkpoint: expected -1 (all), 0 or more, got {memory.blocks_to_checkpoint}"
    if memory.blocks_to_checkpoint > 0 and not memory.settings.checkpointing:
        yield "--blocks_to_checkpoint needs --gradient_checkpointing"


def quantization(config: QuantizationConfig) -> Iterable[str]:
    """One format, and options of the one that is asked for."""
    formats = {"fp8_base": config.fp8_base, "int8_base": config.int8_base, "nf4_base": config.nf4_base}
    given = [f"--{name}" for name, asked in formats.items() if asked]
    if len(given) > 1:
        yield f"{' and '.join(given)} exclude each other; give one"
    if config.fp8_scaled and not config.fp8_base:
        yield "--fp8_scaled needs --fp8_base"
    if config.fp8_w8a8 and not config.fp8_base:
        yield "--fp8_w8a8 needs --fp8_base"
    if config.quantize_device is not None and not given:
        yield "--quantize_device needs --fp8_base, --int8_base or --nf4_base"
    if config.nf4_block_size != QuantizationConfig().nf4_block_size and not config.nf4_base:
        yield "--nf4_block_size needs --nf4_base"
    yield from nf4_block_size(config.nf4_block_size)


def training_quantization(config: TrainingQuantizationConfig) -> Iterable[str]:
    """The same, and what only training has."""
    yield from quantization(config)
    if config.fp8_w8a8_backward is not None and not config.fp8_w8a8:
        yield "--fp8_w8a8_backward needs --fp8_w8a8"


def loftq(config: CalibrationConfig, base: QuantizationConfig, network: NetworkConfig) -> Iterable[str]:
    """It needs 4-bit weights, a rank, and a LoRA that starts nowhere else."""
    yield from loftq_iterations(config.loftq_iters)
    if not config.loftq_init:
        if config.loftq_iters != CalibrationConfig().loftq_iters:
            yield "--loftq_iters needs --loftq_init"
        return
    if not base.nf4_base:
        yield "--loftq_init needs --nf4_base"
    if network.network_module != "networks.lora_ltx2":
        yield f"--loftq_init needs --network_module networks.lora_ltx2, got {network.network_module}"
    elif network.network_dim is None:
        yield "--loftq_init needs --network_dim"
    if network.network_weights is not None:
        yield "--loftq_init and --network_weights exclude each other: both say where the LoRA starts"
    if network.scale_weight_norms is not None:
        yield "--loftq_init and --scale_weight_norms exclude each other: the limit would shrink the correction"


def awq(config: CalibrationConfig, base: QuantizationConfig) -> Iterable[str]:
    """It needs 4-bit weights, and options need it."""
    default = CalibrationConfig()
    options = {"awq_alpha": config.awq_alpha, "awq_num_batches": config.awq_num_batches}
    if config.awq_calibration and not base.nf4_base:
        yield "--awq_calibration needs --nf4_base"
    for name, value in options.items():
        if not config.awq_calibration and value != vars(default)[name]:
            yield f"--{name} needs --awq_calibration"
    if not 0 <= config.awq_alpha <= 1:
        yield f"--awq_alpha: expected 0 to 1, got {config.awq_alpha:g}"
    if config.awq_num_batches < 1:
        yield f"--awq_num_batches: expected at least 1, got {config.awq_num_batches}"


def loftq_iterations(count: int) -> Iterable[str]:
    """At least one."""
    if count < 1:
        yield f"--loftq_iters: expected at least 1, got {count}"


def nf4_block_size(size: int) -> Iterable[str]:
    """Sizes that divide every row of the model and that kernels know."""
    if size not in _BLOCK_SIZES:
        yield f"--nf4_block_size {size}: expected one of {', '.join(map(str, _BLOCK_SIZES))}"


def compilation(config: CompileConfig) -> Iterable[str]:
    """``--compile`` and ``--dynamo_backend`` are two ways to the same; options need the one that they belong to."""
    default = CompileConfig()
    uses_dynamo = config.dynamo_backend != "NO"
    if config.compile and uses_dynamo:
        yield f"--compile and --dynamo_backend {config.dynamo_backend} exclude each other; give one"
    options = {
        "compile_backend": (config.compile_backend != default.compile_backend, config.compile, "compile"),
        "compile_mode": (config.compile_mode != default.compile_mode, config.compile, "compile"),
        "compile_dynamic": (config.compile_dynamic is not None, config.compile, "compile"),
        "compile_fullgraph": (config.compile_fullgraph, config.compile, "compile"),
        "compile_cache_size_limit": (config.compile_cache_size_limit is not None, config.compile, "compile"),
        "dynamo_mode": (config.dynamo_mode is not None, uses_dynamo, "dynamo_backend"),
        "dynamo_fullgraph": (config.dynamo_fullgraph, uses_dynamo, "dynamo_backend"),
        "dynamo_dynamic": (config.dynamo_dynamic, uses_dynamo, "dynamo_backend"),
    }
    yield from (f"--{name} needs --{needed}" for name, (given, has, needed) in options.items() if given and not has)
    limit = config.compile_cache_size_limit
    if limit is not None and limit < 1:
        yield f"--compile_cache_size_limit {limit}: expected at least 1"


def gpu(config: CudaConfig) -> Iterable[str]:
    """Shares of memory."""
    share = config.cuda_memory_fraction
    if share is not None and not 0 < share <= 1:
        yield f"--cuda_memory_fraction {share:g}: expected more than 0, at most 1"
