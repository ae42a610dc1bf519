"""Prompt files: what to render, one sample a prompt.

``.txt`` has one prompt a line with options before or after it (the format of musubi-tuner and sd-scripts); ``.toml``
has ``[prompt]`` with defaults and ``[[prompt.subset]]``; ``.json`` has a list of strings or objects.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from musubi_tuner.common.errors import ConfigErrors, UserError, did_you_mean
from musubi_tuner.common.log import warn_once
from musubi_tuner.common.text_files import read_json, read_text, read_toml
from musubi_tuner.diffusion.guidance import Guidance
from musubi_tuner.diffusion.tokens import AUDIO_LATENTS_PER_SECOND, VIDEO_SPACE_STRIDE, VIDEO_TIME_STRIDE

logger = logging.getLogger(__name__)

MAX_STEPS = 1000
MAX_FRAME_RATE = 240
MIN_SIDE = 64  # pixels; the decoder of LTX-2.0 mirrors its input at the border, which needs two latent cells


@dataclass(frozen=True)
class SamplePrompt:
    """One sample to render. Field names are the keys of .toml and .json files, and options of .txt files."""

    prompt: str = ""
    negative_prompt: str = ""
    width: int = 768  # pixels
    height: int = 512
    frame_count: int = 45  # pixel frames
    frame_rate: float = 25.0
    seed: int = 0
    sample_steps: int = 20
    guidance_scale: float = 1.0
    cfg_scale: float | None = None  # wins over guidance_scale
    audio_cfg_scale: float | None = None  # of the sound; None = the same
    stg_scale: float = 0.0
    stg_blocks: tuple[int, ...] = ()  # () = the release's own
    stg_mode: str = "stg_av"
    modality_scale: float = 1.0
    guidance_rescale: float = 0.0
    discrete_flow_shift: float | None = None
    image_path: str | None = None
    v2v_ref_path: str | None = None
    ref_audio_path: str | None = None

    @property
    def guidance(self) -> Guidance:
        return Guidance(
            cfg=self.guidance_scale if self.cfg_scale is None else self.cfg_scale,
            audio_cfg=self.audio_cfg_scale,
            stg=self.stg_scale,
            stg_blocks=self.stg_blocks,
            stg_mode=self.stg_mode,
            modality=self.modality_scale,
            rescale=self.guidance_rescale,
        )

    @property
    def needs_negative(self) -> bool:
        """Whether the negative prompt (or the empty one) has an effect."""
        return self.guidance.uses_negative(("video", "audio"))

    @property
    def latent_grid(self) -> tuple[int, int, int]:
        """(F, H, W) of the video latents."""
        frames = (self.frame_count - 1) // VIDEO_TIME_STRIDE + 1
        return frames, self.height // VIDEO_SPACE_STRIDE, self.width // VIDEO_SPACE_STRIDE

    @property
    def audio_steps(self) -> int:
        """Latent steps of the sound."""
        return max(1, round(self.frame_count / self.frame_rate * AUDIO_LATENTS_PER_SECOND))


# Options of .txt files besides the field names; None = accepted, without effect here.
_SHORT: dict[str, str | None] = {
    "w": "width",
    "h": "height",
    "f": "frame_count",
    "d": "seed",
    "s": "sample_steps",
    "g": "guidance_scale",
    "fs": "discrete_flow_shift",
    "l": "cfg_scale",
    "n": "negative_prompt",
    "i": "image_path",
    "v": "v2v_ref_path",
    "ra": "ref_audio_path",
    "ei": None,
    "cn": None,
    "ci": None,
    "of": None,
}
_KEY_ALIASES = {"num_frames": "frame_count", "reference_audio_path": "ref_audio_path"}
_FIELDS = {f.name: f for f in dataclasses.fields(SamplePrompt)}
_KEYS = (*_FIELDS, *_KEY_ALIASES)
_OPTIONS = {**_SHORT, **{name: name for name in _FIELDS if name != "prompt"}, **_KEY_ALIASES}

_OPTION = r"--([A-Za-z][\w-]*)"
_LEADING = re.compile(_OPTION + r"""(?:\s+("[^"]*"|'[^']*'|(?!--[A-Za-z])\S+))?(?:\s+|$)""")
_TRAILING = re.compile(r"(?:^|(?<=\s))" + _OPTION + r"(?=[\s=]|$)")


def load_prompts(path: Path, defaults: SamplePrompt | None = None) -> list[SamplePrompt]:
    """Read a prompt file; what a prompt leaves open comes from ``defaults``.

    Sizes are rounded down to what the model can make.

    Raises:
        ConfigErrors: every problem of the file, each with its line or entry.
        UserError: the file is missing, empty or of an unknown kind.
    """
    defaults = defaults or SamplePrompt()
    read = {".txt": _read_txt, ".toml": _read_toml, ".json": _read_json}.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: prompt files are .txt, .toml or .json, got {path.suffix or 'no suffix'}")
    problems: list[str] = []
    prompts = [make_prompt(values, defaults, where, problems) for where, values in read(path, problems)]
    if problems:
        raise ConfigErrors(problems, f"{path}: problems with the prompts")
    if not prompts:
        raise UserError(f"{path}: has no prompts")
    return prompts


def make_prompt(values: Mapping[str, Any], defaults: SamplePrompt, where: str, problems: list[str]) -> SamplePrompt:
    """One prompt from raw values (text or numbers) over ``defaults``, checked and with sizes rounded down.

    What is wrong is appended to ``problems``, each beginning with ``where``.
    """
    before = len(problems)
    found: dict[str, Any] = {}
    for key, value in values.items():
        try:
            found[key] = _convert(key, value)
        except ValueError as error:
            problems.append(f"{where}: {key}: {error}, got {value!r}")
    prompt = replace(defaults, **found)
    problems.extend(f"{where}: {problem}" for problem in _violations(prompt))
    if len(problems) > before:
        return prompt
    if prompt.discrete_flow_shift is not None:
        warn_once(logger, "flow shift", "%s: the flow shift has no effect on LTX-2, whose schedule is fixed", where)
    if "negative_prompt" in found and found["negative_prompt"] and not prompt.needs_negative:
        logger.warning("%s: the negative prompt has no effect at a guidance scale of 1", where)
    return _rounded(prompt)


# --- the three formats: (where, raw values) of each prompt ---


def _read_txt(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            where = f"line {number}"
            yield where, parse_line(line, where, problems)


def parse_line(line: str, where: str, problems: list[str]) -> dict[str, Any]:
    """The prompt and the options of one line of a .txt file.

    Options before the prompt take one word, or several in quotes; an option after it takes everything up to the
    next option.
    """
    values: dict[str, Any] = {}

    def enter(option: str, value: str) -> None:
        name = option.lower().replace("-", "_")
        if name not in _OPTIONS:
            known = ", ".join(f"--{short}" for short in _SHORT)
            near = did_you_mean(name, _OPTIONS, flags=True)
            problems.append(f"{where}: unknown option --{option}{near}; known: {known}")
        elif _OPTIONS[name] in values:
            problems.append(f"{where}: --{option} is given twice")
        elif _OPTIONS[name] is not None:
            values[_OPTIONS[name]] = _unquoted(value.strip())

    rest = line.strip()
    while match := _LEADING.match(rest):
        enter(match[1], match[2] or "")
        rest = rest[match.end() :]
    options = list(_TRAILING.finditer(rest))
    for index, match in enumerate(options):
        end = options[index + 1].start() if index + 1 < len(options) else len(rest)
        enter(match[1], rest[match.end() : end].removeprefix("="))
    values["prompt"] = rest[: options[0].start()].strip() if options else rest
    if not values["prompt"]:
        problems.append(f"{where}: options without a prompt")
    return values


def _read_toml(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    document = read_toml(path)
    table = document.get("prompt")
    if unknown := [key for key in document if key != "prompt"]:
        problems.append(f"unknown table or key {unknown[0]!r}, expected [prompt] and [[prompt.subset]]")
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a table [prompt] with [[prompt.subset]]")
    common = _known(table, "prompt", problems, besides=("subset",))
    subsets = table.get("subset", [{}])
    if not isinstance(subsets, list) or not all(isinstance(entry, dict) for entry in subsets):
        raise UserError(f"{path}: subset: expected tables [[prompt.subset]], got {subsets!r}")
    for index, entry in enumerate(subsets):
        where = f"prompt.subset[{index}]" if "subset" in table else "prompt"
        yield where, common | _with_prompt(_known(entry, where, problems), common, where, problems)


def _read_json(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    document = read_json(path)
    if not isinstance(document, list):
        raise UserError(f"{path}: expected a list of prompts, got {type(document).__name__}")
    for index, entry in enumerate(document):
        where = f"[{index}]"
        if isinstance(entry, str):
            yield where, parse_line(entry, where, problems)
        elif isinstance(entry, dict):
            yield where, _with_prompt(_known(entry, where, problems), {}, where, problems)
        else:
            problems.append(f"{where}: expected a string or an object, got {entry!r}")


def _known(entry: Mapping[str, Any], where: str, problems: list[str], besides: Sequence[str] = ()) -> dict[str, Any]:
    """Entries under their field names, without those that are null; unknown and repeated keys are problems."""
    values = {}
    for key, value in entry.items():
        name = _KEY_ALIASES.get(key, key)
        if name in values:
            problems.append(f"{where}: {name} is given twice")
        elif name in _FIELDS:
            values[name] = value
        elif key not in besides:
            problems.append(f"{where}: unknown key {key!r}{did_you_mean(key, _KEYS)}")
    return {name: value for name, value in values.items() if value is not None}


def _with_prompt(values: dict[str, Any], common: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    if "prompt" not in values and "prompt" not in common:
        problems.append(f"{where}: has no key 'prompt'")
    return values


# --- values ---


def _unquoted(text: str) -> str:
    is_quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if is_quoted else text


def _convert(key: str, value: Any) -> Any:
    """A raw value to the type of its field; ValueError says what was expected."""
    kind = _FIELDS[key].type
    if kind.startswith("tuple"):
        items = value if isinstance(value, list) else re.split(r"[,\s]+", str(value).strip("[]() "))
        return tuple(_number(int, item) for item in items if item != "")
    if kind.startswith("str"):
        if isinstance(value, str):
            return value
        raise ValueError("expected text")
    return _number(int if kind.startswith("int") else float, value)


def _number(kind: type, value: Any) -> Any:
    expected = "an integer" if kind is int else "a number"
    if isinstance(value, (bool, dict, list)) or (kind is int and isinstance(value, float) and value % 1):
        raise ValueError(f"expected {expected}")
    try:
        number = kind(value)
    except ValueError:
        raise ValueError(f"expected {expected}") from None
    if not math.isfinite(number):
        raise ValueError(f"expected {expected}")
    return number


def _violations(prompt: SamplePrompt) -> Iterator[str]:
    for name in ("width", "height"):
        value = getattr(prompt, name)
        if value < MIN_SIDE:
            yield f"{name}: expected at least {MIN_SIDE}, got {value}"
    if prompt.frame_count < 1:
        yield f"frame_count: expected at least 1, got {prompt.frame_count}"
    if not 1 <= prompt.frame_rate <= MAX_FRAME_RATE:
        yield f"frame_rate: expected 1 to {MAX_FRAME_RATE}, got {prompt.frame_rate:g}"
    if not 1 <= prompt.sample_steps <= MAX_STEPS:
        yield f"sample_steps: expected 1 to {MAX_STEPS}, got {prompt.sample_steps}"
    if not 0 <= prompt.seed < 2**63:
        yield f"seed: expected 0 to 2^63 - 1, got {prompt.seed}"
    if prompt.stg_mode not in ("stg_av", "stg_v"):
        yield f"stg_mode: expected stg_av or stg_v, got {prompt.stg_mode!r}"
    if prompt.image_path and prompt.frame_count <= VIDEO_TIME_STRIDE:
        yield (
            f"image conditioning (--i) fixes the first frame, and there is no other: expected frame_count of at least "
            f"{VIDEO_TIME_STRIDE + 1}, got {prompt.frame_count}"
        )


def _rounded(prompt: SamplePrompt) -> SamplePrompt:
    """Sizes down to multiples of 32 pixels and 8k+1 frames."""
    sizes = {
        "width": prompt.width // VIDEO_SPACE_STRIDE * VIDEO_SPACE_STRIDE,
        "height": prompt.height // VIDEO_SPACE_STRIDE * VIDEO_SPACE_STRIDE,
        "frame_count": (prompt.frame_count - 1) // VIDEO_TIME_STRIDE * VIDEO_TIME_STRIDE + 1,
    }
    for name, value in sizes.items():
        given = getattr(prompt, name)
        if value != given and (name, given) not in _LOGGED:
            _LOGGED.add((name, given))
            logger.info("samples: %s %d is rounded down to %d", name, given, value)
    return replace(prompt, **sizes)


_LOGGED: set[tuple[str, int]] = set()
