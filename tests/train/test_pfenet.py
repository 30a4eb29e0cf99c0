"""PFENet: published keys, scales of any size, and the enrichment as the released code writes it."""

import re

import pytest
import torch
from method_cases import Batch, batch, narrow
from torch import Tensor
from torch.nn import functional as F

from svf_fast.memory import kept_bytes
from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods import PFENet
from svf_fast.train.tuning import build_strategy


@pytest.mark.parametrize(("architecture", "middle"), [("resnet", 1536), ("vgg16", 768)])
def test_head_entries_are_the_published_ones_in_their_order(architecture, middle):
    with torch.device("meta"):
        method = PFENet(build_backbone(BackboneConfig(architecture=architecture)))
    entries = {
        "cls.0.weight": [256, 256, 3, 3],
        "cls.3.weight": [2, 256, 1, 1],
        "cls.3.bias": [2],
        "down_query.0.weight": [256, middle, 1, 1],
        "down_supp.0.weight": [256, middle, 1, 1],
        **{f"init_merge.{n}.0.weight": [256, 513, 1, 1] for n in range(4)},
        **{f"beta_conv.{n}.{layer}.weight": [256, 256, 3, 3] for n in range(4) for layer in (0, 2)},
    }
    for n in range(4):
        entries[f"inner_cls.{n}.0.weight"] = [256, 256, 3, 3]
        entries[f"inner_cls.{n}.3.weight"] = [2, 256, 1, 1]
        entries[f"inner_cls.{n}.3.bias"] = [2]
    entries["res1.0.weight"] = [256, 1024, 1, 1]
    entries |= {f"res2.{layer}.weight": [256, 256, 3, 3] for layer in (0, 2)}
    entries |= {f"alpha_conv.{n}.0.weight": [256, 512, 1, 1] for n in range(3)}
    head = {name: list(parameter.shape) for name, parameter in method.head_parameters()}
    assert head == entries
    assert list(head) == list(entries)
    assert len(method.state_dict()) == {"resnet": 365, "vgg16": 126}[architecture]


def released_enrichment(method: PFENet, sides: tuple[int, ...], q: Tensor, p: Tensor, prior: Tensor) -> list[Tensor]:
    """Inner logits, then the final ones, with every concatenation built and every scale resized to the map."""

    def at(features: Tensor, *size: int) -> Tensor:
        return F.interpolate(features, size=size, mode="bilinear", align_corners=True)

    inner, enriched = [], []
    for n, side in enumerate(sides):
        parts = [F.adaptive_avg_pool2d(q, side), p.expand(-1, -1, side, side), at(prior, side, side)]
        scale = F.relu(method.init_merge[n][0](torch.cat(parts, dim=1)))
        if n:
            both = torch.cat([scale, at(enriched[-1], side, side)], dim=1)
            scale = scale + F.relu(method.alpha_conv[n - 1][0](both))
        scale = scale + method.beta_conv[n](scale)
        inner.append(method.inner_cls[n](scale))
        enriched.append(at(scale, *q.shape[-2:]))
    merged = F.relu(method.res1[0](torch.cat(enriched, dim=1)))
    return [*inner, method.cls(merged + method.res2(merged))]


@pytest.mark.parametrize(
    ("bins", "sides"),
    [((5, 3), (5, 3)), ((12, 4, 1.0), (12, 4, 5)), ((1.0, 0.5, 0.25), (5, 2, 1)), ((1,), (5,)), ((0.99,), (4,))],
)
def test_enrichment_is_the_released_one_at_any_scales(bins, sides):
    method = narrow("pfenet", bins=bins).double().eval()
    low = method.segment(*batch(dtype=torch.float64).episode)
    assert low.query.shape[-2:] == (5, 5)
    expected = released_enrichment(method, sides, low.query, low.prototype, low.prior)
    assert [logits.shape[-1] for logits in low.inner] == list(sides)
    for logits, reference in zip((*low.inner, low.logits), expected, strict=True):
        torch.testing.assert_close(logits, reference)


def test_every_shot_counts_alike():
    query_image, support_images, support_labels = batch(shots=2).episode
    method = narrow("pfenet").eval()
    together = method.segment(query_image, support_images, support_labels)
    apart = [method.segment(query_image, support_images[:, k : k + 1], support_labels[:, k : k + 1]) for k in range(2)]
    for name in ("prior", "prototype"):
        mean = torch.stack([getattr(one, name) for one in apart]).mean(dim=0)
        torch.testing.assert_close(getattr(together, name), mean)


def test_ratios_too_small_for_the_map_get_a_sentence():
    method = narrow("pfenet", bins=(1.0, 0.125))
    with pytest.raises(ValueError, match=re.escape("bins is [1.0, 0.125], too small ratios for features 5 positions")):
        method(*batch().episode)


@pytest.mark.parametrize(
    ("strategy", "recompute", "limit_gb"),
    [
        (("freeze", {}), "none", 0.37),
        (("svf", {"save": "exact"}), "none", 2.84),
        (("svf", {"save": "int8"}), "none", 1.31),
        (("svf", {"save": "recompute"}), "stages", 0.22),
    ],
)
def test_bytes_kept_for_a_five_shot_episode_at_641(strategy, recompute, limit_gb):
    """ResNet-50, float32, counted on the meta device, where every support position counts as a winner of the prior."""
    name, options = strategy
    with torch.device("meta"):
        method = PFENet(build_backbone(BackboneConfig()), recompute=recompute)
        label = torch.zeros(1, 641, 641, dtype=torch.int64)
        pictures = torch.randn(1, 3, 641, 641), torch.randn(1, 5, 3, 641, 641)
        given = Batch(pictures[0], label, pictures[1], label[:, None].repeat(1, 5, 1, 1), None, None)
    build_strategy(name, **options).apply(method)
    method.train()
    owned = [*method.parameters(), *method.buffers(), *(t for t in given if t is not None)]
    assert kept_bytes(lambda: method.losses(given).total, owned=owned) <= limit_gb * 1e9
