"""The one entry for a machine with a GPU, under nine minutes: versions, correctness of every kernel against float64, then layer
by layer, whole steps, peak memory and the prior; JSON after every row, so that nothing is lost when time runs out.

python bench/device_suite.py [--out DIR] [--parts prior checks layers steps] [--rehearse]

--rehearse runs every part on the CPU with tiny sizes through Triton's interpreter: it shows that the suite runs, and times
nothing. Exit status 1 where something is not equal to its reference, 3 without a CUDA device."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# it runs from a source tree, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# fresh caches: nothing compiled or chosen by another version is used; workers inherit them
for _name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "SVF_FAST_CACHE_DIR"):
    if _name not in os.environ:
        os.environ[_name] = tempfile.mkdtemp(prefix="device_suite_")

import torch

import svf_fast
from svf_fast import backends
from svf_fast.bench import clock as clocks
from svf_fast.bench import device_checks, device_layers, device_steps, prior, results
from svf_fast.bench.equality import Case
from svf_fast.bench.layers import LAYERS, LayerShape
from svf_fast.bench.subjects import build_backbone_with_statistics
from svf_fast.env import report
from svf_fast.train.backbones import BackboneConfig

PARTS = ("prior", "checks", "layers", "steps")
# After which no further row is started, so that the run ends within ten minutes.
DEADLINE_S = 520
# No compilation or check takes that long: a kernel hangs.
TASK_LIMIT_S = 150
# (picture, batch): the paper's Pascal-5i and COCO-20i settings
SETTINGS = ((641, 2), (473, 8))
# with TF32 or without
DTYPES = ((torch.bfloat16, False), (torch.float32, True))


class Suite:
    """The parts of one run, what they found, and whether all of it was right."""

    def __init__(self, clock: clocks.Clock, out: Path | None) -> None:
        self.clock, self.out = clock, out
        self.is_rehearsal = clock.device == "cpu"
        self.rounds = 1 if self.is_rehearsal else 3
        # stock operations on a CPU know no TF32 to compare with
        self.dtypes = DTYPES[:1] if self.is_rehearsal else DTYPES
        self.start = time.monotonic()
        self.found: dict[str, Any] = {}
        self.is_right = True

    def keep(self, part: str, rows: Any) -> None:
        """Adds what a part found, and writes all there is."""
        self.found[part] = rows
        self.found["choices"] = _choices()
        settings = {"rehearsal": self.is_rehearsal, "seconds": round(time.monotonic() - self.start)}
        name = "device_suite_rehearsal" if self.is_rehearsal else "device_suite"
        results.write(self.out, name, settings, [self.found])

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def in_parallel(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Results in order, or what went wrong as a row. On a GPU in processes of their own, since what takes the time is Triton
        compiling, and since a kernel that fails may take its process with it."""
        if self.is_rehearsal:
            for task in tasks:
                yield function(*task)
            return
        pool = ProcessPoolExecutor(
            min(12, os.cpu_count() or 1), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        futures = [pool.submit(function, *task) for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            try:
                yield future.result(timeout=TASK_LIMIT_S)
            except Exception as error:
                yield {"is_within": False, "where": f"{task}: {error!r}"}
        # one that hangs is left behind: it ends with this process
        pool.shutdown(wait=False, cancel_futures=True)

    def checks(self) -> None:
        """Every kernel against float64, and how it gets on with the rest of PyTorch."""
        tasks, cases = device_checks.TASKS, device_checks.CASES
        if self.is_rehearsal:
            tasks, cases = tasks[::5], (Case(1, 40, 32, 1, 1, 0, 1, 1, 5, 5),)
        device = self.clock.device
        rows: list[dict[str, Any]] = []
        for row in self.in_parallel(device_checks.check_way, [(device, task, cases) for task in tasks]):
            if row is None:
                continue
            rows.append(row)
            self.is_right &= row["is_within"]
            if "largest" not in row:
                self.say(f"WRONG: {row['where']}")
                continue
            largest = {n: max(errors[n] for errors in row["largest"].values()) for n in ("y", "dx", "ds", "dresidual")}
            self.say(
                f"{row['kernels']:<6} {row['path']:<9} {row['offer']} {row['dtype']:<15} {'tf32' if row['tf32'] else '':<4} "
                + " ".join(f"{n} {error:.1e}" for n, error in largest.items())
                + ("" if row["is_within"] else f"  WRONG: {row['where']}")
            )
            self.keep("checks", {"layers": rows})
        others = device_checks.check_interplay(device)
        self.keep("checks", {"layers": rows, "others": others})
        for row in others:
            self.say(f"{row['what']:<15} differs by {row['difference']:.1e}{'' if row['is_within'] else '  WRONG'}")
            self.is_right &= row["is_within"]

    def layers(self) -> None:
        """The 42 convolutions, each against Algorithm 1 in eager mode."""
        rates = clocks.ceilings(self.clock)
        self.say("ceilings: " + ", ".join(f"{name} {rate / 1e12:.2f} T" for name, rate in rates.items()))
        rows = []
        shapes: tuple[LayerShape, ...] = LAYERS
        settings: tuple[tuple[int, int], ...] = SETTINGS
        if self.is_rehearsal:
            shapes, settings = (
                tuple(s._replace(inputs=s.inputs // 16, outputs=s.outputs // 16) for s in LAYERS[:3]),
                ((33, 1),),
            )
        else:
            tasks = [(shape, dtype, tf32, "cuda") for dtype, tf32 in self.dtypes for shape in LAYERS]
            for failure in self.in_parallel(device_layers.compile_ways, tasks):
                if failure is not None:
                    self.say(f"not compiled: {failure['where']}")
            self.say("kernels compiled")
        for (picture, batch), (dtype, tf32) in ((s, d) for s in settings for d in self.dtypes):
            clocks.set_tf32(tf32)
            for shape in shapes:
                if self.is_late():
                    return
                row = self.row(
                    device_layers.time_layer, shape, batch, picture, dtype, self.clock, rates, self.rounds
                )  # fmt: skip
                rows.append(row)
                self.keep("layers", {"rates": rates, "rows": rows})
                if row["is_equal"]:
                    us = row["us"]
                    self.say(
                        f"{picture} b{batch} {str(dtype)[6:]:<8} {shape.name:<14} ×{shape.times} naive {us['naive']:7.0f} us "
                        f"ours {us['ours']:7.0f} ({row['speedup']:.2f}×)  graphed {us['naive graphed']:7.0f} "
                        f"{us['ours graphed']:7.0f} ({row['speedup_graphed']:.2f}×)  {row['ratio_to_floor']:.2f} of the floor"
                    )
                else:
                    self.say(f"{shape.name}: WRONG, not timed: {row.get('errors', row.get('failure'))}")

    def steps(self) -> None:
        """Layers 2-4 as one step."""
        config = BackboneConfig(width=4, blocks=(1, 1, 1, 1)) if self.is_rehearsal else BackboneConfig()
        torch.set_num_threads(os.cpu_count() or 1)
        trunks = device_steps.build_trunks(build_backbone_with_statistics(config, 0))
        self.say("trunks converted")
        rows = []
        settings: tuple[tuple[int, int], ...] = ((1, 5),) if self.is_rehearsal else ((2, 161), (8, 119))
        for (batch, side), (dtype, tf32) in ((s, d) for s in settings for d in self.dtypes):
            clocks.set_tf32(tf32)
            if self.is_late():
                return
            row = self.row(
                device_steps.time_steps, trunks, batch, side, 4 * config.width, dtype, self.clock, self.rounds, False
            )
            rows.append(row)
            self.keep("steps", rows)
            self.say_step(row)
        # last, in one dtype: compiling the trunk takes a minute or more
        if not self.is_rehearsal and not self.is_late(120):
            clocks.set_tf32(False)
            rows.append(
                self.row(device_steps.time_steps, trunks, 2, 161, 256, torch.bfloat16, self.clock, self.rounds, True)
            )
            self.keep("steps", rows)
            self.say_step(rows[-1])

    def say_step(self, row: dict[str, Any]) -> None:
        """A step's row in three lines."""
        if not row["is_equal"]:
            self.say(f"step WRONG, not timed: {row.get('errors', row.get('failure'))}")
            return
        self.say(
            f"step b{row['batch']} {row['side']}² {row['dtype']}: "
            + ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["ms"].items())
        )
        self.say("  peak MiB: " + ", ".join(f"{name} {b / 2**20:.0f}" for name, b in row["peak_bytes"].items()))
        self.say("  " + ", ".join(f"{name} {value:.2f}" for name, value in row["ratios"].items()))

    def is_late(self, spare_s: float = 0.0) -> bool:
        """Whether no further row should start."""
        is_late = not self.is_rehearsal and time.monotonic() - self.start > DEADLINE_S - spare_s
        if is_late:
            self.say("the deadline is near: the rest of this part is left out")
        return is_late

    def row(self, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """What `function` returns, or its failure as a row; the ways in use stand in the JSON beside it."""
        try:
            row = function(*arguments)
        except Exception:
            row = {"is_equal": False, "failure": traceback.format_exc()}
        self.is_right &= row["is_equal"]
        return row

    def prior(self) -> None:
        """The max-cosine prior at the paper's size."""
        channels, side = (16, 9) if self.is_rehearsal else (2048, 81)
        rows = []
        for dtype, tf32 in (*self.dtypes, (torch.float32, False)):
            clocks.set_tf32(tf32)
            row = self.row(prior.time_prior, channels, side, dtype, self.clock, self.rounds)
            row["tf32"] = tf32
            row["checks"] = device_checks.check_prior(self.clock.device, channels, side, dtype)
            self.is_right &= all(check["is_within"] for check in row["checks"])
            rows.append(row)
            self.say(
                f"prior {dtype}{' tf32' if tf32 else ''}: { ({n: row.get(n) for n in ('error', 'kept_bytes', 'ms', 'peak_bytes')}) }"
            )
        self.keep("prior", rows)


def _choices() -> dict[str, str]:
    """Which way the dispatcher took for each shape so far, as it is remembered on disk."""
    folder = Path(os.environ["SVF_FAST_CACHE_DIR"])
    return {k: v for f in folder.glob("choices-*.json") for k, v in json.loads(f.read_text("utf-8"))["choices"].items()}


def _use_the_interpreter() -> None:
    """Makes the Triton backend run on the CPU, its first offers taken: nothing is measured there."""
    from svf_fast.kernels import interpreter

    if not interpreter.load():
        raise SystemExit("--rehearse needs Triton, and nothing may have imported it before")
    from svf_fast.backends.by_ways import WaysBackend
    from svf_fast.backends.ways import first_offer
    from svf_fast.kernels.backend import TRITON

    backend = WaysBackend(TRITON, first_offer)
    backends.register("triton", lambda device: backend, lambda device: None)
    svf_fast.backend("triton")


def main() -> int:
    parser = results.arguments(__doc__ or "")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--rehearse", action="store_true", help="run everything tiny on the CPU through Triton's interpreter"
    )
    options = parser.parse_args()
    print(report())
    if options.rehearse:
        _use_the_interpreter()
    elif not torch.cuda.is_available():
        print("no CUDA device: from here on the suite needs one (--rehearse runs it tiny on the CPU)", file=sys.stderr)
        return 3
    suite = Suite(clocks.RehearsalClock() if options.rehearse else clocks.CudaClock(), options.out)
    for part in options.parts:
        suite.say(f"— {part}")
        try:
            getattr(suite, part)()
        except Exception:
            suite.is_right = False
            suite.say(traceback.format_exc())
            suite.keep(f"{part} failed", traceback.format_exc())
    suite.say("all equal to their references" if suite.is_right else "NOT all equal to their references")
    sys.stdout.flush()
    # not waiting for a worker that hangs
    os._exit(0 if suite.is_right else 1)


if __name__ == "__main__":
    sys.exit(main())
