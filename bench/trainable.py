"""How many parameters of the backbone each tuning strategy trains: every row of the SVF paper's tables 4 to 10, on both of
its backbones. Counted on the meta device, nothing is decomposed.

python -m svf_fast.bench.trainable [--out DIR]"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from svf_fast.bench import results
from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods import build_method
from svf_fast.train.tuning import Strategy, build_strategy, trainable_counts

BACKBONES = {"ResNet-50": BackboneConfig(), "VGG-16": BackboneConfig(architecture="vgg16")}
LAYER_4, LAYERS_3_4, LAYERS_2_4 = ("layer4",), ("layer3", "layer4"), ("layer2", "layer3", "layer4")
LAYERS_1_4 = ("layer1", *LAYERS_2_4)


class Row(NamedTuple):
    """A row of a table in the paper, and the strategy that is it."""

    table: str
    label: str
    strategy: str
    options: dict[str, Any] = {}  # noqa: RUF012 - a default of a NamedTuple, read only


ROWS = (
    Row("4", "BN", "bn"),
    Row("4", "BN + S", "svf", {"batch_norm": True}),
    Row("4", "S", "svf"),
    Row("5", "full, layers 1-4", "full", {"stages": LAYERS_1_4}),
    Row("5", "full, layers 2-4", "full", {"stages": LAYERS_2_4}),
    Row("5", "full, layers 3-4", "full", {"stages": LAYERS_3_4}),
    Row("5", "full, layer 4", "full", {"stages": LAYER_4}),
    Row("6", "3x3 and 1x1", "full"),
    Row("6", "3x3", "full", {"kernel": "3x3"}),
    Row("6", "1x1", "full", {"kernel": "1x1"}),
    Row("7", "U", "svf", {"subspaces": ("U",)}),
    Row("7", "S", "svf", {"subspaces": ("S",)}),
    Row("7", "V", "svf", {"subspaces": ("V",)}),
    Row("7", "U, S", "svf", {"subspaces": ("U", "S")}),
    Row("7", "S, V", "svf", {"subspaces": ("S", "V")}),
    Row("7", "U, V", "svf", {"subspaces": ("U", "V")}),
    Row("7", "U, S, V", "svf", {"subspaces": ("U", "S", "V")}),
    Row("8", "S, layer 4", "svf", {"stages": LAYER_4}),
    Row("8", "S, layers 3-4", "svf", {"stages": LAYERS_3_4}),
    Row("8", "S, layers 2-4", "svf", {"stages": LAYERS_2_4}),
    Row("8", "S, layers 1-4", "svf", {"stages": LAYERS_1_4}),
    Row("9", "W", "freeze"),
    Row("9", "S'W", "left_scaling"),
    Row("9", "WS'", "right_scaling"),
    Row("9", "R S' Rᵀ W", "rotated_scaling"),
    Row("9", "U S Vᵀ", "svf"),
    Row("9", "U R S Rᵀ Vᵀ, frozen", "rotated_svf", {"train_s": False}),
    Row("9", "U R S Rᵀ Vᵀ", "rotated_svf"),
    Row("10", "freeze", "freeze"),
    Row("10", "fully fine-tune", "full", {"stages": LAYERS_1_4}),
    Row("10", "SVF", "svf"),
    Row("10", "adapter", "adapter"),
    Row("10", "bias tuning", "bias"),
    Row("3.3", "S_frozen · S_trainable", "svf", {"parametrization": "scale"}),
)


def backbone_size(backbone: BackboneConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_backbone(backbone).parameters())


def trained(backbone: BackboneConfig, strategy: Strategy) -> int:
    """Trainable parameters of the backbone under ``strategy``. ValueError where the two do not fit."""
    with torch.device("meta"):
        method = build_method("baseline", build_backbone(backbone))
    strategy.apply(method)
    return trainable_counts(method)["backbone"]


def main() -> None:
    options = results.arguments(__doc__ or "").parse_args()
    sizes = {name: backbone_size(backbone) for name, backbone in BACKBONES.items()}
    print("trainable parameters of the backbone; " + ", ".join(f"{name} has {size:,}" for name, size in sizes.items()))
    print(f"\n{'table':<5}  {'row':<22}" + "".join(f"{name:>23}" for name in BACKBONES) + "  what trains")
    rows = []
    for row in ROWS:
        strategy = build_strategy(row.strategy, **row.options)
        counts: dict[str, int | None] = {}
        for name, backbone in BACKBONES.items():
            # VGG-16 has no 1x1 convolution
            has_none = name == "VGG-16" and row.options.get("kernel") == "1x1"
            counts[name] = None if has_none else trained(backbone, strategy)
        rows.append({**row._asdict(), "trains": strategy.trains, "parameters": counts})
        cells = "".join(_cell(count, sizes[name]) for name, count in counts.items())
        print(f"{row.table:<5}  {row.label:<22}{cells}  {strategy.trains}", flush=True)
    results.write(options.out, "trainable", {"backbone_parameters": sizes}, rows)


def _cell(count: int | None, size: int) -> str:
    if count is None:
        return f"{'none of them':>23}"
    return f"{count:>12,}{100 * count / size:>9.3f} %"


if __name__ == "__main__":
    main()
