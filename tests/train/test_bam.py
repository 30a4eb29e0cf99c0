"""BAM: published keys, the weights of shots, the ensemble, and a base branch that tuning never moves."""

import re

import pytest
import torch
from method_cases import BASE_CLASSES, batch, narrow, narrow_backbone
from torch import Tensor

from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.methods import BAM, PSPNet
from svf_fast.train.methods.bam import (
    adjustment_factor,
    base_foreground,
    channel_cosines,
    predict_generalised,
)
from svf_fast.train.methods.layers import resize
from svf_fast.train.tuning import build_strategy


@pytest.mark.parametrize(
    ("architecture", "shots", "entries"), [("resnet", 1, 383), ("resnet", 5, 387), ("vgg16", 1, 144), ("vgg16", 5, 148)]
)
def test_entries_are_the_published_ones(architecture, shots, entries):
    with torch.device("meta"):
        method = BAM(build_backbone(BackboneConfig(architecture=architecture)), base_classes=15, shots=shots)
    assert len(method.state_dict()) == entries
    order = list(dict.fromkeys(key.partition(".")[0] for key in method.state_dict()))
    assert order == [
        *method.stages,
        "learner_base",
        *("down_query", "down_supp", "init_merge", "ASPP_meta", "res1_meta", "res2_meta", "cls_meta"),
        *("gram_merge", "cls_merge"),
        *(["kshot_rw"] if shots > 1 else []),
    ]
    assert method.get_parameter("learner_base.1.4.weight").shape == (16, 512, 1, 1)
    if shots > 1:
        reweighting = {key: list(t.shape) for key, t in method.state_dict().items() if key.startswith("kshot_rw")}
        assert reweighting == {
            "kshot_rw.0.weight": [2, shots, 1, 1],
            "kshot_rw.0.bias": [2],
            "kshot_rw.2.weight": [shots, 2, 1, 1],
            "kshot_rw.2.bias": [shots],
        }


def test_the_ensemble_starts_as_the_meta_learner_and_shots_alike():
    method = narrow("bam", shots=3, kshot_trans_dim=0).eval()
    low = method.segment(*batch(shots=3).episode)
    torch.testing.assert_close(low.final, low.meta.softmax(dim=1))
    torch.testing.assert_close(low.weights, torch.full((2, 3, 1, 1), 1 / 3))
    assert [key for key in method.state_dict() if key.startswith("kshot_rw")] == ["kshot_rw.weight"]


def test_with_one_shot_the_meta_learner_is_the_baseline():
    given = batch(shots=1)
    bam = narrow("bam", shots=1).eval()
    baseline = narrow("baseline", shots=1).eval()
    baseline.load_state_dict({key: bam.state_dict()[key] for key in baseline.state_dict()})
    torch.testing.assert_close(bam.outputs(*given.episode).meta, baseline(*given.episode))


def test_shots_are_weighed_by_their_factors_whatever_their_order():
    method = narrow("bam", shots=4).double().eval()
    query_image, support_images, support_labels = batch(shots=4, dtype=torch.float64).episode
    low = method.segment(query_image, support_images, support_labels)
    for b, factors in enumerate(low.factors.flatten(1)):
        ranks = factors.argsort()
        hidden = method.kshot_rw(factors[ranks].view(1, 4, 1, 1)).flatten()
        expected = torch.empty_like(hidden)
        expected[ranks] = hidden
        torch.testing.assert_close(low.weights[b].flatten(), expected.softmax(dim=0))
    assert low.weights.flatten(1).std(dim=1).min() > 0, "all weights were alike"
    order = [2, 0, 3, 1]
    permuted = method.segment(query_image, support_images[:, order], support_labels[:, order])
    torch.testing.assert_close(permuted.weights, low.weights[:, order])
    torch.testing.assert_close(permuted.final, low.final)
    torch.testing.assert_close(permuted.prior, low.prior)


def test_channel_cosines_of_many_large_features_are_finite_in_half_precision():
    features = 5.0 + torch.rand(1, 4, 64, 64)
    with torch.autocast("cpu", torch.float16):
        found = channel_cosines(features.half())
    # one channel's squares sum up to more than fp16 holds
    assert features.square().sum(dim=(2, 3)).min() > 65504
    torch.testing.assert_close(found, channel_cosines(features), rtol=1e-3, atol=1e-3)


def test_channel_cosines_and_their_distance():
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    first[0, 2] = 0.0
    first.requires_grad_()
    cosines = channel_cosines(first)
    for b in range(2):
        for i in range(4):
            for j in range(4):
                expected = torch.cosine_similarity(first[b, i].flatten(), first[b, j].flatten(), dim=0)
                assert cosines[b, i, j].item() == pytest.approx(expected.item(), abs=1e-6)
    factor = adjustment_factor(cosines, channel_cosines(second))
    torch.testing.assert_close(factor, (cosines - channel_cosines(second)).square().sum(dim=(1, 2)).sqrt() / 4)
    factor.sum().backward()
    assert torch.isfinite(first.grad).all()


def test_pictures_that_look_alike_have_factor_zero_and_finite_gradients():
    features = torch.randn(1, 4, 3, 3, requires_grad=True, generator=torch.Generator().manual_seed(1))
    factor = adjustment_factor(channel_cosines(features), channel_cosines(features.detach()))
    assert factor.item() == 0.0
    factor.backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_the_base_map_leaves_out_the_episodes_own_class_in_training():
    base = torch.randn(2, BASE_CLASSES + 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    probabilities = base.softmax(dim=1)
    everything = base_foreground(base)
    torch.testing.assert_close(everything, 1 - probabilities[:, :1])
    without = base_foreground(base, torch.tensor([0, 3]))
    torch.testing.assert_close(without[0], everything[0] - probabilities[0, 1:2])
    torch.testing.assert_close(without[1], everything[1] - probabilities[1, 4:5])


def test_losses_use_the_training_rule_and_forward_that_of_evaluation():
    method = narrow("bam", shots=2).eval()
    with torch.no_grad():
        method.cls_merge.weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
    given = batch()
    trained = method.segment(*given.episode, categories=given.categories)
    evaluated = method.segment(*given.episode)
    assert not torch.allclose(trained.final, evaluated.final)
    final = torch.nn.functional.interpolate(trained.final, (33, 33), mode="bilinear", align_corners=True)
    main = torch.nn.functional.cross_entropy(final, given.query_labels, ignore_index=255)
    torch.testing.assert_close(method.losses(given).parts["main"], main)


def test_the_ensemble_is_what_the_paper_writes():
    method = narrow("bam", shots=2).double().eval()
    with torch.no_grad():
        method.gram_merge.weight.copy_(torch.tensor([0.7, 0.4]).view(1, 2, 1, 1))
        method.cls_merge.weight.copy_(torch.tensor([0.9, -0.3]).view(1, 2, 1, 1))
    low = method.segment(*batch(dtype=torch.float64).episode)
    factor = (low.weights * low.factors).sum(dim=1, keepdim=True)
    meta = low.meta.softmax(dim=1)
    background = 0.9 * (0.7 * meta[:, :1] + 0.4 * factor) - 0.3 * low.base_map
    torch.testing.assert_close(low.final, torch.cat([background, 0.7 * meta[:, 1:] + 0.4 * factor], dim=1))


def disturb(method: BAM) -> None:
    """Move everything that trains."""
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5).add_(0.01)


@pytest.mark.parametrize("backbone", ["resnet", "vgg"])
@pytest.mark.parametrize(
    ("strategy", "options", "copies"),
    [
        ("freeze", {}, ()),
        ("full", {}, ("layer2p", "layer3p", "layer4p")),
        ("svf", {}, ("layer2p", "layer3p", "layer4p")),
        ("svf", {"stages": ("layer4",)}, ("layer4p",)),
        ("svf", {"stages": ("layer3",)}, ("layer3p", "layer4p")),
        ("full", {"stages": ("layer1", "layer2")}, ("layer1p", "layer2p", "layer3p", "layer4p")),
    ],
)
def test_base_logits_never_move(backbone, strategy, options, copies):
    given = batch()
    method = narrow("bam", backbone, shots=2)
    before = method.eval().segment(*given.episode)
    build_strategy(strategy, **options).apply(method)
    method.eval()
    assert tuple(name for name, _ in method.named_children() if re.fullmatch(r"layer\dp", name)) == copies
    frozen = ("learner_base.", *(f"{name}." for name in copies))
    assert not any(name.startswith(frozen) for name, _ in method.head_parameters())
    assert not any(p.requires_grad for name, p in method.named_parameters() if name.startswith(frozen))
    disturb(method)
    after = method.segment(*given.episode)
    assert torch.equal(after.base, before.base)
    assert not torch.equal(after.meta, before.meta)


def test_where_nothing_is_tuned_the_query_passes_layer4_once():
    passes = count_of_pictures_through_layer4(narrow("bam", shots=2))
    assert passes == [2, 4]


def test_a_tuned_backbone_shares_its_first_layers_with_the_base_branch():
    method = narrow("bam", shots=2)
    method.prepare_tuning(("layer3",))
    method.prepare_tuning(("layer4",))  # kept already
    pictures: list[int] = []
    method.get_submodule("layer2").register_forward_hook(lambda _, given, __: pictures.append(len(given[0])))
    assert count_of_pictures_through_layer4(method) == [2, 4]
    assert pictures == [2, 4]


def count_of_pictures_through_layer4(method: BAM) -> list[int]:
    pictures: list[int] = []
    method.get_submodule("layer4").register_forward_hook(lambda _, given, __: pictures.append(len(given[0])))
    method.losses(batch())
    return pictures


def test_aux2_is_a_constant_with_dropout_in_training():
    method = narrow("bam", shots=2)
    build_strategy("svf").apply(method)
    values = set()
    for training in (True, True, False, False):
        method.train(training)
        aux2 = method.losses(batch()).parts["aux2"]
        assert not aux2.requires_grad
        values.add(aux2.item())
    assert len(values) == 3, "two draws of the base learner's dropout, and the same value twice without"


@pytest.mark.parametrize("backbone", ["resnet", "vgg", "resnet to layer 3"])
def test_a_base_learner_fills_backbone_and_branch(backbone):
    learner = PSPNet(narrow_backbone(backbone), classes=BASE_CLASSES, seed=7).eval()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.mul_(1.1)
    method = narrow("bam", backbone, shots=2).eval()
    method.load_base_learner({f"module.{key}": tensor for key, tensor in learner.state_dict().items()})
    given = batch()
    torch.testing.assert_close(method.segment(*given.episode).base, learner.segment(given.query_images))
    assert all(torch.equal(method.state_dict()[k], t) for k, t in learner.state_dict().items() if k.startswith("layer"))


def test_a_base_learner_of_other_classes_gets_a_sentence():
    other = PSPNet(narrow_backbone(), classes=BASE_CLASSES + 1).state_dict()
    with pytest.raises(
        ValueError, match=r"do not fit the base learner; of another shape: cls\.4\.weight \[7, 512, 1, 1\]"
    ):
        narrow("bam", shots=2).load_base_learner(other)


def test_a_base_learner_after_tuning_gets_a_sentence():
    method = narrow("bam", shots=2)
    build_strategy("svf").apply(method)
    with pytest.raises(ValueError, match=r"^load_base_learner comes before tuning is prepared"):
        method.load_base_learner({})


@pytest.mark.parametrize(
    ("categories", "sentence"),
    [
        (torch.tensor([1]), "categories is torch.int64 [1], expected torch.int64 [2]"),
        (torch.tensor([1.0, 2.0]), "categories is torch.float32 [2], expected torch.int64 [2]"),
        (torch.tensor([-1, 2]), "categories holds -1 to 2, expected positions among 5 base classes"),
        (torch.tensor([0, 5]), "categories holds 0 to 5, expected positions among 5 base classes"),
    ],
)
def test_categories_that_are_none_get_a_sentence(categories, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        narrow("bam").losses(batch()._replace(categories=categories))


@pytest.mark.parametrize("missing", ["base_labels", "categories"])
def test_losses_without_base_labels_get_a_sentence(missing):
    with pytest.raises(ValueError, match=f"^batch.{missing} is None, but BAM's losses need the labels"):
        narrow("bam", shots=2).losses(batch()._replace(**{missing: None}))


def test_another_number_of_shots_gets_a_sentence():
    with pytest.raises(ValueError, match=r"^support_images has 3 shots, expected 2$"):
        narrow("bam", shots=2)(*batch(shots=3).episode)


def logits_of(rows: list[list[float]]) -> Tensor:
    """One row a pixel -> [1, C, 1, pixels]."""
    return torch.tensor(rows).mT[None, :, None]


def test_generalised_prediction_puts_the_novel_class_above_or_below_the_base_classes():
    # softmax of (0, x): 0.88 for 2, 0.95 for 3
    final = logits_of([[0.0, 3.0], [0.0, 3.0], [0.0, 2.0], [0.0, 2.0]])
    base = logits_of([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert predict_generalised(final, base).tolist() == [[[3, 3, 2, 0]]]
    assert predict_generalised(final, base, rule="base").tolist() == [[[1, 3, 2, 0]]]
    assert predict_generalised(final, base, tau=0.85).tolist() == [[[3, 3, 3, 3]]]
    with pytest.raises(ValueError, match=r"^rule is 'meta', expected one of 'final', 'base'$"):
        predict_generalised(final, base, rule="meta")


def test_habits_of_the_released_code_can_be_left_out_in_training():
    given = batch()
    kept, out = (
        narrow("bam", base_dropout=False, **options)
        for options in ({}, {"final_loss": "as_probabilities", "training_base_map": "all"})
    )
    for method in (kept, out):
        method.eval()
        torch.nn.init.constant_(method.cls_merge.weight, 0.5)
    low = out.segment(*given.episode)
    shares = resize(low.final, given.query_labels.shape[-2:])
    shares = shares / shares.sum(dim=1, keepdim=True)
    is_counted = given.query_labels != 255
    of_label = shares.gather(1, given.query_labels.masked_fill(~is_counted, 0)[:, None])[:, 0]
    torch.testing.assert_close(out.losses(given).parts["main"], -of_label[is_counted].log().mean())
    assert not torch.isclose(out.losses(given).parts["main"], kept.losses(given).parts["main"])


def test_dropout_of_the_frozen_base_learner_is_active_in_training_unless_left_out():
    given = batch()
    for base_dropout in (True, False):
        method = narrow("bam", base_dropout=base_dropout).train()
        first, second = (method.segment(*given.episode).base for _ in range(2))
        assert torch.equal(first, second) != base_dropout
