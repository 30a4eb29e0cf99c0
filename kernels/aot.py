"""Compiling every kernel configuration that may be chosen for ResNet-50, for GPUs that are not there, and what each costs:
registers, spills, shared memory, tensor-core instructions.

python -m svf_fast.kernels.aot [--arch 80 90 100] [--types bf16 tf32 fp32] [--keep exact int8 none] [--jobs 2] [--json FILE]

What a launch would compile is compiled: the launchers run on CPU tensors, with a stand-in for the driver, and stop before the
launch. Exit status 1 where a configuration spills, needs more shared memory than the GPU has, or multiplies without tensor
cores."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_fast.backends.kernel_set import Config, Gradients, Outputs, dense_strides, precision
from svf_fast.contract import Geometry, Kept, Layer

# Bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# name: (dtype of the activations, whether float32 is multiplied as TF32)
TYPES = {"bf16": (torch.bfloat16, False), "fp16": (torch.float16, False), "tf32": (torch.float32, True),
         "fp32": (torch.float32, False)}  # fmt: skip
# pixels of ResNet-50's layers 2 to 4 at 641: two pictures of 81x81
_BATCH, _SIDE = 2, 81


class Job(NamedTuple):
    """One compilation: a launcher's name below, its layer, how z is kept, the tiles."""

    kernel: str
    layer: str
    type: str
    keep: str
    config: Config


class Cost(NamedTuple):
    """What the compiler says of one kernel on one architecture."""

    arch: int
    job: Job
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int

    @property
    def faults(self) -> list[str]:
        """Why this configuration may not be offered."""
        found = []
        if self.spilled_bytes:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT[self.arch]:
            found.append(f"shared memory over {SHARED_LIMIT[self.arch]} bytes")
        if not self.tensor_core_instructions and self.job.kernel not in _ELEMENTWISE:
            found.append("no tensor cores")
        return found


# Co, Ci and stride of the layers that differ in their rank; the strided one has no residual and no ReLU
_LAYERS = {"l2 conv3": (512, 128, 1), "l3 conv3": (1024, 256, 1), "l4 conv3": (2048, 512, 1), "l2 down": (512, 256, 2)}
_ELEMENTWISE = ("epilogue", "quantize", "pack", "keep", "cosine backward")


def jobs(types: list[str], keeps: list[str]) -> Iterator[Job]:
    """Every configuration on offer for the layers of ResNet-50, in every type and way to keep z."""
    from svf_fast.kernels import configs

    for name in types:
        products = precision(*TYPES[name])
        seen: set[tuple[int, str, str, Config]] = set()
        for layer, (outputs, inputs, stride) in _LAYERS.items():
            rank = min(outputs, inputs)
            for keep in keeps:
                is_roomy = keep == "exact" and stride == 1
                offers = {
                    "fused": configs.back_to_back_forward(rank, products, keep == "int8", is_roomy),
                    "fused backward": configs.back_to_back_backward(rank, products, stride > 1),
                    "project": configs.projection_forward(products),
                    "project backward": configs.projection_backward(rank, products),
                }
                for kernel, tiles in offers.items():
                    for config in tiles:
                        # layers differ in sizes that are not compiled in: one stands for all
                        job = (stride, kernel, keep, config)
                        if job not in seen and not (keep == "none" and "backward" in kernel):
                            seen.add(job)
                            yield Job(kernel, layer, name, keep, config)
        yield Job("cosine", "prior", name, "", configs.COSINE[products])
        # the same kernel whatever a product rounds
        for kernel in _ELEMENTWISE if name != "fp32" or "tf32" not in types else ():
            yield Job(kernel, "prior" if "cosine" in kernel else "l3 conv3", name, "", configs.COSINE_BACKWARD)


def _launch(job: Job) -> None:
    """Calls the launcher of `job` on tensors of its layer's shape."""
    from svf_fast.kernels import back_to_back, cosine, elementwise, projection

    dtype, tf32 = TYPES[job.type]
    products = precision(dtype, tf32)

    def activation(channels: int, kind: torch.dtype = dtype, side: int = _SIDE) -> Tensor:
        # never touched: the pages are not even mapped
        return torch.empty(_BATCH, channels, side, side, dtype=kind, memory_format=torch.channels_last)

    if job.layer == "prior":
        features, flat = activation(2048), torch.ones(_BATCH, 1, _SIDE, _SIDE)
        if job.kernel == "cosine":
            torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
            cosine.max_cosine(features, features, flat, 1e-7)
            return
        winners = torch.zeros(_BATCH, _SIDE * _SIDE, dtype=torch.int32)
        values = torch.empty(_BATCH, _SIDE * _SIDE, dtype=dtype)
        cosine.max_cosine_backward(
            values, features, features, winners, flat, 1e-7, features.shape, False, True, True
        )  # fmt: skip
        return
    outputs, inputs, stride = _LAYERS[job.layer]
    rank = min(outputs, inputs)
    vector = torch.empty(outputs)
    layer = Layer(
        torch.empty(rank, inputs, dtype=dtype), torch.empty(rank), torch.empty(outputs, rank, dtype=dtype), vector, vector,
        Geometry((stride, stride)), stride == 1,
    )  # fmt: skip
    x, y = activation(inputs, side=stride * (_SIDE - 1) + 1), activation(outputs)
    residual = activation(outputs) if layer.relu else None
    z, q = activation(rank), activation(rank, torch.int8)
    mask = torch.empty(y.numel() // 8 if layer.relu else 0, dtype=torch.uint8)
    q_scale = torch.empty(-(-y.numel() // outputs // 64), rank)
    is_int8 = job.keep == "int8"
    out = Outputs(y, mask if mask.numel() and job.keep != "none" else None)
    if job.keep != "none":
        out = out._replace(q=q, q_scale=q_scale) if is_int8 else out._replace(z=z)
    kept = Kept(q if is_int8 else z, q_scale if is_int8 else torch.empty(0), mask)
    gradients = Gradients(
        torch.empty_like(y) if layer.relu else None,
        torch.empty(4096, rank),
        dense_strides(y.shape, torch.channels_last),
    )
    launchers: dict[str, Callable[[], Any]] = {
        "fused": partial(back_to_back.forward, x, layer, layer.s, residual, out, job.config, products),
        "fused backward": partial(back_to_back.backward, y, layer, layer.s, kept, gradients, x, job.config, products),
        "project": partial(projection.forward, z, layer.u, layer, residual, out, job.config, products),
        "project backward": partial(projection.backward, y, layer, layer.s, kept, gradients, z, job.config, products),
        "epilogue": partial(elementwise.epilogue, layer, residual, out),
        "quantize": partial(elementwise.quantize, z, q, q_scale),
        "pack": partial(elementwise.pack, y),
        "keep": partial(elementwise.keep_masked, y, mask),
    }
    launchers[job.kernel]()


class _NoGpu:
    """What Triton asks the driver while it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # a part of the key under which Triton remembers what it has compiled
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_job(arch: int, job: Job) -> list[Cost]:
    """The cost of each kernel that `job` launches, compiled for sm_`arch` from scratch."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_NoGpu(arch))
    triton.knobs.nvidia.dump_ptxas_log = True
    costs: list[Cost] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *arguments, grid=grid, warmup=True, **keywords)
        text = log.getvalue()
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", text)]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
        tensor_cores = kernel.asm["ptx"].count(TENSOR_CORES[arch])
        costs.append(Cost(arch, job, max(registers, default=0), sum(spills), kernel.metadata.shared, tensor_cores))
        return kernel

    with tempfile.TemporaryDirectory() as cache:
        # empty, so that ptxas runs and speaks
        triton.knobs.cache.dir = cache
        JITFunction.run = compile_only
        try:
            _launch(job)
        finally:
            JITFunction.run = run
    return costs


def compile_all(archs: list[int], types: list[str], keeps: list[str], processes: int) -> Iterator[Cost]:
    """Costs of every job on every architecture, as they come."""
    tasks = [(arch, job) for job in jobs(types, keeps) for arch in archs]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for costs in pool.map(compile_job, *zip(*tasks, strict=True), chunksize=4):
            yield from costs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--types", nargs="+", default=["bf16", "tf32", "fp32"], choices=sorted(TYPES))
    parser.add_argument("--keep", nargs="+", default=["exact", "int8", "none"], choices=["exact", "int8", "none"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    rows, is_fine = [], True
    print(f"{'kernel':<17} {'layer':<9} {'type':<5} {'z':<6} {'tiles':<22} arch  regs spill  shared tensor-core")
    for cost in compile_all(options.arch, options.types, options.keep, options.jobs):
        job, faults = cost.job, cost.faults
        tiles = "x".join(map(str, job.config[:4])) + f" w{job.config.warps} s{job.config.stages}"
        print(
            f"{job.kernel:<17} {job.layer:<9} {job.type:<5} {job.keep:<6} {tiles:<22} {cost.arch:>4} {cost.registers:>5}"
            f" {cost.spilled_bytes:>5} {cost.shared_bytes:>7} {cost.tensor_core_instructions:>6}"
            + (f"  FAULT: {', '.join(faults)}" if faults else ""),
            flush=True,
        )
        is_fine &= not faults
        rows.append({**cost._asdict(), "job": job._asdict(), "faults": faults})
    if options.json is not None:
        import triton

        temporary = options.json.with_suffix(".part")
        temporary.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1), encoding="utf-8")
        os.replace(temporary, options.json)
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
