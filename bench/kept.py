"""Bytes that layers 2-4 of ResNet-50 keep for backward, and the peak during backward, in every form (real runs).

python -m svf_fast.bench.kept [--size 473] [--out DIR]"""

from __future__ import annotations

import torch
from torch import Tensor

from svf_fast.bench import results
from svf_fast.bench.subjects import FORMS, build_backbone_with_statistics, build_trunk
from svf_fast.memory import kept_bytes, peak_bytes
from svf_fast.train.backbones import Backbone, BackboneConfig

MIB = 2**20


def measure(form: str, backbone: Backbone, features: Tensor) -> tuple[int, int]:
    """Bytes kept after forward, and the peak while backward runs, both above the level before forward."""
    trunk = build_trunk(form, backbone)
    kept = kept_bytes(lambda: trunk(features), owned=[*trunk.parameters(), *trunk.buffers(), features])
    parameters = [p for p in trunk.parameters() if p.requires_grad]
    if not parameters:
        return kept, 0
    # zeros_like would do, but nothing is measured on constant data
    gradients = [torch.randn_like(y) for y in trunk(features)]
    outputs: list[Tensor] = []
    peak = peak_bytes(
        lambda: torch.autograd.grad(outputs, parameters, gradients), before=lambda: outputs.extend(trunk(features))
    )
    # the maps of the three layers are the caller's
    return kept, peak - sum(y.nbytes for y in outputs)


def main() -> None:
    parser = results.arguments(__doc__ or "")
    parser.add_argument("--size", type=int, default=473, help="side of the picture, pixels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    backbone = build_backbone_with_statistics(BackboneConfig(), options.seed)
    picture = torch.randn(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(options.seed))
    with torch.no_grad():
        features = backbone.stage("layer1")(backbone.stage("layer0")(picture))
    rows = []
    print(
        f"ResNet-50 layers 2-4, 1×3×{options.size}×{options.size}, float32; stem and layer 1 under no-grad; "
        "their output and the maps of layers 2-4 not counted\n"
    )
    print(f"{'form':<50} {'kept MiB':>9} {'fewer':>7} {'peak in backward MiB':>21}")
    for form in FORMS:
        kept, peak = measure(form, backbone, features)
        rows.append({"form": form, "kept_bytes": kept, "peak_in_backward_bytes": peak})
        fewer = f"{rows[0]['kept_bytes'] / kept:.1f}×" if kept else "–"
        print(f"{FORMS[form].label:<50} {kept / MIB:>9.1f} {fewer:>7} {peak / MIB:>21.1f}", flush=True)
    results.write(options.out, f"kept_resnet50_{options.size}", {"size": options.size, "seed": options.seed}, rows)


if __name__ == "__main__":
    main()
