"""Bytes that a whole training episode of the baseline keeps for backward, counted on the meta device (nothing is allocated
or computed), and the same count checked against real runs at a smaller size. On the meta device nobody knows which support
positions win in the prior: all of them are counted as kept.

python -m svf_fast.bench.episode [--size 641] [--shots 5] [--check-size 161] [--out DIR]"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_fast import reference
from svf_fast.bench import results
from svf_fast.memory import kept_bytes
from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods.baseline import Baseline
from svf_fast.train.tuning import build_strategy

GB = 10**9


class Setting(NamedTuple):
    label: str
    strategy: str
    save: str = "exact"
    recompute: str = "none"
    cosine: str = "streaming"


SETTINGS = {
    "released": Setting("released form: Algorithm 1, matrix prior", "algorithm 1", cosine="matrix"),
    "frozen": Setting("frozen backbone", "freeze"),
    "exact": Setting("svf_fast exact", "svf"),
    "int8": Setting("svf_fast int8", "svf", save="int8"),
    "blocks": Setting("svf_fast, blocks rebuilt", "svf", save="recompute"),
    "supports": Setting("svf_fast, blocks and supports rebuilt", "svf", save="recompute", recompute="supports"),
    "stages": Setting("svf_fast, supports and query stages rebuilt", "svf", save="recompute", recompute="stages"),
}


def build_method(setting: Setting, device: str) -> Baseline:
    """ResNet-50 baseline in training mode on `device`, prepared as `setting` says."""
    method = Baseline(build_backbone(BackboneConfig()), recompute=setting.recompute, cosine=setting.cosine).to(device)
    if setting.strategy == "algorithm 1":
        build_strategy("freeze").apply(method)
        reference.convert_naive(method, ("layer2", "layer3", "layer4"))
    else:
        options = {"save": setting.save} if setting.strategy == "svf" else {}
        build_strategy(setting.strategy, **options).apply(method)
    return method.train()


def episode(size: int, shots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, supports, support labels and query label of one episode: random pictures, the object in a third of them."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(1, shots, size, size, dtype=torch.int64)
    label[:, :, size // 4 : 3 * size // 4, size // 4 : 11 * size // 12] = 1
    query, supports = (torch.randn(1, n, 3, size, size, generator=generator) for n in (1, shots))
    return query[:, 0], supports, label, label[:, 0]


def kept(setting: Setting, device: str, size: int, shots: int) -> int:
    """Bytes kept by one forward and loss on `device`."""
    method = build_method(setting, device)
    pictures = [t.to(device) for t in episode(size, shots)]
    query, supports, labels, query_label = pictures
    owned = [*method.parameters(), *method.buffers(), *pictures]
    return kept_bytes(lambda: method.loss(method(query, supports, labels), query_label), owned=owned)


def main() -> None:
    parser = results.arguments(__doc__ or "")
    parser.add_argument("--size", type=int, default=641)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument(
        "--check-size", type=int, default=161, help="side at which real runs check the count; 0 for none"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    print(
        f"baseline, ResNet-50, {options.shots} shots, {options.size}×{options.size}, one episode, training mode, float32\n"
    )
    check = options.check_size
    print(f"{'setting':<46} {'kept GB':>8} {'fewer':>6}   at {check}: counted, real run (MB)")
    for name, setting in SETTINGS.items():
        row: dict[str, Any] = {"setting": name, "kept_bytes": kept(setting, "meta", options.size, options.shots)}
        rows.append(row)
        line = f"{setting.label:<46} {row['kept_bytes'] / GB:>8.3f} {rows[0]['kept_bytes'] / row['kept_bytes']:>5.1f}×"
        if check:
            row["check_counted_bytes"] = kept(setting, "meta", check, options.shots)
            row["check_real_bytes"] = kept(setting, "cpu", check, options.shots)
            line += f"   {row['check_counted_bytes'] / 1e6:>10.1f} {row['check_real_bytes'] / 1e6:>10.1f}"
        print(line, flush=True)
    settings = {"size": options.size, "shots": options.shots, "check_size": check, "method": "baseline"}
    results.write(options.out, f"episode_baseline_resnet50_{options.size}_{options.shots}shot", settings, rows)


if __name__ == "__main__":
    main()
