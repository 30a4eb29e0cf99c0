"""The layers of ResNet-50's stages 2-4 on a CPU against their floor, the bare convolutions V, U and both data gradients as library
calls: the whole trunk against Algorithm 1 (eager and compiled), every layer, what each trick gives, and the bits of ds.

python -m svf_fast.bench.floor [--size 321] [--threads 1 2] [--rounds 9] [--out DIR]"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import svf_fast
from svf_fast import functional, reference
from svf_fast.backends import native, packed
from svf_fast.bench import results
from svf_fast.bench.layers import LAYERS, LayerShape
from svf_fast.bench.speed import interleaved_seconds, largest_error, step
from svf_fast.bench.subjects import STAGES, Trunk, build_backbone_with_statistics, build_trunk
from svf_fast.train.backbones import BackboneConfig

FLOOR, NAIVE, COMPILED, STOCK, OURS = "floor", "algorithm 1", "algorithm 1, compiled", "stock operations", "ours"
CHANNELS_LAST = torch.channels_last


class Measured(NamedTuple):
    """Seconds of each form in interleaved rounds."""

    seconds: dict[str, list[float]]

    def ratio(self, form: str, peer: str) -> float:
        """Median of the rounds' ratios."""
        pairs = zip(self.seconds[form], self.seconds[peer], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def ms(self, form: str) -> float:
        """Median in milliseconds."""
        return 1e3 * statistics.median(self.seconds[form])


class Layer:
    """One converted convolution with what surrounds it, in each form: forward, then the gradients of x, s and the residual."""

    def __init__(self, shape: LayerShape, picture: int, generator: torch.Generator) -> None:
        def normal(*size: int) -> Tensor:
            t = torch.randn(*size, generator=generator)
            return t.contiguous(memory_format=CHANNELS_LAST) if len(size) == 4 else t

        self.shape = shape
        before, after = shape.sides(picture)
        conv = nn.Conv2d(
            shape.inputs, shape.outputs, shape.taps, shape.stride, shape.geometry.padding, shape.dilation, bias=False
        )
        nn.init.normal_(conv.weight, 0, (shape.inputs * shape.taps**2) ** -0.5, generator=generator)
        self.naive: reference.NaiveSVFConv2d = reference.NaiveSVFConv2d(conv).to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(shape.outputs).eval().requires_grad_(False)
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        variance.uniform_(0.5, 2, generator=generator)
        mean.uniform_(-1, 1, generator=generator)
        self.scale = self.norm.weight / (variance + self.norm.eps).sqrt()
        self.shift = self.norm.bias - mean * self.scale
        self.s = self.naive.vector_S.detach().flatten().requires_grad_()
        self.v = self.naive.conv_V.weight
        self.u = nn.Parameter(self.naive.conv_U.weight.flatten(1), requires_grad=False)
        self.x = normal(1, shape.inputs, before, before).requires_grad_()
        dy = normal(1, shape.outputs, after, after)
        self.residual = normal(1, shape.outputs, after, after).requires_grad_() if shape.has_residual else None
        with torch.no_grad():
            y = self.plain(self.s)
            # none where rounding decides whether a ReLU is open: the forms are compared, not the flips
            self.dy = dy * (y.abs() > 1e-4 * y.abs().max()) if shape.has_relu else dy
        self.z, self.dz = normal(1, shape.rank, after, after), normal(1, shape.rank, after, after)

    def floor(self) -> None:
        """V, U, and the two data gradients."""
        shape, u = self.shape, self.naive.conv_U.weight
        gradient = torch.ops.aten.convolution_backward
        plain: tuple[Any, ...] = ((1, 1), (0, 0), (1, 1))
        of_v = (shape.geometry.stride, shape.geometry.padding, shape.geometry.dilation)
        only_x = (False, (0, 0), 1, (True, False, False))
        with torch.no_grad():
            F.conv2d(self.x, self.v, None, *of_v)
            F.conv2d(self.z, u)
            gradient(self.dy, self.z, u, None, *plain, *only_x)
            gradient(self.dz, self.x, self.v, None, *of_v, *only_x)

    def plain(self, s: Tensor) -> Tensor:
        """Algorithm 1, the frozen BatchNorm, the residual and the ReLU as modules run them."""
        z = self.naive.conv_V(self.x)
        y = self.norm(self.naive.conv_U(z.mul(s.view(1, -1, 1, 1))))
        if self.residual is not None:
            y += self.residual
        return y.relu_() if self.shape.has_relu else y

    def ours(self, s: Tensor) -> Tensor:
        """The same as one op."""
        geometry = self.shape.geometry._asdict()
        return functional.svf_conv2d(
            self.x, self.v, s, self.u, scale=self.scale, shift=self.shift, residual=self.residual,
            activation="relu" if self.shape.has_relu else None, **geometry,
        )  # fmt: skip

    def step(self, form: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """y and the gradients."""
        y = form(self.s)
        inputs = [t for t in (self.x, self.s, self.residual) if t is not None]
        return [y.detach(), *torch.autograd.grad(y, inputs, self.dy)]


@contextlib.contextmanager
def without(trick: str) -> Iterator[None]:
    """The compiled kernels with one trick left out."""
    if trick == "Winograd":
        with mock.patch.object(packed, "_WINOGRAD_CHANNELS", math.inf):
            yield
    elif trick == "packing once":
        with mock.patch.object(packed.DerivedTensors, "get", lambda self, purpose, source, scale, derive: derive()):
            yield
    else:
        with svf_fast.backend("torch"):
            yield


def measure_layers(size: int, rounds: int) -> list[dict[str, Any]]:
    """Every distinct layer: time of ours and of Algorithm 1 over the floor, after both were compared."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    print(f"\n{'layer':<16} {'times':>5} {'floor ms':>9} {'algorithm 1':>12} {'ours':>6} {'ours / algorithm 1':>19}")
    for shape in LAYERS:
        layer = Layer(shape, size, generator)
        error = largest_error(layer.step(layer.ours), [t.double() for t in layer.step(layer.plain)])
        if error > 1e-5:
            raise SystemExit(
                f"{shape.name}: ours differs from Algorithm 1 by {error:.1e}: no time is reported for a wrong result"
            )
        forms = {FLOOR: layer.floor, NAIVE: partial(layer.step, layer.plain), OURS: partial(layer.step, layer.ours)}
        found = Measured(interleaved_seconds(forms, rounds))
        row = {
            "layer": shape.name, "times": shape.times, "error": error, "floor_ms": found.ms(FLOOR),
            "algorithm_1_to_floor": found.ratio(NAIVE, FLOOR), "ours_to_floor": found.ratio(OURS, FLOOR),
            "ours_to_algorithm_1": found.ratio(OURS, NAIVE),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{shape.name:<16} {shape.times:>5} {row['floor_ms']:>9.2f} {row['algorithm_1_to_floor']:>12.3f} "
            f"{row['ours_to_floor']:>6.3f} {row['ours_to_algorithm_1']:>19.3f}"
        )
    return rows


def measure_trunk(size: int, rounds: int, is_compiled: bool) -> list[dict[str, Any]]:
    """The trunk in training and in evaluation, and with one trick less at a time."""
    backbone = build_backbone_with_statistics(BackboneConfig(), 0).to(memory_format=CHANNELS_LAST)
    picture = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone.stage("layer1")(backbone.stage("layer0")(picture.contiguous(memory_format=CHANNELS_LAST)))
        features = features.requires_grad_()
    original = Trunk(backbone).eval()
    naive, ours = build_trunk(NAIVE, backbone), build_trunk("exact", backbone)
    with torch.no_grad():
        maps = original(features)
        gradients = [torch.randn_like(y) for y in maps]
    generator = torch.Generator().manual_seed(0)
    layers = [layer for shape in LAYERS for layer in [Layer(shape, size, generator)] * shape.times]

    exact = step(copy.deepcopy(naive).double(), features.double(), [g.double() for g in gradients])
    errors = {
        NAIVE: largest_error(step(naive, features, gradients), exact),
        OURS: largest_error(step(ours, features, gradients), exact),
    }
    if errors[OURS] > 2 * errors[NAIVE] + 1e-6:
        raise SystemExit(
            f"ours is {errors[OURS]:.1e} from float64, Algorithm 1 {errors[NAIVE]:.1e}: no time is reported for a wrong result"
        )
    forms: dict[str, Callable[[], object]] = {
        FLOOR: partial(_all_floors, layers),
        NAIVE: partial(step, naive, features, gradients),
        OURS: partial(step, ours, features, gradients),
    }
    for trick in ("Winograd", "packing once", "compiled kernels"):
        forms[f"ours without {trick}"] = partial(_step_without, trick, ours, features, gradients)
    if is_compiled:
        forms[COMPILED] = partial(step, torch.compile(naive), features, gradients)
    training = Measured(interleaved_seconds(forms, rounds))
    evaluation = Measured(
        interleaved_seconds(
            {
                NAIVE: partial(step, naive.requires_grad_(False), features.detach(), []),
                "original": partial(step, original.requires_grad_(False), features.detach(), []),
                OURS: partial(step, ours.requires_grad_(False), features.detach(), []),
            },
            rounds,
        )
    )
    rows = []
    for title, found, peer in (("forward + backward", training, FLOOR), ("evaluation forward", evaluation, NAIVE)):
        print(f"\n{title:<34} {'ms':>8} {'ratio to ' + peer:>22} {'ratio to ' + NAIVE:>22}")
        for form in found.seconds:
            row = {"what": title, "form": form, "ms": found.ms(form), "to": peer, "ratio": found.ratio(form, peer)}
            rows.append(
                {
                    **row,
                    "to_algorithm_1": found.ratio(form, NAIVE),
                    "seconds": found.seconds[form],
                    "error": errors.get(form),
                }
            )
            print(f"{form:<34} {row['ms']:>8.1f} {row['ratio']:>22.3f} {rows[-1]['to_algorithm_1']:>22.3f}")
    return rows


def _all_floors(layers: list[Layer]) -> None:
    for layer in layers:
        layer.floor()


def _step_without(trick: str, trunk: nn.Module, features: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    with without(trick):
        return step(trunk, features, gradients)


def require_the_same_bits(size: int) -> None:
    """Refuses to go on unless y and every gradient of every layer have the same bits on one thread and on two."""
    generator = torch.Generator().manual_seed(0)
    for shape in LAYERS:
        layer = Layer(shape, size, generator)
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(layer.step(layer.ours))
        if not all(torch.equal(one, two) for one, two in zip(*found, strict=True)):
            raise SystemExit(f"{shape.name} has other bits on two threads than on one")
    print("y, dx, ds and the residual's gradient of every layer: the same bits on one thread and on two")


def main() -> None:
    parser = results.arguments(__doc__ or "")
    parser.set_defaults(threads=[1, 2])
    for action in parser._actions:
        if action.dest == "threads":
            action.nargs = "+"
    parser.add_argument("--size", type=int, default=321)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--instruction-set",
        help="ours in an older one; the library calls follow ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS and ATEN_CPU_CAPABILITY",
    )
    parser.add_argument(
        "--compile", action="store_true", help="also Algorithm 1 under torch.compile (minutes to compile)"
    )
    options = parser.parse_args()
    reason = native.why_unusable("cpu")
    if reason is not None:
        raise SystemExit(f"there is nothing to measure: {reason}")
    if options.instruction_set:
        torch.ops.svf_fast_cpp.use_instruction_set(options.instruction_set)
    require_the_same_bits(options.size)
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(
            f"\nResNet-50 {', '.join(STAGES)} at {options.size}, batch 1, float32, channels_last, {threads} threads, "
            f"{torch.ops.svf_fast_cpp.instruction_set()}; median of {options.rounds} interleaved rounds"
        )
        rows = measure_trunk(options.size, options.rounds, options.compile) + measure_layers(
            options.size, options.rounds
        )
        settings = {
            "size": options.size, "rounds": options.rounds, "threads": threads, "layout": "channels_last",
            "instruction_set": torch.ops.svf_fast_cpp.instruction_set(),
        }  # fmt: skip
        results.write(
            options.out,
            f"floor_resnet50_{options.size}_{threads}threads{f'_{options.instruction_set}' if options.instruction_set else ''}",
            settings,
            rows,
        )


if __name__ == "__main__":
    main()
