"""Flags of attention, memory, quantisation, compilation and the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from .flag import flag

SplitTarget = Literal["all", "self", "cross", "text_cross", "av_cross", "video", "audio"]
FeedForwardTarget = Literal["all", "video", "audio"]


@dataclass(frozen=True)
class MemorySettings:
    """How the transformer's blocks save memory, and which kernel computes their attention.

    Attributes:
        attention: one of the attention backends.
        split_attention: which attention is computed in parts, by sample or by so many queries; ``None``: none.
        chunk_feed_forward: which feed-forward layers are computed by so many tokens; ``None``: none.
        blocks_to_swap: blocks whose weights live on the host, in pinned memory or not.
        checkpointing: recompute blocks in the backward pass: all, or the first ``blocks_to_checkpoint``.
        offload_inputs: keep what enters checkpointed blocks on the host.
    """

    attention: str = "sdpa"
    split_attention: SplitTarget | None = None
    split_mode: Literal["batch", "query"] = "batch"
    split_queries: int = 1024
    chunk_feed_forward: FeedForwardTarget | None = None
    chunk_tokens: int = 0
    blocks_to_swap: int = 0
    pin_swapped: bool = False
    checkpointing: bool = False
    blocks_to_checkpoint: int | None = None
    offload_inputs: bool = False


@dataclass(frozen=True)
class BlockMemoryConfig:
    """Attention and memory."""

    sdpa: bool = flag(False, "PyTorch scaled dot-product attention (the default)")
    cudnn_attn: bool = flag(False, "PyTorch's attention by cuDNN (NVIDIA GPUs), where it can")
    flash_attn: bool = flag(False, "FlashAttention 2 (package flash-attn); masked attention is PyTorch's")
    flash3: bool = flag(False, "FlashAttention 3 (Hopper GPUs); masked attention is PyTorch's")
    xformers: bool = flag(False, "attention of xformers; masked attention is PyTorch's")
    split_attn_target: Literal["none", "all", "self", "cross", "text_cross", "av_cross", "video", "audio"] | None = (
        flag(None, "attention that is computed in parts, each once more in the backward pass")
    )
    split_attn_mode: Literal["batch", "query"] | None = flag(
        None, "split by sample or by query (not given: batch); needs --split_attn_target"
    )
    split_attn_chunk_size: int = flag(0, "queries of a part, mode query; 0 = 1024")
    ffn_chunk_target: Literal["none", "all", "video", "audio"] | None = flag(
        None, "feed-forward layers that are computed in parts, each once more in the backward pass"
    )
    ffn_chunk_size: int = flag(0, "tokens of a part; 0 = off")
    blocks_to_swap: int = flag(0, "transformer blocks kept in host memory, at most all but one; 0 = off")
    use_pinned_memory_for_block_swap: bool = flag(False, "lock that memory: faster copies to the GPU")

    @property
    def settings(self) -> MemorySettings:
        """What the flags ask for."""
        kernels = {
            "cudnn_attn": self.cudnn_attn,
            "flash_attn": self.flash_attn,
            "flash3": self.flash3,
            "xformers": self.xformers,
        }
        split = self.split_attn_target not in (None, "none")
        chunk = self.ffn_chunk_target not in (None, "none") and self.ffn_chunk_size > 0
        return MemorySettings(
            attention=next((name for name, asked in kernels.items() if asked), "sdpa"),
            split_attention=self.split_attn_target if split else None,
            split_mode=self.split_attn_mode or "batch",
            split_queries=self.split_attn_chunk_size or 1024,
            chunk_feed_forward=self.ffn_chunk_target if chunk else None,
            chunk_tokens=self.ffn_chunk_size,
            blocks_to_swap=self.blocks_to_swap,
            pin_swapped=self.use_pinned_memory_for_block_swap,
        )


@dataclass(frozen=True)
class MemoryConfig(BlockMemoryConfig):
    """Attention and memory."""

    sage_attn: bool = flag(False, "not for training: SageAttention has no backward pass")
    gradient_checkpointing: bool = flag(False, "recompute block activations in the backward pass")
    gradient_checkpointing_cpu_offload: bool = flag(
        False, "--gradient_checkpointing that keeps the inputs of blocks in host memory"
    )
    ignore_memory_estimate: bool = flag(False, "start although the estimate says that memory will not suffice")
    blocks_to_checkpoint: int = flag(-1, "blocks that --gradient_checkpointing recomputes, the first ones; -1 = all")

    @property
    def settings(self) -> MemorySettings:
        """What the flags ask for."""
        return replace(
            super().settings,
            checkpointing=self.gradient_checkpointing or self.gradient_checkpointing_cpu_offload,
            blocks_to_checkpoint=None if self.blocks_to_checkpoint < 0 else self.blocks_to_checkpoint,
            offload_inputs=self.gradient_checkpointing_cpu_offload,
        )


@dataclass(frozen=True)
class QuantizationConfig:
    """Quantisation of the base weights."""

    fp8_base: bool = flag(False, "base weights of the blocks in FP8, half the memory")
    fp8_scaled: bool = flag(False, "quantise to FP8 while loading; not for files that are FP8 already")
    fp8_w8a8: bool = flag(
        False, "matrix products in FP8 as well (Ada, Hopper and later GPUs): faster, less exact; needs --fp8_base"
    )
    int8_base: bool = flag(False, "base weights of the blocks in int8, half the memory, nearer to bf16 than FP8")
    nf4_base: bool = flag(False, "base weights of the blocks in NF4, 4 bit, under a third of the memory")
    nf4_block_size: int = flag(32, "NF4: weights that share a scale; a power of two from 32 to 2048")
    quantize_device: Literal["cpu", "cuda"] | None = flag(
        None, "where weights are quantised (not given: where the model is)", values={"gpu": "cuda"}
    )

    @property
    def kind(self) -> Literal["fp8", "int8", "nf4"] | None:
        """The format that is asked for."""
        if self.nf4_base:
            return "nf4"
        return "int8" if self.int8_base else "fp8" if self.fp8_base else None

    @property
    def fp8_gradients(self) -> bool:
        """Whether gradients go through products in FP8 too, where there are any."""
        return False


@dataclass(frozen=True)
class TrainingQuantizationConfig(QuantizationConfig):
    """Quantisation of the base weights."""

    fp8_w8a8_backward: Literal["fp8", "dense"] | None = flag(
        None, "--fp8_w8a8: gradients by products in FP8, or through dequantised weights (not given: fp8)"
    )

    @property
    def fp8_gradients(self) -> bool:
        """Whether gradients go through products in FP8 too, where there are any."""
        return self.fp8_w8a8_backward != "dense"


@dataclass(frozen=True)
class CalibrationConfig:
    """Accuracy of NF4."""

    loftq_init: bool = flag(False, "NF4: start the LoRA from what quantising loses")
    loftq_iters: int = flag(2, "--loftq_init: rounds of quantising and fitting; NF4 files have had theirs")
    awq_calibration: bool = flag(False, "NF4: scale channels by their inputs before quantising (experimental)")
    awq_alpha: float = flag(0.25, "--awq_calibration: strength of that scaling, 0 to 1")
    awq_num_batches: int = flag(8, "--awq_calibration: batches that it measures")


CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

# As accelerate calls them; lower case is what torch.compile calls them.
DynamoBackend = Literal[
    "NO",
    "EAGER",
    "AOT_EAGER",
    "INDUCTOR",
    "AOT_TS_NVFUSER",
    "NVPRIMS_NVFUSER",
    "CUDAGRAPHS",
    "OFI",
    "FX2TRT",
    "ONNXRT",
    "TENSORRT",
    "AOT_TORCHXLA_TRACE_ONCE",
    "TORCHXLA_TRACE_ONCE",
    "IPEX",
    "TVM",
    "HPU_BACKEND",
]
_DYNAMO_SHORT_FORMS = {name.lower(): name for name in get_args(DynamoBackend)}


_GRAPHS = 64  # of a block; PyTorch's 8 are few for datasets with many sizes


@dataclass(frozen=True)
class CompileSettings:
    """How blocks are compiled.

    Attributes:
        dynamic: one graph for all sizes, one for each, or ``None`` for PyTorch's choice.
        graphs: of a block, before PyTorch gives up and runs it uncompiled.
    """

    backend: str = "inductor"
    mode: CompileMode = "default"
    dynamic: bool | None = None
    fullgraph: bool = False
    graphs: int = _GRAPHS


@dataclass(frozen=True)
class CompileConfig:
    """Compilation."""

    compile: bool = flag(False, "compile the transformer blocks (torch.compile)")
    compile_backend: str = flag("inductor", "backend of torch.compile")
    compile_mode: CompileMode = flag("default", "mode of torch.compile")
    compile_dynamic: Literal["true", "false", "auto"] | None = flag(
        None, "one graph for all sizes, one for each, or as torch.compile decides (not given: auto)"
    )
    compile_fullgraph: bool = flag(False, "an error where a block does not compile to one graph")
    compile_cache_size_limit: int | None = flag(
        None, "graphs of a block, one for each kind of batch, before it runs uncompiled (not given: 64)"
    )
    dynamo_backend: DynamoBackend = flag(
        "NO", "the same as --compile with this backend, by accelerate's name", values=_DYNAMO_SHORT_FORMS
    )
    dynamo_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = flag(
        None, "mode of --dynamo_backend (not given: default)"
    )
    dynamo_fullgraph: bool = flag(False, "as --compile_fullgraph, with --dynamo_backend")
    dynamo_dynamic: bool = flag(False, "as --compile_dynamic true, with --dynamo_backend")

    @property
    def settings(self) -> CompileSettings | None:
        """What ``--compile`` or ``--dynamo_backend`` asks for; ``None`` for neither."""
        if self.compile:
            dynamic = {"true": True, "false": False}.get(self.compile_dynamic or "auto")
            limit = _GRAPHS if self.compile_cache_size_limit is None else self.compile_cache_size_limit
            return CompileSettings(self.compile_backend, self.compile_mode, dynamic, self.compile_fullgraph, limit)
        if self.dynamo_backend != "NO":
            mode, dynamic = self.dynamo_mode or "default", self.dynamo_dynamic or None
            return CompileSettings(self.dynamo_backend.lower(), mode, dynamic, self.dynamo_fullgraph, _GRAPHS)
        return None


@dataclass(frozen=True)
class CudaConfig:
    """GPU."""

    cuda_allow_tf32: bool = flag(False, "TF32 for matrix products and convolutions in fp32: faster, less exact")
    cuda_cudnn_benchmark: bool = flag(False, "let cuDNN time its convolutions and take the fastest")
    cuda_memory_fraction: float | None = flag(None, "largest share of the GPU's memory that PyTorch may use, 0 to 1")
