"""What the CUDA kernels cost on GPUs that are not there: registers, spills, shared memory, blocks a multiprocessor, tensor cores.

python -m svf_fast.bench.nvcc [--out FILE]

Every .cu of csrc/cuda is compiled by nvcc for sm_80, sm_90a and sm_100 (SVF_FAST_CUDA_ARCHS: others, such as "80;90a"), and ptxas and
the binary say what each kernel takes. Exit status 1 where a kernel spills, cannot fit on a multiprocessor, or multiplies without
tensor cores; 0, with the reason, where there is no nvcc."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from svf_fast.bench import results

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
DEFAULT_ARCHS = ("80", "90a", "100")
FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC")


class Limits(NamedTuple):
    """Of a multiprocessor: bytes of shared memory, of them what one block may have, threads, blocks."""

    shared: int
    block_shared: int
    threads: int = 2048
    blocks: int = 32


KIB = 1024
# CUDA programming guide, technical specifications per compute capability
LIMITS = {"80": Limits(164 * KIB, 163 * KIB), "90": Limits(228 * KIB, 227 * KIB), "100": Limits(228 * KIB, 227 * KIB)}
_REGISTERS = 65536
# Shared memory that the system takes of every block.
_RESERVED = 1024
# What a product compiles to in PTX; kernels without products have neither.
_TENSOR_CORES = ("mma.sync", "wgmma.mma_async")
_WITHOUT_PRODUCTS = ("elementwise", "cosine_backward")
_PRODUCTS = ("bf16", "fp16", "tf32", "tf32x3")
# ptxas names the function whose wgmma wait for each other.
_SERIALISED = r"wgmma\.mma_async instructions are serialized .* in (?:the )?function '(\w+)'"
# Statements of an empty kernel.
_SMALLEST_BODY = 4


class Cost(NamedTuple):
    """One kernel on one architecture."""

    arch: str
    source: str
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    blocks: int
    tensor_core_instructions: int
    # ptxas made wgmma wait for each other
    is_serialised: bool

    @property
    def faults(self) -> list[str]:
        """Why this kernel may not be shipped."""
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if not self.blocks:
            found.append("does not fit")
        if not self.tensor_core_instructions and not self.source.startswith(_WITHOUT_PRODUCTS):
            found.append("no tensor cores")
        if self.is_serialised:
            found.append("wgmma are serialised")
        return found


def why_unusable() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if shutil.which("nvcc") else "there is no nvcc on PATH: the CUDA kernels are not compiled"


def archs() -> list[str]:
    """The architectures to compile for."""
    given = os.environ.get("SVF_FAST_CUDA_ARCHS")
    return re.split(r"[;,\s]+", given.strip()) if given else list(DEFAULT_ARCHS)


def costs(source: Path, arch: str) -> Iterator[Cost]:
    """Compiles one file for one architecture; the cost of each of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc",
            *FLAGS,
            *(["-DSVF_FAST_HAS_SM90A"] if arch == "90a" else []),
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-Xptxas=-v",
            "--keep",
            f"--keep-dir={folder}",
        ]
        done = subprocess.run([*command, "-c", str(source), "-o", f"{folder}/out.o"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
        (ptx,) = Path(folder).glob("*.ptx")
        bodies = dict(_bodies(ptx.read_text(encoding="utf-8")))
    serialised = set(re.findall(_SERIALISED, done.stderr))
    for said in done.stderr.split("Compiling entry function ")[1:]:
        symbol = said.split("'")[1]
        body = bodies[symbol]
        if body.count(";") < _SMALLEST_BODY:
            # empty: this kernel is for another architecture
            continue
        registers, threads = _number(r"Used (\d+) registers", said), _number(r"\.maxntid (\d+)", body)
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
        # what a launch asks for is in no binary: kernels say it in a comment (ptx.cuh)
        shared = _number(r"(\d+) bytes smem", said) + _number(r"dynamic shared memory: (\d+)", body)
        products = sum(body.count(word) for word in _TENSOR_CORES)
        fitting = _blocks(arch, registers, threads, shared)
        yield Cost(
            arch,
            source.stem,
            _demangled(symbol),
            registers,
            spilled,
            shared,
            threads,
            fitting,
            products,
            symbol in serialised,
        )


def _bodies(ptx: str) -> Iterator[tuple[str, str]]:
    """Name and text of each kernel in a PTX file."""
    for part in ptx.split(".entry ")[1:]:
        yield part.split("(", 1)[0].strip(), part


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _blocks(arch: str, registers: int, threads: int, shared: int) -> int:
    """How many blocks of a kernel a multiprocessor holds at once; 0 where it cannot hold one."""
    limits = LIMITS[arch.rstrip("af")]
    if shared > limits.block_shared:
        return 0
    # registers are given out to warps in units of 256
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS // per_warp // (threads // 32)
    return min(limits.blocks, limits.threads // threads, by_registers, limits.shared // (shared + _RESERVED))


def _demangled(symbol: str) -> str:
    """A kernel's name and template arguments, from its symbol."""
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", "-p", symbol], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"svf::cuda::|\(anonymous namespace\)::", "", name)
    # launch.h numbers the kinds of products
    return re.sub(r"\(Products\)(\d)", lambda found: _PRODUCTS[int(found[1])], name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="also write the table as JSON")
    options = parser.parse_args()
    reason = why_unusable()
    if reason is not None:
        print(f"{reason}.")
        return 0
    found: list[Cost] = []
    print(f"{'kernel':<66} {'arch':<5} regs spill  shared threads blocks/SM tensor-core")
    for source in sorted(SOURCES.glob("*.cu")):
        for arch in archs():
            for cost in costs(source, arch):
                found.append(cost)
                print(
                    f"{cost.kernel:<66} {arch:<5} {cost.registers:>4} {cost.spilled_bytes:>5} {cost.shared_bytes:>7} "
                    f"{cost.threads:>7} {cost.blocks:>9} {cost.tensor_core_instructions:>11}"
                    + (f"  FAULT: {', '.join(cost.faults)}" if cost.faults else ""),
                    flush=True,
                )
    if options.out is not None:
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout.splitlines()[-1]
        rows = [{**cost._asdict(), "faults": cost.faults} for cost in found]
        results.write(options.out.parent, options.out.stem, {"nvcc": version, "flags": FLAGS, "archs": archs()}, rows)
    return 1 if any(cost.faults for cost in found) else 0


if __name__ == "__main__":
    sys.exit(main())
