"""Rules of attention kernels, quantisation, compilation and the GPU."""

from __future__ import annotations

from collections.abc import Iterable

from .memory import CompileConfig, CudaConfig, MemoryConfig, QuantizationConfig

_BLOCK_SIZES = [2**n for n in range(5, 12)]


def attention(memory: MemoryConfig) -> Iterable[str]:
    """One kernel at most."""
    kernels = {
        "sdpa": memory.sdpa,
        "flash_attn": memory.flash_attn,
        "flash3": memory.flash3,
        "xformers": memory.xformers,
    }
    given = [f"--{name}" for name, asked in kernels.items() if asked]
    if len(given) > 1:
        yield f"{', '.join(given)} exclude each other; give one"
    if memory.sage_attn:
        yield "--sage_attn has no backward pass and cannot train; use --sdpa"


def quantization(config: QuantizationConfig) -> Iterable[str]:
    """One format, and options of the one that is asked for."""
    if config.fp8_base and config.nf4_base:
        yield "--fp8_base and --nf4_base exclude each other; give one"
    if config.fp8_scaled and not config.fp8_base:
        yield "--fp8_scaled needs --fp8_base"
    if config.quantize_device is not None and not (config.fp8_base or config.nf4_base):
        yield "--quantize_device needs --fp8_base or --nf4_base"
    if config.nf4_block_size != QuantizationConfig().nf4_block_size and not config.nf4_base:
        yield "--nf4_block_size needs --nf4_base"
    yield from nf4_block_size(config.nf4_block_size)


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
