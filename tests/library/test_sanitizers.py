"""The CPU kernels under the address and undefined-behaviour sanitizers: no access outside a tensor or a
buffer, whose memory is handed out exactly and filled with NaN, no overflow."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svf_fast.backends import native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
FLAGS = [
    "-O1", "-g", "-std=c++20", "-fPIC", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined", "-fno-strict-aliasing",
    "-DSVF_FAST_EXACT_SCRATCH", "-Wno-maybe-uninitialized", "-DTORCH_TARGET_VERSION=0x020b000000000000",
]  # fmt: skip
# the tests run in a process of their own, on the instrumented library
PROGRAM = """
import sys, pathlib, pytest
from svf_fast.backends import native
native.library_path = lambda: pathlib.Path(sys.argv[1])
assert native.load() is None, native.load()
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on PATH")
@pytest.mark.skipif(native.library_path() is None, reason="the C++ extension is not built here")
def test_no_access_outside_and_nothing_undefined(tmp_path: Path) -> None:
    # libstdc++ beside it: the sanitizer looks for the function that throws while it is loaded
    names = ("libasan.so", "libstdc++.so.6")
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True, check=True).stdout.strip()
        for n in names
    ]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip("g++ has no address sanitizer")
    include = Path(torch.__file__).parent / "include"
    objects = []
    for source in SOURCES:
        objects.append(str(tmp_path / f"{source.stem}.o"))
        command = ["g++", *FLAGS, "-isystem", str(include), "-I", str(ROOT / "csrc" / "cpu"), "-c", str(source)]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    library = tmp_path / "_C.so"
    link = ["g++", "-shared", "-fsanitize=address,undefined", *objects, "-o", str(library)]
    subprocess.run([*link, f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library), str(ROOT / "tests" / "library" / "test_native.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Python itself leaks at exit
        env={
            "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0", "PYTHONPATH": str(ROOT),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
