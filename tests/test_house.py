"""The house: lint, formatting and types hold; nothing imports upwards; optional packages stay optional; the README is true."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from svf_fast.env import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
# Floors of the library, from the ground up. A module may import from its own floor and from those below.
FLOORS = (
    ("contract", "decompose", "swap", "progress"),
    ("bits", "quantize", "vendor", "choice", "frozen_norm", "targets", "memory", "plain_forward"),
    ("backends",),
    ("ops", "chain", "cosine", "reference"),
    ("functional",),
    ("modules",),
    ("block", "fuse"),
    ("convert", "io", "summary"),
    ("env",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def imported_modules(path: Path) -> set[str]:
    """Full names that a file imports at any level: `svf_fast.bits`, `svf_fast.train.data.voc`, `torch`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["lint", "formatting", "types"],
)
def test_static_checks(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "svf_fast").rglob("*.py")), ids=lambda p: p.stem)
def test_nothing_in_the_library_imports_upwards(path: Path) -> None:
    if path.name == "__init__.py" and path.parent.name == "svf_fast":
        return
    room = path.relative_to(ROOT / "svf_fast").parts[0].removesuffix(".py")
    assert room in FLOOR_OF, f"{room} has no floor yet: give it one in FLOORS"
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "svf_fast" or len(parts) < 2:
            continue
        assert parts[1] not in ("train", "bench"), (
            f"{path.name} imports {name}: the library knows no dataset and no benchmark"
        )
        if parts[1] in FLOOR_OF:
            assert FLOOR_OF[parts[1]] <= FLOOR_OF[room], f"{path.name} imports {name} from a floor above"


@pytest.mark.parametrize("path", sorted((ROOT / "train").rglob("*.py")), ids=lambda p: p.stem)
def test_training_reaches_the_library_through_public_names(path: Path) -> None:
    public = {"functional", "reference", "memory", "train", "bench"}
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "svf_fast" and len(parts) > 1 and parts[1] in FLOOR_OF:
            assert parts[1] in public, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_a_kernel_knows_no_module(path: Path) -> None:
    forbidden = {"svf_fast.modules", "svf_fast.convert", "svf_fast.train", "svf_fast.functional"}
    assert not forbidden & imported_modules(path)


def test_the_import_is_lean() -> None:
    """`import svf_fast` needs torch and numpy; what only files, figures or training need comes when it is used."""
    heavy = ("cv2", "matplotlib", "safetensors", "rich", "yaml", "triton", "PIL", "torch._inductor")
    code = f"import sys, svf_fast; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_environment_variable_is_in_the_readme_and_in_the_report() -> None:
    # but for what a compiler is told
    pattern = re.compile(r"(?<!-D)SVF_FAST_[A-Z_]+")
    used = {
        v
        for p in ROOT.rglob("*.py")
        if ".venv" not in p.parts and "tests" not in p.parts
        for v in pattern.findall(p.read_text("utf-8"))
    }
    assert used == set(VARIABLES)
    assert used <= set(pattern.findall((ROOT / "README.md").read_text(encoding="utf-8")))


def test_it_runs_from_a_source_tree_without_installation(tmp_path: Path) -> None:
    code = "import svf_fast.kernels, svf_fast.bench, svf_fast.train; print(svf_fast.train.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(ROOT / "train") in done.stdout


def test_the_wheel_holds_every_package(tmp_path: Path) -> None:
    """Folders are packages of svf_fast in a wheel, and no generic name (`train`, `kernels`) reaches site-packages."""
    code = (
        "import runpy, setuptools; kept = {}; setuptools.setup = kept.update; runpy.run_path('setup.py'); "
        "print(' '.join(sorted(kept['packages'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = done.stdout.split()
    expected = {"svf_fast"} | {
        ".".join(["svf_fast", *[p for p in init.parent.relative_to(ROOT).parts if p != "svf_fast"]])
        for folder in ("svf_fast", "kernels", "train", "bench")
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(packages) == expected


@pytest.mark.slow
def test_the_example_in_the_readme_runs(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", example[1]], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "tuned.safetensors").stat().st_size < 200_000
