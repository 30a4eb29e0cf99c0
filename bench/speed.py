"""Time of layers 2-4 of ResNet-50, forward + backward, against Algorithm 1, and of the merged evaluation forward against the
original network; interleaved in one run, so that ratios hold on a noisy machine. Maps and ds are compared with float64 first.

python -m svf_fast.bench.speed [--size 321] [--rounds 9] [--channels-last] [--out DIR]"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from svf_fast.bench import results
from svf_fast.bench.subjects import FORMS, STAGES, Trunk, build_backbone_with_statistics, build_trunk
from svf_fast.train.backbones import BackboneConfig

TRAINED = ("algorithm 1", "exact", "int8", "recompute", "convolutions", "frozen")
# beside twice Algorithm 1's own error; int8 z has an error of its own, in ds only
ALLOWANCE = {"exact": 1e-6, "recompute": 1e-6, "int8": 1e-2}


def interleaved_seconds(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round; every round runs all of them, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def step(trunk: nn.Module, features: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """Forward, and backward where anything trains: the maps, then the gradients of the trainable parameters."""
    parameters = [p for p in trunk.parameters() if p.requires_grad]
    if not parameters:
        with torch.no_grad():
            return list(trunk(features))
    maps = trunk(features)
    return [*(m.detach() for m in maps), *torch.autograd.grad(maps, parameters, gradients)]


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative error ‖found − exact‖ / ‖exact‖ over the maps and the singular values' gradients of all layers."""
    return max(
        float((a.flatten() - b.flatten()).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
    )  # fmt: skip


def require_equal(errors: dict[str, float]) -> None:
    """Refuses to go on where a form is further from float64 than Algorithm 1's own rounding explains.

    Through 16 blocks float32 rounding flips ReLU masks near zero, for Algorithm 1 as for ours: the measure scales itself.
    """
    for name, allowance in ALLOWANCE.items():
        limit = 2 * errors["algorithm 1"] + allowance
        if errors[name] > limit:
            raise SystemExit(
                f"{name} is {errors[name]:.1e} from float64, allowed {limit:.1e}: no time is reported for a wrong result"
            )


def main() -> None:
    parser = results.arguments(__doc__ or "")
    parser.add_argument("--size", type=int, default=321)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format

    backbone = build_backbone_with_statistics(BackboneConfig(), options.seed).to(memory_format=layout)
    picture = torch.randn(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(options.seed))
    with torch.no_grad():
        features = backbone.stage("layer1")(backbone.stage("layer0")(picture.contiguous(memory_format=layout)))
    plain = Trunk(backbone).eval()
    trunks = {name: build_trunk(name, backbone) for name in TRAINED}
    with torch.no_grad():
        expected_maps = plain(features)
        generator = torch.Generator().manual_seed(1)
        gradients = [torch.randn(y.shape, generator=generator).contiguous(memory_format=layout) for y in expected_maps]
    precise = copy.deepcopy(trunks["algorithm 1"]).double()
    exact = step(precise, features.double(), [g.double() for g in gradients])
    del precise
    errors = {
        n: largest_error(step(trunks[n], features, gradients), exact) for n in ("algorithm 1", *ALLOWANCE)
    }  # fmt: skip
    require_equal(errors)
    with torch.no_grad():
        merged_error = max(
            float((a - b).norm() / b.norm()) for a, b in zip(trunks["exact"](features), expected_maps, strict=True)
        )  # fmt: skip
    if merged_error > 1e-4:
        raise SystemExit(f"the merged forward differs from the original network by {merged_error:.1e}")

    steps = {name: partial(step, trunk, features, gradients) for name, trunk in trunks.items()}
    training = interleaved_seconds(steps, options.rounds)
    evaluation = interleaved_seconds(
        {
            name: partial(step, trunk.requires_grad_(False), features, [])
            for name, trunk in (
                ("original", plain),
                ("merged", trunks["exact"]),
                ("algorithm 1", trunks["algorithm 1"]),
            )
        },
        options.rounds,
    )
    print(
        f"ResNet-50 {', '.join(STAGES)} at {options.size}, batch 1, float32, {options.threads} threads, "
        f"{'channels_last' if options.channels_last else 'contiguous'}; median of {options.rounds} interleaved rounds\n"
    )
    rows = []
    for title, seconds, peer in (
        ("forward + backward", training, "algorithm 1"),
        ("evaluation forward", evaluation, "original"),
    ):
        print(f"{title:<50} {'ms':>8} {'spread':>13} {'ratio to ' + peer:>22} {'of fastest':>11}  error to float64")
        for name, values in seconds.items():
            ratio = statistics.median(v / p for v, p in zip(values, seconds[peer], strict=True))
            # what else the machine does only ever adds time: the fastest rounds are the least disturbed
            fastest_ratio = min(values) / min(seconds[peer])
            ms = 1e3 * statistics.median(values)
            error = errors.get(name) if title.startswith("forward") else (merged_error if name == "merged" else None)
            label = FORMS[name].label if name in FORMS else name
            spread = f"{1e3 * min(values):.0f}–{1e3 * max(values):.0f}"
            print(
                f"{label:<50} {ms:>8.0f} {spread:>13} {ratio:>22.3f} {fastest_ratio:>11.3f}"
                f"  {'' if error is None else f'{error:.1e}'}"
            )
            row = {"what": title, "form": name, "ms": ms, "ratio": ratio, "fastest_ratio": fastest_ratio}
            rows.append({**row, "seconds": values, "error": error})
        print()
    settings = {"size": options.size, "rounds": options.rounds, "threads": options.threads, "layout": str(layout)}
    name = f"speed_resnet50_{options.size}_{options.threads}threads{'_channels_last' if options.channels_last else ''}"
    results.write(options.out, name, settings, rows)


if __name__ == "__main__":
    main()
