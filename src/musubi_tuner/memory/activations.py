"""What one transformer block keeps for its backward pass and what that pass works with, in bytes, from sizes alone.

The sums follow the block's code: a frozen linear layer keeps nothing, one with a LoRA its input and the small
activation between the factors, a norm its input, attention its queries, keys, values and output, the feed-forward
layer the wide tensor in front of its activation function. Nothing here allocates anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from musubi_tuner.config.memory import MemorySettings
from musubi_tuner.models.ltx2.config import TransformerConfig

_FP32 = 4
_TO_OUT = "to_out.0"


@dataclass(frozen=True)
class BatchShape:
    """One batch as the model gets it, references included.

    Attributes:
        samples: how many.
        video: tokens of all samples together.
        audio: likewise.
        text: tokens of one sample.
    """

    samples: int
    video: int
    audio: int
    text: int


@dataclass(frozen=True)
class Numbers:
    """How numbers are held.

    Attributes:
        activation: bytes of a value that the blocks compute with.
        trained: bytes of a trained value.
        fused_norms: norms keep and make no fp32 copies (GPUs).
    """

    activation: int
    trained: int = _FP32
    fused_norms: bool = False


@dataclass(frozen=True)
class Adapted:
    """What is trained at one layer.

    Attributes:
        params: trained values.
        per_token: values that are kept for each token besides the layer's input.
    """

    params: int
    per_token: int

    @classmethod
    def by_lora(cls, rank: int, shape: tuple[int, int], *, lengths: bool = False) -> Adapted:
        """A LoRA of a layer of (N, K); with ``lengths`` of its rows (DoRA) what the base gave is kept as well."""
        N = shape[0] if lengths else 0
        return cls(rank * sum(shape) + N, rank + N)


@dataclass(frozen=True)
class Part:
    """Bytes of one layer of a block.

    Attributes:
        kept: between its forward and its backward pass.
        working: what its backward pass holds besides, at the most.
    """

    kept: int
    working: int


@dataclass(frozen=True)
class BlockActivations:
    """Bytes of one block.

    Attributes:
        inputs: the hidden states that enter it, one size for each stream; part of ``kept``.
        kept: all that autograd keeps of it.
        peak: the most that its backward pass takes, with what is kept.
    """

    inputs: tuple[int, ...]
    kept: int
    peak: int


def block_activations(
    config: TransformerConfig,
    adapted: Mapping[str, Adapted],
    batch: BatchShape,
    numbers: Numbers,
    settings: MemorySettings,
    *,
    largest_weight: int = 0,
) -> BlockActivations:
    """One block's bytes.

    Args:
        adapted: layers by their names in the block (``attn1.to_q``).
        largest_weight: bytes of the dense weight that a quantised layer makes for its backward pass.
    """
    counting = _Counting(config, adapted, batch, numbers, settings)
    parts = counting.parts()
    inputs = counting.hidden_states()
    # Gradients of the hidden states go all the way through the block, and one dense weight comes and goes.
    through = sum(inputs) + largest_weight
    kept = peak = 0
    for part in parts:
        kept += part.kept
        peak = max(peak, kept + part.working + through)
    return BlockActivations(inputs, kept, peak)


class _Counting:
    """The layers of a block, in the order of its forward pass."""

    def __init__(
        self,
        config: TransformerConfig,
        adapted: Mapping[str, Adapted],
        batch: BatchShape,
        numbers: Numbers,
        settings: MemorySettings,
    ) -> None:
        self._config, self._adapted, self._batch, self._settings = config, adapted, batch, settings
        self._numbers, self._bytes = numbers, numbers.activation

    def hidden_states(self) -> tuple[int, ...]:
        sizes = (self._batch.video * self._config.width, self._batch.audio * self._config.audio_width)
        return tuple(size * self._bytes for size in sizes if size)

    def parts(self) -> list[Part]:
        streams = [("", self._batch.video, self._config.width), ("audio_", self._batch.audio, self._config.audio_width)]
        streams = [stream for stream in streams if stream[1]]
        found = [self._casts()]
        for prefix, rows, width in streams:
            found += [self._modulation(width), self._self_attention(prefix, rows, width)]
            found.append(self._text_attention(prefix, rows, width))
        if len(streams) == 2:
            found += [self._cross_norms(), self._cross("audio_to_video_attn"), self._cross("video_to_audio_attn")]
        return [*found, *(self._feed_forward(*stream) for stream in streams)]

    # --- layers ---

    def _casts(self) -> Part:
        """Trained values in the dtype of the activations, where theirs is another."""
        if self._numbers.trained == self._bytes:
            return Part(0, 0)
        return Part(sum(layer.params for layer in self._adapted.values()) * self._bytes, 0)

    def _modulation(self, width: int) -> Part:
        return Part(self._config.num_modulation_rows * width * self._batch.samples * _FP32, 0)

    def _self_attention(self, prefix: str, rows: int, width: int) -> Part:
        name = f"{prefix}attn1"
        entering = rows * width  # what the norm keeps
        read = rows * width * self._adapts(name, "to_q", "to_k", "to_v", "to_gate_logits")
        keys = (2 + 1) * rows * width  # before and after the norm; the values
        return self._attention(name, rows, width, inputs=entering + read, keys=keys, key_rows=rows)

    def _text_attention(self, prefix: str, rows: int, width: int) -> Part:
        name, text = f"{prefix}attn2", self._batch.samples * self._batch.text
        entering = rows * width
        read = rows * width * self._adapts(name, "to_q", "to_gate_logits")
        if self._config.cross_attention_adaln:  # the text is modulated anew in each block
            read += text * width * self._adapts(name, "to_k", "to_v")
        keys = (2 + self._adapts(name, "to_k")) * text * width  # without a gradient the norm keeps nothing
        return self._attention(name, rows, width, inputs=entering + read, keys=keys, key_rows=text)

    def _cross_norms(self) -> Part:
        """Both streams as they are before they read each other."""
        return Part(sum(self.hidden_states()), 0)

    def _cross(self, name: str) -> Part:
        config, batch = self._config, self._batch
        video, audio = (batch.video, config.width), (batch.audio, config.audio_width)
        (rows, width), (others, other_width) = (video, audio) if name.startswith("audio") else (audio, video)
        read = rows * width * self._adapts(name, "to_q", "to_gate_logits")
        read += others * other_width * self._adapts(name, "to_k", "to_v")
        keys = 3 * others * config.audio_width
        return self._attention(name, rows, config.audio_width, inputs=read, keys=keys, key_rows=others)

    def _attention(self, name: str, rows: int, inner: int, *, inputs: int, keys: int, key_rows: int) -> Part:
        """``inputs`` and ``keys`` in values: what enters and is kept; keys and values as they are kept."""
        queries, output = 2 * rows * inner, rows * inner
        heads = self._config.num_attention_heads
        if self._config.apply_gated_attention:  # the output before and after its gates
            output += rows * inner * self._adapts(name, _TO_OUT) + 2 * rows * heads
        kept = (inputs + queries + output + keys + self._hidden(name, rows, key_rows)) * self._bytes
        kept += rows * heads * _FP32  # sums of the softmax
        # Gradients of the output, of queries, keys and values, and one more while two are added up.
        working = (3 * rows * inner + 2 * key_rows * inner) * self._bytes
        return Part(kept, working + self._in_norm(rows * inner))

    def _feed_forward(self, prefix: str, rows: int, width: int) -> Part:
        name, wide = f"{prefix}ff", 4 * rows * width
        entering, grad = rows * width, rows * width
        part = self._tokens_of_part(prefix, rows)
        if part is not None:
            # Kept is what enters; each part is computed again, and its gradients wait for the others'.
            working = (grad + entering + max(16 * part * width, entering)) * self._bytes
            working = max(working, (grad + 2 * entering) * self._bytes + self._in_norm(entering))
            return Part(2 * entering * self._bytes, working)
        # A LoRA's gradient takes the place of the input that it kept.
        adapts_second = self._adapts(name, "net.2")
        read = entering * self._adapts(name, "net.0.proj") + wide * adapts_second
        kept = entering + wide + read + self._hidden(name, rows, rows)
        return Part(kept * self._bytes, (grad + (1 if adapts_second else 2) * wide) * self._bytes)

    def _in_norm(self, values: int) -> int:
        """Bytes of copies that the backward pass of a norm makes: in fp32, and of the values themselves."""
        if self._numbers.fused_norms:
            return 0
        return (2 if self._bytes == _FP32 else 4) * values * _FP32

    # --- details ---

    def _tokens_of_part(self, prefix: str, rows: int) -> int | None:
        """Rows of one part where feed-forward layers are computed in parts, else ``None``."""
        target, size = self._settings.chunk_feed_forward, self._settings.chunk_tokens
        applies = target == "all" or target == ("audio" if prefix else "video")
        return size * self._batch.samples if applies and rows > size * self._batch.samples else None

    def _adapts(self, layer: str, *names: str) -> bool:
        return any(f"{layer}.{name}" in self._adapted for name in names)

    def _hidden(self, layer: str, rows: int, key_rows: int) -> int:
        """Values that the adapters of a layer's parts keep."""
        own = {name: a.per_token for name, a in self._adapted.items() if name.startswith(f"{layer}.")}
        return sum(count * (key_rows if name.endswith(("to_k", "to_v")) else rows) for name, count in own.items())


def layer_sizes(config: TransformerConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear layer of a block, by its name in the block."""
    video, audio = config.width, config.audio_width
    found: dict[str, tuple[int, int]] = {}
    layers = {
        **dict.fromkeys(("attn1", "attn2"), (video, video, video)),
        **{f"audio_{name}": (audio, audio, audio) for name in ("attn1", "attn2")},
        "audio_to_video_attn": (video, audio, audio),
        "video_to_audio_attn": (audio, video, audio),
    }
    for name, (query, context, inner) in layers.items():
        found |= {f"{name}.to_q": (inner, query), f"{name}.to_k": (inner, context), f"{name}.to_v": (inner, context)}
        found[f"{name}.{_TO_OUT}"] = (query, inner)
        if config.apply_gated_attention:
            found[f"{name}.to_gate_logits"] = (config.num_attention_heads, query)
    for prefix, width in (("", video), ("audio_", audio)):
        found |= {f"{prefix}ff.net.0.proj": (4 * width, width), f"{prefix}ff.net.2": (width, 4 * width)}
    return found
