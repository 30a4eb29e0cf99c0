"""Package mapping, and the C++/CUDA extension where it can be built. The top-level folders are sub-packages of svf_fast, so that
no generic name reaches site-packages. Without torch, a compiler or nvcc the build narrows to what is left, and says so."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

SUBPACKAGES = ("kernels", "train", "bench")
ROOT = Path(__file__).resolve().parent
# One binary for every torch from 2.11 on.
FLAGS = [
    "-O3",
    "-g0",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xfatbin=-compress-all", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80;90a;100"


def say(sentence: str) -> None:
    """On the build's standard error: shown by `pip install -v`, and by pip itself when the build fails."""
    print(f"svf_fast: {sentence}", file=sys.stderr)


def toggle(variable: str) -> str:
    """auto, 0 or 1."""
    value = os.environ.get(variable) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"svf_fast: {variable} must be auto, 0 or 1, got {value!r}")
    return value


def is_built(variable: str, without: str, reason: str | None) -> bool:
    """Whether a part is built, `reason` being why it cannot or need not be: an error where the variable demands it."""
    wanted = toggle(variable)
    if wanted == "0":
        reason = f"{variable}=0"
    if reason is None:
        return True
    if wanted == "1":
        raise SystemExit(f"svf_fast: {variable}=1, but {reason}")
    say(f"installed {without}: {reason}")
    return False


def why_no_extension() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the kernels are for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[-1]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r} on PATH"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "torch is not there while building: install it first, and use pip install --no-build-isolation"
    return None


def why_no_cuda() -> str | None:
    """The reason why the CUDA kernels are left out, or None."""
    import torch

    if shutil.which("nvcc") is None:
        return "there is no nvcc on PATH"
    if torch.version.cuda is None and toggle("SVF_FAST_BUILD_CUDA") != "1":
        return f"torch {torch.__version__} is a CPU build"
    return None


def cuda_root() -> Path:
    """Where nvcc's toolkit lies, by its own word."""
    said = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    found = re.search(r"TOP=(\S+)", said)
    if found is None:
        raise RuntimeError(f"nvcc does not say where its toolkit is: {said.strip()[:200]}")
    return Path(found[1])


def known_archs() -> list[str]:
    """Architectures to compile for: those asked for, by default those of CUDA_ARCHS that this nvcc knows."""
    asked = os.environ.get("SVF_FAST_CUDA_ARCHS")
    if asked:
        return re.split(r"[;,\s]+", asked.strip())
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout
    return [arch for arch in CUDA_ARCHS.split(";") if f"sm_{arch}" in known or f"sm_{arch.rstrip('a')}" in known]


def wgmma_flag() -> list[str]:
    """The define for kernels that only sm_90a has."""
    return ["-DSVF_FAST_HAS_SM90A"] if "90a" in known_archs() else []


def compile_cuda(source: str, folder: Path) -> str:
    """One .cu file for all architectures; the object."""
    target = folder / f"{Path(source).name}.o"
    target.parent.mkdir(parents=True, exist_ok=True)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known_archs()]
    # devices that are newer than all of these compile the oldest one's PTX
    oldest = min(known_archs(), key=lambda arch: int(re.sub(r"\D", "", arch)))
    codes.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
    subprocess.run(["nvcc", *NVCC_FLAGS, *wgmma_flag(), *codes, "-c", source, "-o", str(target)], check=True)
    return str(target)


def add_cuda(module: Any, folder: Path) -> None:
    """Compiles the CUDA kernels into `folder` and adds them and their binding to the extension; all of it or nothing."""
    toolkit = cuda_root()
    kernels = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/cuda/*.cu"))]
    module.extra_objects += [compile_cuda(source, folder) for source in kernels]
    module.sources.append("csrc/cuda/binding.cpp")
    module.include_dirs.append(str(toolkit / "include"))
    module.library_dirs.append(str(toolkit / "lib64"))
    module.libraries += ["cudart_static", "dl", "rt", "pthread"]
    module.extra_compile_args += wgmma_flag()
    # the current stream comes from libtorch_cuda where that is there: a weak symbol, found through libtorch
    module.extra_link_args += ["-Wl,--no-as-needed", "-ltorch"]


def extension() -> dict[str, Any]:
    """What `setup` needs for the extension; nothing where it is not built."""
    if not is_built("SVF_FAST_BUILD_CPP", "as pure Python, without the cpp backend", why_no_extension()):
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    options: dict[str, Any] = {
        "include_dirs": [str(ROOT / "csrc" / "cpu")], "extra_link_args": ["-s"], "extra_compile_args": list(FLAGS),
    }  # fmt: skip
    has_cuda = is_built("SVF_FAST_BUILD_CUDA", "without CUDA kernels in C++", why_no_cuda())

    class Build(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            (module,) = self.extensions
            try:
                if has_cuda:
                    add_cuda(module, Path(self.build_temp) / "cuda")
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                if toggle("SVF_FAST_BUILD_CUDA") == "1":
                    raise SystemExit(f"svf_fast: SVF_FAST_BUILD_CUDA=1, but nvcc failed: {error}") from error
                say(f"installed without CUDA kernels in C++: nvcc failed: {error}")
            try:
                super().build_extensions()
            except Exception as error:
                if "1" in (toggle("SVF_FAST_BUILD_CPP"), toggle("SVF_FAST_BUILD_CUDA")):
                    say(f"the extension was demanded, but the compiler failed: {error}")
                    raise
                say(f"installed as pure Python, without the cpp backend: the compiler failed: {error}")
                self.extensions = []
                # and the wheel is one for every machine
                if "bdist_wheel" in self.distribution.command_obj:
                    self.get_finalized_command("bdist_wheel").root_is_pure = True

    # relative, as setuptools wants them
    sources = [
        str(p.relative_to(ROOT)) for folder in ("csrc", "csrc/cpu") for p in sorted(ROOT.glob(f"{folder}/*.cpp"))
    ]
    module = CppExtension("svf_fast._C", sources, py_limited_api=True, **options)
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


packages = find_packages(include=["svf_fast", "svf_fast.*"])
package_dir = {"svf_fast": "svf_fast"}
for folder in SUBPACKAGES:
    name = f"svf_fast.{folder}"
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]
    package_dir[name] = folder

setup(packages=packages, package_dir=package_dir, **extension())
