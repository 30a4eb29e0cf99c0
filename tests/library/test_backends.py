"""The switch between backends, its environment variable, and a lean import."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import svf_fast


def test_backend_is_a_function_and_a_context() -> None:
    from svf_fast import backends

    before = backends.current()
    with svf_fast.backend("torch") as name:
        assert name == backends.current() == "torch"
        with svf_fast.backend("auto"):
            assert backends.current() == "auto"
        assert backends.current() == "torch"
    assert backends.current() == before
    svf_fast.backend("torch")
    assert backends.current() == "torch"
    svf_fast.backend(before)


def test_a_backend_that_is_not_there_or_unknown() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, torch, cpp, triton, got 'mps'"):
        svf_fast.backend("mps")
    from svf_fast import backends

    for name in ("cpp", "triton"):
        if backends.why_unusable(name, "cpu") is not None and not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match=f"backend '{name}' is not available"):
                svf_fast.backend(name)


def test_env_lists_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    from svf_fast.env import report

    text = report()
    for word in ("torch", "cpp", "triton", "SVF_FAST_BACKEND", torch.__version__):
        assert word in text


def run_python(*arguments: str, **environment: str) -> Any:
    import subprocess
    import sys

    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def test_the_environment_variable_chooses_the_backend() -> None:
    command = ("-c", "import svf_fast.backends as b; print(b.current())")
    assert run_python(*command, SVF_FAST_BACKEND="torch").stdout.strip() == "torch"
    # an import never fails over it: a wrong name is warned about
    wrong = run_python(*command, SVF_FAST_BACKEND="mps")
    assert wrong.stdout.strip() == "auto"
    assert "SVF_FAST_BACKEND must be one of" in wrong.stderr


def test_the_import_is_lean() -> None:
    """Importing the library loads neither the training side nor anything slow that it does not need."""
    heavy = (
        "cv2",
        "matplotlib",
        "rich",
        "yaml",
        "triton",
        "svf_fast.train",
        "svf_fast.bench",
        "safetensors",
        "torch._dynamo",
        "torch._inductor",
    )
    plain = run_python("-c", "import sys, torch; print(' '.join(sys.modules))").stdout.split()
    loaded = run_python("-c", "import sys, svf_fast; print(' '.join(sys.modules))").stdout.split()
    assert [m for m in heavy if m in loaded and m not in plain] == []
