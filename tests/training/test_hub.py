"""Uploads and downloads with a stand-in for the Hub."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from test_training_runs import arguments, refused

from musubi_tuner.common.errors import UserError
from musubi_tuner.config.hub import HubConfig, HubFolder, hub_folder
from musubi_tuner.ltx2_train_network import main as train
from musubi_tuner.training.hub import Uploader, download_state
from musubi_tuner.training.saving import Saver
from musubi_tuner.training.state import Progress

TOKEN = "hf_a-secret"
CONFIG = HubConfig(huggingface_repo_id="me/lora", huggingface_token=TOKEN)


@dataclass
class FakeApi:
    """Records calls; ``broken`` makes them fail as a bad token does, ``gate`` lets uploads wait."""

    broken: bool = False
    gate: threading.Event | None = None
    repositories: list[tuple[str, dict]] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    def create_repo(self, repo_id: str, **kwargs) -> None:
        self._fail()
        self.repositories.append((repo_id, kwargs))

    def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        self._send(path_or_fileobj, f"{repo_type}:{repo_id}:{path_in_repo}")

    def upload_folder(self, *, folder_path: Path, path_in_repo: str, repo_id: str, repo_type: str) -> None:
        self._send(folder_path, f"{repo_type}:{repo_id}:{path_in_repo}/")

    def _send(self, path: Path, what: str) -> None:
        self._fail()
        assert path.exists()
        if self.gate is not None:
            assert self.gate.wait(60)
        assert path.exists(), "removed while it was sent"
        self.sent.append(what)

    def _fail(self) -> None:
        if self.broken:
            raise OSError(f"401 for {TOKEN}")


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("me/lora/x-state", HubFolder("me/lora", "x-state")),
        ("me/lora/runs/x-state:v2", HubFolder("me/lora", "runs/x-state", "v2")),
        ("me/lora/x-state:main:dataset", HubFolder("me/lora", "x-state", "main", "dataset")),
        ("me/lora/x-state::space", HubFolder("me/lora", "x-state", None, "space")),
        ("me\\lora\\x-state", HubFolder("me/lora", "x-state")),  # as a path of Windows
    ],
)
def test_addresses_of_states(text: str, folder: HubFolder):
    assert hub_folder(text) == folder


@pytest.mark.parametrize("text", ["me/lora", "x-state", "me/lora/x:main:models", "me/lora/x:a:model:b"])
def test_wrong_addresses_of_states(text: str):
    with pytest.raises(ValueError, match="OWNER/NAME/PATH"):
        hub_folder(text)


@pytest.mark.parametrize(("visibility", "private"), [(None, True), ("private", True), ("public", False)])
def test_a_repository_is_private_unless_asked_otherwise(visibility, private: bool):
    api = FakeApi()
    config = replace(CONFIG, huggingface_repo_visibility=visibility, huggingface_repo_type="dataset")
    Uploader(config, api).create_repository()
    assert api.repositories == [("me/lora", {"repo_type": "dataset", "private": private, "exist_ok": True})]


@pytest.mark.parametrize(("folder", "place"), [(None, "a.safetensors"), ("/runs\\one/", "runs/one/a.safetensors")])
def test_place_of_a_file(tmp_path: Path, folder: str | None, place: str):
    (tmp_path / "a.safetensors").touch()
    api = FakeApi()
    Uploader(replace(CONFIG, huggingface_path_in_repo=folder), api).upload([tmp_path / "a.safetensors"], wait=True)
    assert api.sent == [f"model:me/lora:{place}"]


def test_async_uploads_are_waited_for_at_the_end_only(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).touch()
    api = FakeApi(gate=threading.Event())
    uploader = Uploader(replace(CONFIG, async_upload=True), api)
    uploader.upload([tmp_path / "a"], wait=False)
    assert api.sent == [], "training goes on"
    api.gate.set()
    uploader.upload([tmp_path / "b"], wait=True)
    assert api.sent == ["model:me/lora:a", "model:me/lora:b"]


def test_what_is_yet_to_be_sent_is_removed_afterwards(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.touch()
    api = FakeApi(gate=threading.Event())
    uploader = Uploader(replace(CONFIG, async_upload=True), api)
    uploader.upload(paths, wait=False)
    for path in paths:
        uploader.when_sent(f"removing {path.name}", path.unlink)
    uploader.when_sent("removing c", (tmp_path / "c").unlink)
    assert all(path.exists() for path in paths), "neither what is being sent nor what waits for it"
    api.gate.set()
    uploader.close()
    assert api.sent == ["model:me/lora:a", "model:me/lora:b"]
    assert not any(path.exists() for path in paths)
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "removing c failed: FileNotFoundError" in record.getMessage()


def test_what_is_sent_is_removed_at_once(tmp_path: Path):
    path = tmp_path / "a"
    path.touch()
    uploader = Uploader(CONFIG, FakeApi())
    uploader.upload([path], wait=False)
    uploader.when_sent("removing a", path.unlink)
    assert not path.exists()


def test_failures_are_logged_without_the_token(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a").touch()
    uploader = Uploader(CONFIG, FakeApi(broken=True))
    uploader.create_repository()
    uploader.upload([tmp_path / "a"], wait=True)
    assert [r.levelname for r in caplog.records] == ["ERROR", "ERROR"]
    assert "uploading a to me/lora failed: OSError: 401 for ***" in caplog.text
    assert TOKEN not in caplog.text


def uploaded(assets, output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> FakeApi:
    """What a run of two steps that saves each of them sends."""
    api = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: api)
    hub = ("--huggingface_repo_id", "me/lora", "--huggingface_token", TOKEN, "--save_every_n_steps", "1")
    train(arguments(assets, output, *hub, *flags))
    return api


def test_a_run_uploads_both_formats_and_states(cached_demo, tmp_path: Path, monkeypatch, capsys):
    flags = ("--save_state", "--save_state_to_huggingface", "--async_upload", "--huggingface_path_in_repo", "r")
    api = uploaded(cached_demo(), tmp_path, monkeypatch, *flags)
    ends = (".safetensors", ".comfy.safetensors", "-state/")
    names = [f"x{point}{end}" for point in ("-step00000001", "-step00000002", "") for end in ends]
    assert api.sent == [f"model:me/lora:r/{name}" for name in names]
    output = capsys.readouterr()
    assert "uploaded x.safetensors to me/lora/r/x.safetensors" in output.err
    assert TOKEN not in output.out + output.err
    assert all(TOKEN.encode() not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_run_uploads_the_comfy_file_alone(cached_demo, tmp_path: Path, monkeypatch):
    api = uploaded(cached_demo(), tmp_path, monkeypatch, "--no_save_original_lora")
    assert api.sent[-1] == "model:me/lora:x.comfy.safetensors"
    assert len(api.sent) == 3


def test_a_run_sends_files_that_leave_the_window_meanwhile(cached_demo, tmp_path: Path, monkeypatch):
    """The connection hangs until the training is over; files of steps 1 and 2 are out of the window by then."""
    api = FakeApi(gate=threading.Event())
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: api)
    on_end = Saver.on_end

    def connected(saver: Saver, progress: Progress) -> None:
        api.gate.set()
        on_end(saver, progress)

    monkeypatch.setattr(Saver, "on_end", connected)
    saves = ("--save_every_n_steps", "1", "--save_last_n_steps", "1", "--save_state", "--no_convert_to_comfy")
    hub = ("--huggingface_repo_id", "me/lora", "--save_state_to_huggingface", "--async_upload")
    train(arguments(cached_demo(), tmp_path, *saves, *hub, steps=4))
    ends = (".safetensors", "-state/")
    points = [*(f"-step{step:08}" for step in range(1, 5)), ""]
    assert api.sent == [f"model:me/lora:x{point}{end}" for point in points for end in ends]
    kept = {f"x{point}{end.rstrip('/')}" for point in points[2:] for end in ends}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_run_resumes_from_the_hub(cached_demo, tmp_path: Path, monkeypatch, capsys):
    train(arguments(cached_demo(), tmp_path / "first" / "runs", "--save_state"))
    asked = {}

    def snapshot(repo_id: str, **kwargs) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(tmp_path / "first")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    flags = ("--resume", "me/lora/runs/x-state:v2:dataset", "--resume_from_huggingface", "--huggingface_token", TOKEN)
    train(arguments(cached_demo(), tmp_path / "second", *flags, steps=3))
    assert "runs/x-state at step 2" in capsys.readouterr().err.replace("\\", "/")
    assert asked == {
        "repo_id": "me/lora",
        "repo_type": "dataset",
        "revision": "v2",
        "allow_patterns": ["runs/x-state/*.safetensors", "runs/x-state/*.json"],
        "token": TOKEN,
    }
    with pytest.raises(UserError, match="has no folder elsewhere"):
        download_state(HubFolder("me/lora", "elsewhere"), None)


def test_a_download_that_fails_is_one_message_without_the_token(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(f"401 for {TOKEN}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="me/lora/x-state: cannot be fetched") as caught:
        download_state(HubFolder("me/lora", "x-state"), TOKEN)
    assert TOKEN not in str(caught.value)


WRONG = {
    "no state to resume": (["--resume_from_huggingface"], "needs --resume OWNER/NAME/PATH"),
    "no address": (["--resume_from_huggingface", "--resume", "x-state"], "expected OWNER/NAME/PATH"),
    "no repository": (["--async_upload"], "--async_upload needs --huggingface_repo_id"),
    "no owner": (["--huggingface_repo_id", "lora"], "lora: expected OWNER/NAME"),
    "no states": (["--huggingface_repo_id", "me/lora", "--save_state_to_huggingface"], "needs --save_state or"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG.values(), ids=WRONG)
def test_flags_that_need_others(cached_demo, tmp_path: Path, capsys, flags: list[str], message: str):
    assert message in refused(arguments(cached_demo(), tmp_path / "out", *flags), capsys)
    assert not (tmp_path / "out").exists()
