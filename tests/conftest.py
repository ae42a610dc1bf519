"""Fixtures shared by all tests: the demo's assets and caches, made once for all workers."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers on two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# Modules of many seconds, roughly by time. The second needs nothing that the first makes for all, and would wait for.
LONG = (
    *("test_training_runs", "test_estimate", "test_processes", "test_killed_runs", "test_caching_scripts"),
    *("test_calibrated_runs", "test_compiled_blocks", "test_generate", "test_lycoris_runs", "test_manifest_runs"),
    *("test_conditioned_scripts", "test_loftq_own_base", "test_fused_backward", "test_memory_runs", "test_assets"),
    *("test_saving_runs", "test_memory_outlook", "test_device_waits", "test_tracking", "test_network_runs"),
    *("test_jsonl_runs", "test_validation", "test_dora", "test_transformer_compile", "test_compiled_runs"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first: a worker that ends with one keeps the others waiting."""
    place = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays; collecting garbage need not visit its million objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder`` after ``make`` has filled it, once over all workers."""
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            make(folder)
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def demo_assets(shared_folder: Path):
    """``demo_assets("2.3")``: the demo's checkpoint, Gemma and clips. Read only: copy what a test changes."""
    from musubi_tuner.demo.assets import asset_paths, write_assets

    def get(version: str = "2.3"):
        folder = _once(shared_folder / f"assets-{version}", lambda f: write_assets(f, version))
        return asset_paths(folder)

    return get


@pytest.fixture(scope="session")
def cached_demo(shared_folder: Path, demo_assets):
    """``cached_demo("2.3", "av")``: the assets, with clips and captions cached in ``cache``. Read only."""
    from musubi_tuner.demo.assets import asset_paths

    def get(version: str = "2.3", mode: str = "av"):
        def make(folder: Path) -> None:
            shutil.copytree(demo_assets(version).checkpoint.parent, folder, dirs_exist_ok=True)
            (folder / "complete").unlink()
            run_caching(asset_paths(folder), mode)

        return asset_paths(_once(shared_folder / f"cached-{version}-{mode}", make))

    return get


def run_caching(assets, mode: str) -> None:
    """Both caching scripts over a demo dataset."""
    from musubi_tuner.ltx2_cache_latents import main as cache_latents
    from musubi_tuner.ltx2_cache_text_encoder_outputs import main as cache_text

    dataset = assets.audio_dataset if mode == "audio" else assets.dataset
    common = ["--dataset_config", str(dataset), "--ltx2_checkpoint", str(assets.checkpoint)]
    common += ["--ltx2_mode", mode]
    cache_latents([*common, "--vae_dtype", "fp32", "--ltx2_audio_dtype", "fp32", "--num_workers", "1"])
    prompts = ["--precache_sample_prompts", "--sample_prompts", str(assets.prompts)]
    cache_text([*common, "--gemma_root", str(assets.gemma), *prompts])


TIMINGS = ("step_seconds", "tokens_per_second", "data_wait_share", "peak_memory_gib")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, float]]:
    """Scalars by step, without the timings."""
    scalars: dict[int, dict[str, float]] = {}

    def record(accelerator, values, step: int) -> None:
        timeless = {k: v for k, v in values.items() if k not in TIMINGS}
        scalars.setdefault(step, {}).update(timeless)

    monkeypatch.setattr("musubi_tuner.training.tracking.log_scalars", record)
    return scalars


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """``torch.compile`` without the graphs and limits of other tests."""
    from torch import _dynamo

    limit = _dynamo.config.recompile_limit
    _dynamo.reset()
    yield
    _dynamo.reset()
    _dynamo.config.recompile_limit = limit
