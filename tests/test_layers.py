"""Imports point down the house; config and cli stay free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "musubi_tuner"

# Lowest first; the packages of one row do not know each other unless ALLOWED says so.
LAYERS = [
    ["common"],
    ["config", "quantization"],
    ["models", "dataset"],
    ["memory", "networks"],
    ["diffusion"],
    ["conditioning", "regularizers"],
    ["assembly"],
    ["caching", "generation"],
    ["inspection", "training"],
    ["demo", "cli"],
    ["entries"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ALLOWED = {("caching", "generation")}  # caching encodes the prompt files of generation


def package_of(module: str) -> str | None:
    """The package of ``musubi_tuner.x.y``; files directly in the package are entries."""
    parts = module.split(".")
    if parts[0] != "musubi_tuner" or len(parts) == 1:
        return None
    return parts[1] if (PACKAGE / parts[1]).is_dir() else "entries"


def imported_modules(path: Path) -> list[str]:
    own = ["musubi_tuner", *path.relative_to(PACKAGE).with_suffix("").parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(own[: -node.level]) if node.level else ""
            found.append(".".join(p for p in (base, node.module or "") if p))
    return found


def test_imports_point_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        own = parts[0] if len(parts) > 1 else "entries"
        if path.name == "__init__.py" and len(parts) == 1:
            continue
        for module in imported_modules(path):
            other = package_of(module)
            if other is None or other == own or (own, other) in ALLOWED:
                continue
            if LEVEL[other] >= LEVEL[own]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_a_layer():
    packages = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert packages <= set(LEVEL), f"add to LAYERS: {packages - set(LEVEL)}"


def entry_scripts() -> list[Path]:
    return sorted(PACKAGE.glob("ltx2_*.py"))


@pytest.mark.parametrize("script", entry_scripts(), ids=lambda p: p.stem)
def test_help_imports_nothing_heavy(script: Path):
    root_script = PACKAGE.parents[1] / script.name
    assert root_script.exists(), "every script has a starter in the repository root"
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'av', 'cv2', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root_script)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


@pytest.mark.parametrize("script", entry_scripts(), ids=lambda p: p.stem)
def test_starter_only_calls_main(script: Path):
    tree = ast.parse((PACKAGE.parents[1] / script.name).read_text(encoding="utf-8"))
    kinds = [type(node).__name__ for node in tree.body]
    assert kinds in (["ImportFrom", "If"], ["Expr", "ImportFrom", "If"])
