"""What a prompt asks to be conditioned on, and which of it a mode can use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from musubi_tuner.common.av import Modality
from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.config.model import Mode

from .prompts import SamplePrompt


@dataclass(frozen=True)
class SampleLatents:
    """Clean normalised latents that condition one sample, fp32 on the CPU; ``None`` = not asked for."""

    image: Tensor | None = None  # [1, 128, 1, h, w]: the first latent frame
    reference: Tensor | None = None  # [1, 128, F, h, w]
    reference_audio: Tensor | None = None  # [1, 8, T, 16]


UNCONDITIONED = SampleLatents()


@dataclass(frozen=True)
class Condition:
    """One kind of condition.

    Attributes:
        name: field of :class:`SampleLatents`.
        path_field: field of :class:`SamplePrompt`, and key of the file's name in a cache.
        option: in prompt files.
        modality: what is conditioned, hence also which VAE encodes it.
        what: for messages.
    """

    name: str
    path_field: str
    option: str
    modality: Modality
    what: str

    def path(self, prompt: SamplePrompt) -> str | None:
        """The file as the prompt names it."""
        return getattr(prompt, self.path_field) or None


CONDITIONS = (
    Condition("image", "image_path", "--i", "video", "a first frame"),
    Condition("reference", "v2v_ref_path", "--v", "video", "a video reference"),
    Condition("reference_audio", "ref_audio_path", "--ra", "audio", "an audio reference"),
)


def conditions_of(prompt: SamplePrompt) -> Iterator[tuple[Condition, str]]:
    """What a prompt asks for, each with its file as the prompt names it."""
    for condition in CONDITIONS:
        if path := condition.path(prompt):
            yield condition, path


def named_prompt(index: int, prompt: SamplePrompt) -> str:
    """For messages: ``prompt 3 (A big grey rabbit...)``."""
    text = prompt.prompt if len(prompt.prompt) <= 40 else prompt.prompt[:37] + "..."
    return f"prompt {index} ({text})"


def check_conditions(prompts: Sequence[SamplePrompt], generated: Mode) -> None:
    """Refuse conditions on what is not generated.

    Raises:
        UserError, ConfigErrors: each prompt with its option.
    """
    problems = [
        f"{named_prompt(index, prompt)}: {condition.option} gives {condition.what}, but no {condition.modality} is "
        f"generated (mode {generated}); leave it out or choose another mode"
        for index, prompt in enumerate(prompts)
        for condition, _ in conditions_of(prompt)
        if generated not in (condition.modality, "av")
    ]
    if problems:
        raise ConfigErrors(problems, "conditions without effect") if len(problems) > 1 else UserError(problems[0])
