"""What every few-shot method keeps to: any backbone and size, no graph where nothing trains, the same results however
memory is saved, the singular-value gradients of Algorithm 1."""

import re

import pytest
import torch
from method_cases import BACKBONES, OPTIONS, Batch, batch, narrow, narrow_backbone
from torch import nn

import svf_fast
from svf_fast.memory import kept_bytes
from svf_fast.reference import convert_naive
from svf_fast.train.methods import METHODS, Baseline, Losses, MetaLearner, build_method
from svf_fast.train.tuning import build_strategy

TUNED = ("layer2", "layer3", "layer4")
every_method = pytest.mark.parametrize("name", METHODS)


def tuned(method: MetaLearner, strategy: str) -> MetaLearner:
    build_strategy(strategy).apply(method)
    return method.train()


def dropped_out_losses(method: MetaLearner, given: Batch, seed: int = 11) -> Losses:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return method.losses(given)


@every_method
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("episodes", "shots", "size"), [(1, 1, 33), (2, 3, 50), (3, 1, 41)])
def test_logits_have_the_input_size_and_the_whole_head_learns(name, backbone, episodes, shots, size):
    method = narrow(name, backbone, shots=shots).train()
    given = batch(episodes, shots, size)
    assert method(*given.episode).shape == (episodes, 2, size, size)
    losses = method.losses(given)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    gradients = {key: parameter.grad for key, parameter in method.head_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    assert all(parameter.grad is not None for parameter in method.get_submodule("layer2").parameters())


@every_method
def test_the_total_is_the_sum_of_the_parts(name):
    losses = narrow(name).losses(batch())
    assert (
        list(losses.parts) == {"baseline": ["main"], "pfenet": ["main", "aux"], "bam": ["main", "aux1", "aux2"]}[name]
    )
    torch.testing.assert_close(losses.total, torch.stack(list(losses.parts.values())).sum())


@every_method
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("strategy", ["freeze", "full", "svf"])
@pytest.mark.parametrize("recompute", ["supports", "stages"])
def test_recomputing_changes_neither_losses_nor_gradients(name, backbone, strategy, recompute):
    given = batch(shots=3, dtype=torch.float64)
    method = tuned(narrow(name, backbone, shots=3).double(), strategy)
    results = {}
    for mode in ("none", recompute):
        method.recompute = mode
        method.zero_grad()
        losses = dropped_out_losses(method, given)
        losses.total.backward()
        trained = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
        results[mode] = {**losses.parts, **trained}
    for key, expected in results["none"].items():
        torch.testing.assert_close(results[recompute][key], expected, rtol=1e-9, atol=1e-12, msg=key)
    with torch.no_grad():
        other = dropped_out_losses(method, given, seed=12)
        assert other.parts["main"] != results["none"]["main"], "dropout was not active"


@every_method
@pytest.mark.parametrize("strategy", ["full", "svf"])
def test_recomputed_supports_keep_their_pictures_only(name, strategy):
    kept = {}
    for recompute in ("none", "supports", "stages"):
        kept[recompute] = []
        for shots in (1, 3):
            method = tuned(narrow(name, shots=shots, recompute=recompute), strategy)
            kept[recompute].append(kept_by_a_step(method, batch(1, shots, 65)))
    picture_and_mask = 4 * 65 * 65 * 4
    feature_map = 9 * 9 * 4
    cosines = 4 * 32 * 32 * 4 if name == "bam" else 0  # between layer 2's channels
    added_by_two_shots = kept["supports"][1] - kept["supports"][0]
    # besides them a prototype, a prior and what combines the shots
    assert added_by_two_shots <= 2 * (picture_and_mask + cosines) + 20 * feature_map
    assert kept["stages"][1] < kept["supports"][1] < kept["none"][1]


def kept_by_a_step(method: MetaLearner, given: Batch) -> int:
    owned = [*method.parameters(), *method.buffers(), *(t for t in given if t is not None)]
    return kept_bytes(lambda: method.losses(given).total, owned=owned)


@pytest.mark.parametrize("strategy", ["freeze", "svf"])
def test_bam_keeps_no_map_more_than_the_baseline(strategy):
    given = batch(1, 3, 65)
    kept = [kept_by_a_step(tuned(narrow(name, shots=3), strategy), given) for name in ("baseline", "bam")]
    final = 2 * 65 * 65 * 4
    few_channels = 20 * 9 * 9 * 4  # probabilities, base map, the shots' priors before they are weighed
    cosines = 4 * (1 + 3) * 32 * 32 * 4 if strategy == "svf" else 0  # between layer 2's channels
    assert kept[1] - kept[0] <= final + few_channels + cosines


@every_method
def test_a_frozen_backbone_has_no_graph(name):
    method = tuned(narrow(name), "freeze")
    given = batch()
    query = method.query_features(given.query_images)
    assert not any(features is not None and features.requires_grad for features in query)
    shots = method.support_shots(given.support_images, given.support_labels, query)
    assert not shots.priors.requires_grad
    assert not any(other.requires_grad for other in shots.others)
    assert shots.prototypes.requires_grad


@every_method
def test_stem_and_layer1_have_no_graph_when_layers_2_to_4_train(name):
    method = tuned(narrow(name), "full")
    layer1 = method.get_submodule("layer1")(method.get_submodule("layer0")(batch().query_images))
    assert not layer1.requires_grad


@every_method
@pytest.mark.parametrize("backbone", ["resnet", "vgg"])
def test_layer4_learns_through_the_prior_alone(name, backbone):
    method = tuned(narrow(name, backbone).double(), "full").eval()
    segmentation = method.segment(*batch(dtype=torch.float64).episode)
    weight = next(p for p in method.get_submodule("layer4").parameters() if p.requires_grad)
    (through_prior,) = torch.autograd.grad(segmentation.prior.square().sum(), weight, retain_graph=True)
    assert through_prior.abs().max() > 0
    others = segmentation.prototype.sum() + segmentation.query.sum()
    if name == "bam":
        others = others + segmentation.factors.sum() + segmentation.weights.square().sum()
        assert not segmentation.base.requires_grad
    assert torch.autograd.grad(others, weight, allow_unused=True) == (None,)


@every_method
def test_singular_values_have_the_gradients_of_algorithm_1(name):
    given = batch(dtype=torch.float64)
    gradients, totals = [], []
    for strategy in ("svf", "algorithm 1"):
        method = narrow(name).double()
        if strategy == "svf":
            tuned(method, "svf")
        else:
            tuned(method, "freeze")
            method.prepare_tuning(TUNED)
            convert_naive(method, TUNED)
            method.train()
        losses = dropped_out_losses(method, given)
        losses.total.backward()
        totals.append(losses.total.detach())
        gradients.append(
            {key: value.grad for key, value in svf_fast.singular_values(method).items()}
            if strategy == "svf"
            else {
                key.removesuffix(".vector_S"): parameter.grad.flatten()
                for key, parameter in method.named_parameters()
                if key.endswith(".vector_S")
            }
        )
    torch.testing.assert_close(*totals, rtol=1e-10, atol=0)
    fast, naive = gradients
    assert fast.keys() == naive.keys()
    assert len(fast) == 4 * 3 + 3  # four bottlenecks in layers 2-4, a downsample in the first of each
    largest = max(gradient.norm().item() for gradient in naive.values())
    for key, expected in naive.items():
        assert (fast[key] - expected).norm() <= 1e-9 * max(expected.norm().item(), 1e-6 * largest), key


@every_method
def test_both_forms_of_the_prior_give_the_same_loss(name):
    given = batch(dtype=torch.float64)
    forms = [dropped_out_losses(narrow(name, cosine=cosine).double(), given) for cosine in ("streaming", "matrix")]
    torch.testing.assert_close(*(losses.total for losses in forms), rtol=1e-10, atol=0)


@every_method
def test_each_query_meets_its_own_supports_in_any_order(name):
    method = narrow(name).double().eval()
    query_image, support_images, support_labels = batch(episodes=3, dtype=torch.float64).episode
    together = method(query_image, support_images, support_labels)
    assert not torch.allclose(together[0], together[1])
    for b in range(3):
        one = slice(b, b + 1)
        alone = method(query_image[one], support_images[one].flip(1), support_labels[one].flip(1))
        torch.testing.assert_close(together[one], alone)


@every_method
def test_batch_norm_stays_on_its_running_statistics(name):
    method = narrow(name).train()
    before = {key: tensor.clone() for key, tensor in method.state_dict().items() if "running" in key}
    method.losses(batch())
    assert method.middle_dropout.training
    assert all(torch.equal(method.state_dict()[key], tensor) for key, tensor in before.items())


@every_method
def test_batch_norm_in_train_mode_follows_the_query_and_each_shot_in_turn(name):
    method = tuned(narrow(name, shots=3, bn_mode="train"), "freeze")
    given = batch(shots=3)
    statistics = nn.BatchNorm2d(4)
    first = method.get_submodule("layer0")
    for images in (given.query_images, *given.support_images.unbind(1)):
        statistics(first[0](images))
    method.losses(given)
    trained = first[1]
    torch.testing.assert_close(trained.running_mean, statistics.running_mean)
    torch.testing.assert_close(trained.running_var, statistics.running_var)
    updates = {
        key: int(count)
        for key, count in method.named_buffers()
        if key.startswith("layer") and key.endswith(".num_batches_tracked")
    }
    assert updates
    assert set(updates.values()) == {1 + 3}
    method.eval()
    with torch.no_grad():
        method(*given.episode)
    assert int(trained.num_batches_tracked) == 1 + 3


@every_method
def test_a_head_at_the_same_seed_starts_the_same(name):
    torch.manual_seed(1)
    first = narrow(name)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1)), "the caller's stream was touched"
    second = dict(narrow(name).head_parameters())
    assert all(torch.equal(parameter, second[key]) for key, parameter in first.head_parameters())


def test_a_layer_above_the_priors_is_left_out():
    method = narrow(prior_layer="layer3")
    assert method.stages == ("layer0", "layer1", "layer2", "layer3")
    assert not any(key.startswith("layer4") for key in method.state_dict())


@every_method
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prior_layer": "layer2"}, "prior_layer is 'layer2', expected one of 'layer4', 'layer3'"),
        ({"recompute": "all"}, "recompute is 'all', expected one of 'none', 'supports', 'stages'"),
        ({"bn_mode": "batch"}, "bn_mode is 'batch', expected one of 'eval', 'train'"),
        (
            {"bn_mode": "train", "recompute": "stages"},
            "recompute is 'stages' with bn_mode='train', expected 'none': what is rebuilt in backward would move",
        ),
    ],
)
def test_wrong_options_get_a_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        narrow(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("baseline", {"shot_reduction": "max"}, "shot_reduction is 'max', expected one of 'mean', 'sum'"),
        ("baseline", {"bins": (60, 30)}, "method 'baseline' has no option 'bins'; it has head_width, aspp_dilations,"),
        (
            "pfenet",
            {"bins": (60, 7.5)},
            "bins is [60, 7.5], expected one or more sides above 1 as whole numbers, or ratios",
        ),
        (
            "pfenet",
            {"bins": ()},
            "bins is [], expected one or more sides above 1 as whole numbers, or ratios in (0, 1]",
        ),
        ("bam", {"shots": 0}, "base_classes is 5 and shots is 0, expected at least 1 of each"),
        ("bam", {"kshot_trans_dim": -1}, "kshot_trans_dim is -1, expected a width, or 0 for no hidden layer"),
    ],
)
def test_wrong_options_of_one_method_get_a_sentence(name, options, sentence):
    required = {"base_classes": 5, "shots": 1} if name == "bam" else {}
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        build_method(name, narrow_backbone(), **{**required, **options})


def test_unknown_methods_get_a_sentence():
    with pytest.raises(ValueError, match=r"^method is 'hsnet', expected one of baseline, pfenet, bam$"):
        build_method("hsnet", narrow_backbone())


def test_a_prior_from_a_layer_that_is_not_there_gets_a_sentence():
    with pytest.raises(ValueError, match=r"^prior_layer is 'layer4', but the backbone ends with layer3$"):
        Baseline(narrow_backbone("resnet to layer 3"))


def test_supports_of_another_shape_get_a_sentence():
    query_image, support_images, support_labels = batch().episode
    method = narrow()
    with pytest.raises(ValueError, match=r"^support_images is \[1, 2, 3, 33, 33\], expected \[2, K, 3, 33, 33\]"):
        method(query_image, support_images[:1], support_labels)
    with pytest.raises(ValueError, match=r"^support_labels is \[2, 1, 33, 33\], expected \[2, 2, 33, 33\]"):
        method(query_image, support_images, support_labels[:, :1])
    with pytest.raises(ValueError, match=r"^support_images is \[2, 2, 3, 33, 33\], expected \[2, K, 3, 41, 41\]"):
        method(torch.zeros(2, 3, 41, 41), support_images, support_labels)
    with pytest.raises(ValueError, match=r"^query_image is \[2, 1, 33, 33\], expected \[B, 3, S, S\]"):
        method(query_image[:, :1], support_images, support_labels)


def test_every_method_has_options_here():
    assert OPTIONS.keys() == METHODS.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_prior_masked_once_looks_at_all_of_layer4(name):
    given = batch()
    twice, once = (narrow(name, prior_masking=masking).eval() for masking in ("twice", "once"))
    for method in (twice, once):
        # where nothing comes in, something comes out
        torch.nn.init.constant_(method.get_parameter("layer4.0.bn3.bias"), 0.5)
    assert not torch.equal(twice.segment(*given.episode).prior, once.segment(*given.episode).prior)
    everywhere = given._replace(support_labels=torch.ones_like(given.support_labels))
    torch.testing.assert_close(twice.segment(*everywhere.episode).prior, once.segment(*everywhere.episode).prior)
