"""Prompt files: the grammar of .txt lines, the other formats, and messages that name the place."""

import json
import logging

import pytest

from musubi_tuner.common.errors import ConfigErrors, UserError
from musubi_tuner.generation.prompts import SamplePrompt, load_prompts, parse_line


def line(text: str) -> dict:
    problems: list[str] = []
    values = parse_line(text, "line 1", problems)
    assert problems == []
    return values


def test_options_behind_the_prompt():
    assert line("A cat on a mat --w 640 --h 384 --f 25 --d 7 --s 30 --g 4.5 --n blurry, bad --l 3") == {
        "prompt": "A cat on a mat",
        "width": "640",
        "height": "384",
        "frame_count": "25",
        "seed": "7",
        "sample_steps": "30",
        "guidance_scale": "4.5",
        "negative_prompt": "blurry, bad",
        "cfg_scale": "3",
    }


def test_prompt_that_starts_with_the_letter_of_an_option():
    assert line("I am walking, a dog barks") == {"prompt": "I am walking, a dog barks"}
    assert line("n") == {"prompt": "n"}


def test_leading_reference_takes_one_word_and_leaves_the_prompt():
    assert line("--v references/scene_001.png A woman in a forest --n blurry, low quality") == {
        "v2v_ref_path": "references/scene_001.png",
        "prompt": "A woman in a forest",
        "negative_prompt": "blurry, low quality",
    }


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_keep_spaces_together(quote):
    assert line(f"--ra {quote}my voices/a b.wav{quote} --d 3 A man speaks --i {quote}x y.png{quote}") == {
        "ref_audio_path": "my voices/a b.wav",
        "seed": "3",
        "prompt": "A man speaks",
        "image_path": "x y.png",
    }


def test_windows_paths_keep_their_backslashes():
    assert line(r"--v C:\refs\scene.png A cat")["v2v_ref_path"] == r"C:\refs\scene.png"


def test_long_names_any_case_dashes_and_equals():
    assert line("A cat --W 64 --frame-rate 24 --stg_scale=1 --negative_prompt=ugly, bad") == {
        "prompt": "A cat",
        "width": "64",
        "frame_rate": "24",
        "stg_scale": "1",
        "negative_prompt": "ugly, bad",
    }


def test_dashes_in_prose_are_no_options():
    text = "A sign -- faded -- reads 50--60, a so--called well-known place"
    assert line(text) == {"prompt": text}


def test_accepted_options_without_effect_are_dropped():
    assert line("A cat --ei a.png --cn b --ci c --of 1") == {"prompt": "A cat"}


def write(tmp_path, name: str, text: str):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_file_skips_comments_and_takes_defaults(tmp_path):
    path = write(tmp_path, "p.txt", "\ufeff# a comment\n\n  A cat --d 5\nA dog\n")
    prompts = load_prompts(path, SamplePrompt(width=64, height=64, frame_count=9, guidance_scale=3.0))
    assert [(p.prompt, p.seed, p.width, p.frame_count, p.guidance_scale) for p in prompts] == [
        ("A cat", 5, 64, 9, 3.0),
        ("A dog", 0, 64, 9, 3.0),
    ]


def test_toml_and_json_agree_with_text(tmp_path):
    txt = write(tmp_path, "p.txt", "A cat --w 64 --h 96 --f 9 --s 4 --l 2.5 --n bad\nA dog --w 64 --h 64\n")
    toml = write(
        tmp_path,
        "p.toml",
        '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "A cat"\nheight = 96\nnum_frames = 9\n'
        'sample_steps = 4\ncfg_scale = 2.5\nnegative_prompt = "bad"\n'
        '[[prompt.subset]]\nprompt = "A dog"\nheight = 64\n',
    )
    entries = [
        {
            "prompt": "A cat",
            "width": 64,
            "height": 96,
            "frame_count": 9,
            "sample_steps": 4,
            "cfg_scale": 2.5,
            "negative_prompt": "bad",
        },
        "A dog --w 64 --h 64",
    ]
    jsn = write(tmp_path, "p.json", json.dumps(entries))
    assert load_prompts(txt) == load_prompts(toml) == load_prompts(jsn)


def test_sizes_are_rounded_down_and_that_is_said(tmp_path, caplog):
    path = write(tmp_path, "p.txt", "A cat --w 779 --h 523 --f 46")
    with caplog.at_level(logging.INFO, logger="musubi_tuner"):
        (prompt,) = load_prompts(path)
    assert (prompt.width, prompt.height, prompt.frame_count) == (768, 512, 41)
    assert "width 779 is rounded down to 768" in caplog.text
    assert "frame_count 46 is rounded down to 41" in caplog.text


def test_latent_sizes():
    prompt = SamplePrompt(width=768, height=512, frame_count=41, frame_rate=25)
    assert prompt.latent_grid == (6, 16, 24)
    assert prompt.audio_steps == 41
    assert SamplePrompt(frame_count=49, frame_rate=24).audio_steps == 51
    assert SamplePrompt(frame_count=1).latent_grid[0] == 1


def test_every_problem_is_reported_with_its_line(tmp_path):
    path = write(tmp_path, "p.txt", "A cat --w wide\nfine --d 1\nA dog --seeed 3 --s 5000\n--w 64\nA --x 3\nB --h 63\n")
    with pytest.raises(ConfigErrors) as error:
        load_prompts(path)
    text = str(error.value)
    assert str(path) in text
    for expected in (
        "line 1: width: expected an integer, got 'wide'",
        "line 3: unknown option --seeed (did you mean --seed?)",
        "line 3: sample_steps: expected 1 to 1000, got 5000",
        "line 4: options without a prompt",
        "line 5: unknown option --x",
        "line 6: height: expected at least 64, got 63",
    ):
        assert expected in text
    assert "line 2" not in text


def test_a_first_frame_needs_others_after_it(tmp_path):
    path = write(tmp_path, "p.txt", "A cat --i a.png --f 8\nA cat --i a.png --f 9\nA dog --v a.mp4 --f 1")
    with pytest.raises(UserError, match=r"line 1: image conditioning \(--i\) .* at least 9, got 8") as error:
        load_prompts(path)
    assert "line 2" not in str(error.value)
    assert "line 3" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "a", "prompt files are .txt, .toml or .json"),
        ("p.txt", "# nothing\n", "has no prompts"),
        ("p.toml", "[prompt\n", "not valid TOML"),
        ("p.toml", "[prompts]\n", "expected a table"),
        ("p.toml", "[prompt]\nwitdh = 3\n[[prompt.subset]]\nprompt = 'a'\n", "did you mean 'width'"),
        ("p.toml", "[[prompt.subset]]\nwidth = 64\n", r"prompt.subset\[0\]: has no key 'prompt'"),
        ("p.json", "{}", "expected a list"),
        ("p.json", '[{"prompt": "a", "seed": true}]', r"\[0\]: seed: expected an integer, got True"),
        ("p.json", '[{"prompt": 3}]', r"\[0\]: prompt: expected text"),
        ("p.json", "[3]", r"\[0\]: expected a string or an object"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, name, text))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="file not found"):
        load_prompts(tmp_path / "nope.txt")


def test_negative_prompt_matters_only_with_guidance(tmp_path, caplog):
    path = write(tmp_path, "p.txt", "A --n bad\nB --n bad --g 3\nC --g 3 --l 1\nD --l 2")
    prompts = load_prompts(path)
    assert [p.needs_negative for p in prompts] == [False, True, False, True]
    assert "line 1: the negative prompt has no effect" in caplog.text
    assert "line 2" not in caplog.text


def test_lists_of_blocks():
    from musubi_tuner.generation.prompts import make_prompt

    for value in ("1,2", "1 2", "[1, 2]", [1, 2]):
        problems: list[str] = []
        assert make_prompt({"stg_blocks": value}, SamplePrompt(), "x", problems).stg_blocks == (1, 2)
        assert problems == []


@pytest.mark.parametrize("subset", ["3", '["a"]'])
def test_subsets_that_are_no_tables_are_one_message(tmp_path, subset):
    with pytest.raises(UserError, match=r"expected tables \[\[prompt.subset\]\]"):
        load_prompts(write(tmp_path, "p.toml", f"[prompt]\nsubset = {subset}\n"))


def test_null_in_json_leaves_the_default(tmp_path):
    path = write(tmp_path, "p.json", '[{"prompt": "a", "width": null, "cfg_scale": null}]')
    assert load_prompts(path, SamplePrompt(width=256))[0].width == 256


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("p.txt", "a --w 64 --w 96", "--w"),
        ("p.json", '[{"prompt": "a", "num_frames": 9, "frame_count": 17}]', "frame_count"),
    ],
)
def test_giving_an_option_twice_is_an_error(tmp_path, name, text, key):
    with pytest.raises(UserError, match=f"{key} is given twice"):
        load_prompts(write(tmp_path, name, text))


def test_a_width_that_is_refused_is_not_first_rounded(tmp_path, caplog):
    caplog.set_level("INFO")
    with pytest.raises(UserError, match="at least 64, got 10"):
        load_prompts(write(tmp_path, "p.txt", "a --w 10"))
    assert "rounded" not in caplog.text


def test_frame_rates_that_nobody_means_are_refused(tmp_path):
    with pytest.raises(UserError, match="frame_rate: expected 1 to 240, got 0.001"):
        load_prompts(write(tmp_path, "p.txt", "a --frame_rate 0.001"))


def test_prompt_file_of_powershell_names_the_encoding(tmp_path):
    (tmp_path / "p.txt").write_bytes("a cat".encode("utf-16"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        load_prompts(tmp_path / "p.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        load_prompts(tmp_path / "folder.txt")
