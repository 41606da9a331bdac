"""The dependency rule of DESIGN §2, as a test: who may import whom, how long a file may be, what it may be called."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "mwm"
MAX_LINES = 400
FORBIDDEN_NAMES = {"utils", "util", "misc", "common", "helpers", "helper"}

ALLOWED = {
    "ops": set(),
    "sparse": {"ops"},
    "masking": {"ops"},
    "mim": {"sparse", "ops"},
    "localize": {"ops", "data"},
    "data": {"ops"},
    "view": {"ops"},
    "train": {"mim", "masking", "data", "view", "sparse", "ops"},
    "transfer": {"train", "data", "view", "ops"},
    "study": {"train", "transfer", "localize", "view", "data", "masking", "ops"},
    "demo": {"train", "transfer", "localize", "view", "data", "masking", "mim", "sparse", "ops"},
    "cli": {"study", "demo", "train", "transfer", "localize", "view", "data", "masking", "mim", "sparse", "ops", "bench"},
}
LAZY_ONLY_IN = {"transformers": {"localize"}, "open_clip": {"localize"}, "triton": {"ops"}, "kernels": set()}


def _room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _imports(path: Path) -> set[str]:
    """Absolute dotted names that a file imports, relative imports resolved."""
    package = ["mwm", *path.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names.update({stem} if node.module and not node.level else {f"{stem}.{alias.name}" for alias in node.names} | {stem})
            if node.module == "mwm":
                names.update(f"mwm.{alias.name}" for alias in node.names)
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_what_the_design_allows(path: Path) -> None:
    room = _room(path)
    if room in {"__init__", "__main__"}:
        return
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] in LAZY_ONLY_IN:
            assert room in LAZY_ONLY_IN[parts[0]], f"{path.name} of room {room} imports {name}"
        if parts[0] != "mwm" or len(parts) == 1:
            continue
        target = parts[1]
        if target in {"_core", "_cuda", "kernels"}:
            assert room == "ops", f"only ops may import mwm.{target}, not {path}"
        elif target in ALLOWED and target != room:
            assert target in ALLOWED[room], f"{room} may not import {target} ({path})"


def test_source_files_are_short_and_well_named() -> None:
    sources = [p for folder in ("python", "kernels", "csrc", "bench", "tests", "examples", "scripts") for p in (ROOT / folder).rglob("*")
               if p.suffix in {".py", ".cpp", ".cu", ".h"}]
    assert len(sources) > 20
    too_long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not too_long
    badly_named = [str(p.relative_to(ROOT)) for p in sources if p.stem in FORBIDDEN_NAMES]
    assert not badly_named


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
