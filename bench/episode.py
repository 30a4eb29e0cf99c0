"""Bytes that one training episode keeps for backward, for each method, backbone and number of shots: the released form, a frozen
backbone, and ours. Counted on the meta device (nothing is allocated or computed), and the count checked against real runs at a
smaller size. On the meta device nobody knows which support positions win in the prior: all of them are counted as kept.

python -m svf_fast.bench.episode [--methods baseline pfenet bam] [--backbones resnet50 vgg16] [--shots 1 5] [--size 641]
                                 [--check-size 0] [--out DIR]"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svf_fast import reference
from svf_fast.bench import results
from svf_fast.memory import kept_bytes
from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods import METHODS, MetaLearner, build_method
from svf_fast.train.tuning import TUNED_STAGES, build_strategy

GB = 10**9
BASE_CLASSES = 60
BACKBONES = {"resnet50": BackboneConfig(), "vgg16": BackboneConfig(architecture="vgg16")}


class Setting(NamedTuple):
    label: str
    strategy: str
    save: str = "exact"
    recompute: str = "none"
    cosine: str = "streaming"


SETTINGS = {
    # with this project's heads, which keep less than the published ones
    "released": Setting("released form: Algorithm 1, matrix prior", "algorithm 1", cosine="matrix"),
    "frozen": Setting("frozen backbone", "freeze"),
    "exact": Setting("ours, exact", "svf"),
    "int8": Setting("ours, int8", "svf", save="int8"),
    "blocks": Setting("ours, exact, blocks rebuilt", "svf", save="recompute"),
    "supports": Setting("ours, exact, blocks and supports rebuilt", "svf", save="recompute", recompute="supports"),
    "stages": Setting("ours, exact, leanest: query stages rebuilt too", "svf", save="recompute", recompute="stages"),
}


class Case(NamedTuple):
    method: str
    backbone: str
    shots: int


class Episode(NamedTuple):
    """A training batch of one episode."""

    query_images: Tensor
    query_labels: Tensor
    support_images: Tensor
    support_labels: Tensor
    base_labels: Tensor
    categories: Tensor


def prepared_method(case: Case, setting: Setting, device: str) -> MetaLearner:
    """The method in training mode on `device`, tuned as `setting` says."""
    options: dict[str, Any] = {"recompute": setting.recompute, "cosine": setting.cosine}
    if case.method == "bam":
        options |= {"base_classes": BASE_CLASSES, "shots": case.shots}
    method = build_method(case.method, build_backbone(BACKBONES[case.backbone]), **options).to(device)
    if setting.strategy == "algorithm 1":
        method.prepare_tuning(TUNED_STAGES)
        build_strategy("freeze").apply(method)
        reference.convert_naive(method, TUNED_STAGES)
    else:
        save = {"save": setting.save} if setting.strategy == "svf" else {}
        build_strategy(setting.strategy, **save).apply(method)
    return method.train()


def random_episode(size: int, shots: int, device: str) -> Episode:
    """Random pictures, the object in a third of them."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(1, shots, size, size, dtype=torch.int64)
    label[:, :, size // 4 : 3 * size // 4, size // 4 : 11 * size // 12] = 1
    query, supports = (torch.randn(1, n, 3, size, size, generator=generator) for n in (1, shots))
    category = torch.zeros(1, dtype=torch.int64)
    tensors = query[:, 0], label[:, 0], supports, label, label[:, 0], category
    return Episode(*(t.to(device) for t in tensors))


def kept(case: Case, setting: Setting, device: str, size: int) -> int:
    """Bytes kept by one forward and loss on `device`."""
    method = prepared_method(case, setting, device)
    batch = random_episode(size, case.shots, device)
    owned = [*method.parameters(), *method.buffers(), *batch]
    return kept_bytes(lambda: method.losses(batch).total, owned=owned)


def main() -> None:
    parser = results.arguments(__doc__ or "")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--size", type=int, default=641)
    parser.add_argument("--check-size", type=int, default=0, help="side at which real runs check the count; 0 for none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    check = options.check_size
    for case in itertools.starmap(Case, itertools.product(options.methods, options.backbones, options.shots)):
        plural = "s" if case.shots > 1 else ""
        print(
            f"{case.method}, {case.backbone}, {case.shots} shot{plural}, {options.size}×{options.size}, one episode, float32"
        )
        checked = f"   at {check}: counted, real run (MB)" if check else ""
        print(f"  {'setting':<48} {'kept GB':>8} {'fewer':>6}{checked}")
        first = None
        for name, setting in SETTINGS.items():
            found = kept(case, setting, "meta", options.size)
            first = found if first is None else first
            row: dict[str, Any] = {**case._asdict(), "setting": name, "kept_bytes": found}
            line = f"  {setting.label:<48} {found / GB:>8.3f} {first / found:>5.1f}×"
            if check:
                row["check_counted_bytes"] = kept(case, setting, "meta", check)
                row["check_real_bytes"] = kept(case, setting, "cpu", check)
                line += f"   {row['check_counted_bytes'] / 1e6:>10.1f} {row['check_real_bytes'] / 1e6:>10.1f}"
            rows.append(row)
            print(line, flush=True)
    settings = {"size": options.size, "check_size": check, "base_classes": BASE_CLASSES}
    results.write(options.out, f"episode_{options.size}", settings, rows)


if __name__ == "__main__":
    main()
