"""Tuning strategies train exactly what they say, and start from the same network."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from run_fakes import TINY
from torch import nn
from tuning_cases import CASES, PAIRS, Case, batch, logits, stages_of, tiny_method

from svf_fast.bench.trainable import BACKBONES, ROWS, Row, trained
from svf_fast.train.assembly import base_rates, build_model
from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.checkpoint import Checkpoint, RunState, load_checkpoint, load_method_state, save_checkpoint
from svf_fast.train.cli import main
from svf_fast.train.config import ConfigError, config_from_plain, load_config
from svf_fast.train.methods import BAM, MetaLearner
from svf_fast.train.tuning import STRATEGIES, StrategyName, build_strategy, trainable_counts

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
EVERY_PAIR = pytest.mark.parametrize(("case", "config"), PAIRS)


def modules_that_train(case: Case, method: MetaLearner) -> dict[str, nn.Module]:
    """Of the plain method: the modules whose own parameters, or what takes their place, are tuned."""
    kind = nn.BatchNorm2d if case.name in ("bn", "bias") else nn.Conv2d
    kernel = case.options.get("kernel", "all")
    return {
        name: module
        for name, module in method.named_modules()
        if name.split(".")[0] in stages_of(case)
        and isinstance(module, kind)
        and (kernel == "all" or f"{module.kernel_size[0]}x{module.kernel_size[1]}" == kernel)
    }


def expected_backbone_names(case: Case, method: MetaLearner) -> dict[str, bool]:
    """Trainable names outside the head, and whether each has the singular values' rate; from the plain method."""
    if case.name == "adapter":
        return {
            f"{stage}.adapter.{layer}.{kind}": False
            for stage in stages_of(case)
            for layer in ("down", "up")
            for kind in ("weight", "bias")
        }
    modules = modules_that_train(case, method)
    if case.name in ("full", "bn"):
        return {f"{name}.{own}": False for name, module in modules.items() for own, _ in module.named_parameters()}
    if case.name == "bias":
        return {f"{name}.bias": False for name in modules}
    if case.name == "svf":
        subspaces = case.options.get("subspaces", ("S",))
        names = {f"{name}.{letter.lower()}": letter == "S" for name in modules for letter in subspaces}
        if case.options.get("batch_norm"):
            norms = modules_that_train(Case("bn", {}), method)
            names |= {f"{name}.{own}": False for name in norms for own in ("weight", "bias")}
        return names
    return {f"{name}.s": True for name in modules if case.options.get("train_s", True)}


@EVERY_PAIR
def test_exactly_the_named_parameters_train_and_each_in_its_group(case: Case, config: BackboneConfig) -> None:
    method = tiny_method(config=config)
    expected = expected_backbone_names(case, method)
    head = {name for name, _ in method.named_parameters() if not name.startswith("layer")}
    strategy = case.build()
    strategy.apply(method)
    named = dict(method.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == head | set(expected)

    groups = {
        group["name"]: ({id(p) for p in group["params"]}, group["lr_scale"])
        for group in strategy.parameter_groups(method, backbone_lr_scale=0.1, svf_lr_scale=0.3)
    }
    wanted = {"head": ({id(named[name]) for name in head}, 1.0)}
    for group, scale, is_singular in (("backbone", 0.1, False), ("singular_values", 0.3, True)):
        members = {id(named[name]) for name, singular in expected.items() if singular is is_singular}
        if members:
            wanted[group] = (members, scale)
    assert groups == wanted


@EVERY_PAIR
def test_the_network_at_step_0_is_the_same_but_for_rotated_subspaces(case: Case, config: BackboneConfig) -> None:
    method = tiny_method(config=config).double().eval()
    episodes = batch(torch.float64)
    before = logits(method, episodes)
    case.build().apply(method)
    with torch.no_grad():
        after_without_graph = logits(method, episodes)
    after = logits(method, episodes)
    torch.testing.assert_close(after_without_graph, after, rtol=1e-9, atol=1e-9)
    if case.name == "rotated_svf":
        assert (after - before).abs().max() > 1e-2 * before.abs().max()
    else:
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["baseline", "pfenet", "bam"])
@EVERY_CASE
def test_one_step_moves_all_that_trains_and_nothing_else(case: Case, name: str) -> None:
    method = tiny_method(name)
    strategy = case.build()
    strategy.apply(method)
    method.train()
    before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    trainable = {key for key, p in method.named_parameters() if p.requires_grad}
    groups = strategy.parameter_groups(method, backbone_lr_scale=0.5, svf_lr_scale=0.5)
    optimiser = torch.optim.SGD(
        [{**group, "lr": 0.1 * group["lr_scale"]} for group in groups], lr=0.1, weight_decay=1e-2
    )
    loss = method.losses(batch()).total
    assert loss.isfinite()
    loss.backward()
    with_gradient = {key for key, p in method.named_parameters() if p.grad is not None}
    assert with_gradient == trainable
    optimiser.step()
    moved = {key for key, tensor in method.state_dict().items() if not torch.equal(tensor, before[key])}
    # an adapter's up starts at 0: in the first step the gradient of its down is 0, and decay moves its weight only
    still = {key for key in trainable if key.endswith("adapter.down.bias")}
    assert moved == trainable - still


@EVERY_CASE
def test_the_base_branch_of_bam_does_not_move(case: Case) -> None:
    method = tiny_method("bam").eval()
    assert isinstance(method, BAM)
    episodes = batch()
    with torch.no_grad():
        before = method.outputs(episodes.query_images, episodes.support_images, episodes.support_labels).base
        case.build().apply(method)
        for _, parameter in method.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(1.2).add_(0.05)
        after = method.outputs(episodes.query_images, episodes.support_images, episodes.support_labels).base
    torch.testing.assert_close(after, before)


def counted(row: Row, backbone: BackboneConfig) -> int:
    """The trainable parameters of a row from the shapes of the plain backbone."""
    strategy = build_strategy(row.strategy, **row.options)
    with torch.device("meta"):
        plain = build_backbone(backbone)
    total = 0
    for stage in getattr(strategy, "stages", ()):
        for module in plain.stage(stage).modules():
            if isinstance(module, nn.Conv2d):
                outputs, columns = module.out_channels, module.weight[0].numel()
                rank = min(outputs, columns)
                bias = outputs if module.bias is not None else 0
                parts = {"U": outputs * rank, "S": rank, "V": rank * columns}
                total += {
                    "full": (module.weight.numel() + bias)
                    * (row.options.get("kernel", "all") in ("all", f"{module.kernel_size[0]}x{module.kernel_size[0]}")),
                    "svf": sum(parts[letter] for letter in row.options.get("subspaces", ("S",))),
                    "left_scaling": outputs,
                    "right_scaling": columns,
                    "rotated_scaling": outputs,
                    "rotated_svf": rank if row.options.get("train_s", True) else 0,
                }.get(row.strategy, 0)
            elif isinstance(module, nn.BatchNorm2d):
                has_affine = row.strategy == "bn" or row.options.get("batch_norm", False)
                total += 2 * module.num_features * has_affine + module.num_features * (row.strategy == "bias")
        if row.strategy == "adapter":
            channels = plain.channels[stage]
            total += 2 * channels * (channels // 16) + channels + channels // 16
    return total


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.table}: {row.label}")
def test_trainable_parameters_of_the_published_backbones(row: Row, backbone: BackboneConfig) -> None:
    strategy = build_strategy(row.strategy, **row.options)
    expected = counted(row, backbone)
    if not expected and row.strategy == "full":
        with pytest.raises(ValueError, match=r"kernel is '1x1', but layers 2-4 of this backbone have no such"):
            trained(backbone, strategy)
    else:
        assert trained(backbone, strategy) == expected


@pytest.mark.parametrize(
    ("backbone", "name", "options", "count"),
    [
        ("ResNet-50", "svf", {}, 12_544),
        ("ResNet-50", "svf", {"stages": ("layer1", "layer2", "layer3", "layer4")}, 12_544 + 704),
        ("ResNet-50", "full", {}, 23_232_512),
        ("ResNet-50", "bn", {}, 50_176),
        ("VGG-16", "svf", {}, 3_840),
        ("VGG-16", "full", {}, 14_454_528),
    ],
)
def test_counts_that_the_specification_states(backbone: str, name: str, options: dict, count: int) -> None:
    assert trained(BACKBONES[backbone], build_strategy(name, **options)) == count


def test_stages_that_the_backbone_lacks_are_left_out() -> None:
    method = tiny_method(config=BackboneConfig(width=4, blocks=(1, 2, 1), depth=3))
    build_strategy("svf").apply(method)
    assert trainable_counts(method)["backbone"] == sum(
        module.s.numel() for name, module in method.named_modules() if hasattr(module, "s0")
    )
    with pytest.raises(ValueError, match=r"stages is \('layer4',\), but the method's backbone ends with layer3"):
        build_strategy("svf", stages=("layer4",)).apply(tiny_method(config=BackboneConfig(width=4, depth=3)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_batch_statistics_go_with_strategies_that_leave_batch_norm_alone(name: str) -> None:
    method = tiny_method(bn_mode="train")
    if name in ("freeze", "full", "adapter"):
        build_strategy(name).apply(method)
        before = method.get_buffer("layer2.0.bn1.running_mean").clone()
        method.train().losses(batch()).total.backward()
        assert not torch.equal(method.get_buffer("layer2.0.bn1.running_mean"), before)
    else:
        parameters = {key: p.requires_grad for key, p in method.named_parameters()}
        with pytest.raises(ValueError, match=f"bn_mode is 'train', expected 'eval': tuning strategy '{name}' keeps"):
            build_strategy(name).apply(method)
        assert {key: p.requires_grad for key, p in method.named_parameters()} == parameters


@EVERY_CASE
def test_a_checkpoint_gives_back_the_tuned_model(case: Case, tmp_path: Path) -> None:
    method = tiny_method("bam").eval()
    case.build().apply(method)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(Checkpoint({}, RunState(), method.state_dict(), {}), tmp_path / "model.pt")

    # other weights, as where no pre-trained ones are read
    fresh = tiny_method("bam", seed=7).eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.mul_(1.5)
    case.build().apply(fresh)
    load_method_state(fresh, load_checkpoint(tmp_path / "model.pt"), tmp_path / "model.pt")
    with torch.no_grad():
        torch.testing.assert_close(logits(fresh, batch()), logits(method, batch()))
        torch.testing.assert_close(logits(copy.deepcopy(method), batch()), logits(method, batch()))


@EVERY_CASE
def test_what_trains_is_said_in_words(case: Case) -> None:
    sentence = case.build().trains
    for stage in {stages_of(case)[0], stages_of(case)[-1]} if stages_of(case) else ():
        assert stage.removeprefix("layer") in sentence
    assert sentence.startswith("nothing") == (case.name == "freeze" or case.options.get("train_s") is False)


def test_every_strategy_has_its_name_in_the_configuration() -> None:
    assert list(STRATEGIES) == list(get_args(StrategyName))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("lora", {}, f"tuning strategy is 'lora', expected one of {', '.join(STRATEGIES)}"),
        ("freeze", {"save": "int8"}, "tuning strategy 'freeze' has no option 'save'; it has none"),
        (
            "svf",
            {"rank": 3},
            "tuning strategy 'svf' has no option 'rank'; it has stages, subspaces, parametrization, batch_norm, save",
        ),
        (
            "full",
            {"stages": ("layer5",)},
            "stages is ('layer5',), expected one or more of layer0, layer1, layer2, layer3, layer4, each once",
        ),
        (
            "bn",
            {"stages": ()},
            "stages is (), expected one or more of layer0, layer1, layer2, layer3, layer4, each once",
        ),
        ("full", {"kernel": "5x5"}, "kernel is '5x5', expected one of 'all', '1x1', '3x3'"),
        ("svf", {"subspaces": ("S", "S")}, "subspaces is ('S', 'S'), expected one or more of U, S, V, each once"),
        (
            "svf",
            {"subspaces": ("U",), "parametrization": "scale"},
            "parametrization is 'scale', but subspaces is ('U',): expected S among them",
        ),
        (
            "svf",
            {"subspaces": ("U", "S"), "save": "int8"},
            "save is 'int8', but subspaces is ('U', 'S'): expected S alone",
        ),
        ("adapter", {"reduction": 0}, "reduction is 0, expected 1 or more"),
    ],
)
def test_wrong_names_and_options_get_a_sentence(name: str, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        build_strategy(name, **options)


def overrides(case: Case) -> list[str]:
    """The case on the command line, on a model of the size of the tests."""
    values = {key: ",".join(value) if isinstance(value, tuple) else value for key, value in case.options.items()}
    model = ["backbone.depth=4", "backbone.blocks=1,1,1,1", "method.prior_layer=layer4"]
    return [*TINY, *model, f"tuning.strategy={case.name}", *(f"tuning.{key}={value}" for key, value in values.items())]


@EVERY_CASE
def test_the_configuration_reaches_every_strategy(case: Case) -> None:
    config = load_config("voc_folder", overrides(case))
    assert config_from_plain(config.to_plain()) == config
    model = build_model(config, pretrained=False)
    assert model.strategy == case.build()
    rates = base_rates(config, model.groups)
    expected = {"head": 0.02, "backbone": 0.02 * 0.1, "singular_values": 0.02 * 25}
    assert rates == pytest.approx({name: expected[name] for name in rates})


@EVERY_CASE
def test_summary_says_what_trains(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "voc_folder", *overrides(case)]) == 0
    printed = capsys.readouterr().out
    assert f"tuning strategy {case.name} trains {case.build().trains}\n" in printed
    assert "not counted" not in printed


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["strategy=freeze", "stages=layer4"], "stages is ('layer4',), but strategy is 'freeze', which has no options"),
        (["strategy=full", "save=int8"], "save is 'int8', but strategy is 'full', which has stages, kernel"),
        (["kernel=3x3"], "kernel is '3x3', but strategy is 'svf', which has stages, subspaces, parametrization"),
        (["strategy=full", "kernel=5x5"], "kernel is '5x5', expected one of 'all', '1x1', '3x3'"),
        (["stages=layer5"], "stages is 'layer5', expected one of 'layer0', 'layer1', 'layer2', 'layer3', 'layer4'"),
        (["stages=[]"], "stages is (), expected one or more of layer0"),
        (["subspaces=U,U"], "subspaces is ('U', 'U'), expected one or more of U, S, V, each once"),
        (["subspaces=U", "save=recompute"], "save is 'recompute', but subspaces is ('U',): expected S alone"),
        (["strategy=rotated_svf", "train_s=1"], "train_s is 1 (int), expected true or false"),
        (["strategy=adapter", "reduction=0"], "reduction is 0, expected 1 or more"),
    ],
)
def test_wrong_settings_get_one_sentence_that_names_the_key(settings: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("voc_folder", [f"tuning.{setting}" for setting in settings])
    assert str(raised.value).startswith(f"tuning.{sentence}")
    assert "\n" not in str(raised.value)
