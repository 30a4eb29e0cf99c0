"""Backbones: published keys, shapes and dense features, and weights that fit exactly or are refused."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svf_fast.train.backbones import Backbone, BackboneConfig, build_backbone, load_backbone_weights

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
NARROW = {"width": 4, "blocks": (2, 1, 2, 1)}
NARROW_PLAIN = BackboneConfig(stem="plain", **NARROW)
NARROW_DEEP = BackboneConfig(stem="deep", **NARROW)
NARROW_VGG = BackboneConfig(architecture="vgg16", width=4)


def batch_norm_shapes(key: str, channels: int) -> dict[str, list[int]]:
    entries = {f"{key}.{name}": [channels] for name in ("weight", "bias", "running_mean", "running_var")}
    return {**entries, f"{key}.num_batches_tracked": []}


def published_resnet50() -> dict[str, list[int]]:
    """Keys and shapes of the deep-stem ResNet-50, from the method specification's section 1.4."""
    shapes: dict[str, list[int]] = {}
    for index, (out, into) in zip((0, 3, 6), ((64, 3), (64, 64), (128, 64)), strict=True):
        shapes[f"layer0.{index}.weight"] = [out, into, 3, 3]
        shapes |= batch_norm_shapes(f"layer0.{index + 1}", out)
    into = 128
    for stage, width, blocks in ((1, 64, 3), (2, 128, 4), (3, 256, 6), (4, 512, 3)):
        for block in range(blocks):
            key = f"layer{stage}.{block}"
            kernels = ([width, into, 1, 1], [width, width, 3, 3], [4 * width, width, 1, 1])
            for number, kernel in enumerate(kernels, start=1):
                shapes[f"{key}.conv{number}.weight"] = kernel
                shapes |= batch_norm_shapes(f"{key}.bn{number}", kernel[0])
            if block == 0:
                shapes[f"{key}.downsample.0.weight"] = [4 * width, into, 1, 1]
                shapes |= batch_norm_shapes(f"{key}.downsample.1", 4 * width)
            into = 4 * width
    return shapes


def published_vgg16() -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    into = 3
    for stage, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for number in range(count):
            key = f"layer{stage}.{3 * number}"
            shapes |= {f"{key}.weight": [width, into, 3, 3], f"{key}.bias": [width]}
            shapes |= batch_norm_shapes(f"layer{stage}.{3 * number + 1}", width)
            into = width
    return shapes


@pytest.mark.parametrize(
    ("config", "published", "parameters"),
    [
        (BackboneConfig(), published_resnet50(), [112832, 236288, 1219584, 7098368, 14964736]),
        (BackboneConfig(architecture="vgg16"), published_vgg16(), [38976, 221952, 1476864, 5902848, 7082496]),
    ],
    ids=["resnet50", "vgg16"],
)
def test_entries_are_the_published_ones(config, published, parameters):
    with torch.device("meta"):
        backbone = build_backbone(config)
    assert {key: list(tensor.shape) for key, tensor in backbone.state_dict().items()} == published
    assert [sum(p.numel() for p in backbone.stage(name).parameters()) for name in backbone.channels] == parameters


@pytest.mark.parametrize(("size", "sides"), [(473, (119, 119, 60, 60, 60)), (73, (19, 19, 10, 10, 10))])
@pytest.mark.parametrize("stem", ["deep", "plain"])
@pytest.mark.parametrize("stride_on", ["conv1", "conv2"])
@pytest.mark.parametrize("dilation", ["uniform", "torchvision"])
def test_resnet_sides(size, sides, stem, stride_on, dilation):
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(stem=stem, stride_on=stride_on, dilation=dilation))
        assert stage_sides(backbone, torch.empty(1, 3, size, size)) == sides


@pytest.mark.parametrize(("size", "sides"), [(473, (237, 119, 60, 30, 30)), (73, (37, 19, 10, 5, 5))])
def test_vgg_sides(size, sides):
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(architecture="vgg16"))
        assert stage_sides(backbone, torch.empty(1, 3, size, size)) == sides


def stage_sides(backbone: Backbone, features: Tensor) -> tuple[int, ...]:
    sides = []
    for name, channels in backbone.channels.items():
        features = backbone.stage(name)(features)
        assert features.shape[1] == channels
        sides.append(features.shape[-1])
    return tuple(sides)


@pytest.mark.parametrize("config", [NARROW_PLAIN, NARROW_DEEP, NARROW_VGG], ids=["plain", "deep", "vgg"])
@pytest.mark.parametrize("size", [(33, 33), (50, 71)])
def test_forward_is_the_last_stage(config, size):
    backbone = build_backbone(config).eval()
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    features = backbone(image)
    assert features.shape[:2] == (2, backbone.channels["layer4"])
    assert torch.isfinite(features).all()


@pytest.mark.parametrize(
    ("dilation", "first", "others"), [("uniform", (2, 4), (2, 4)), ("torchvision", (1, 2), (2, 4))]
)
@pytest.mark.parametrize("stride_on", ["conv1", "conv2"])
def test_last_stages_have_dilation_and_no_stride(dilation, first, others, stride_on):
    backbone = build_backbone(BackboneConfig(dilation=dilation, stride_on=stride_on, width=4))
    for stage, first_rate, rate in zip(("layer3", "layer4"), first, others, strict=True):
        convolutions = {n: m for n, m in backbone.stage(stage).named_modules() if isinstance(m, nn.Conv2d)}
        assert all(convolution.stride == (1, 1) for convolution in convolutions.values())
        for name, convolution in convolutions.items():
            if name.endswith("conv2"):
                expected = first_rate if name.startswith("0.") else rate
                assert convolution.dilation == convolution.padding == (expected, expected)


@pytest.mark.parametrize(("stride_on", "dilation"), [("conv1", "uniform"), ("conv2", "torchvision")])
def test_dense_features_contain_those_of_the_strided_network(stride_on, dilation):
    config = BackboneConfig(stem="plain", stride_on=stride_on, dilation=dilation, **NARROW)
    dense, strided = build_backbone(config).double().eval(), build_backbone(config).double().eval()
    for stage in ("layer3", "layer4"):
        for name, module in strided.stage(stage).named_modules():
            if isinstance(module, nn.Conv2d):
                is_strided = name in (f"0.{stride_on}", "0.downsample.0")
                module.stride = (2, 2) if is_strided else (1, 1)
                module.dilation = (1, 1)
                module.padding = (1, 1) if name.endswith("conv2") else (0, 0)
    image = torch.randn(1, 3, 65, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(dense(image)[:, :, ::4, ::4], strided(image))


def test_initial_weights_depend_on_the_seed_only():
    torch.manual_seed(5)
    first = build_backbone(NARROW_DEEP, seed=7).state_dict()
    after_first = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after_first), "the caller's generator was moved"
    again = build_backbone(NARROW_DEEP, seed=7).state_dict()
    other = build_backbone(NARROW_DEEP, seed=8).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["layer0.0.weight"], other["layer0.0.weight"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"architecture": "resnet50"}, "architecture is 'resnet50', expected one of 'resnet', 'vgg16'"),
        ({"stem": "wide"}, "stem is 'wide', expected one of 'deep', 'plain'"),
        ({"depth": 5}, "depth is 5, expected one of 3, 4"),
        ({"bn_eps": 0.0}, "bn_eps is 0.0, expected a number above 0"),
        ({"width": -1}, "width is -1, expected a whole number above 0"),
        ({"blocks": (3, 4)}, "blocks is (3, 4), expected at least 4 whole numbers above 0"),
        ({"architecture": "vgg16", "stem": "plain"}, "stem is an option of ResNets, but architecture is 'vgg16'"),
    ],
)
def test_wrong_options_are_named(options, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        BackboneConfig(**options)


PLAIN_NAMES = {"layer0.0": "conv1", "layer0.1": "bn1"}
DEEP_NAMES = PLAIN_NAMES | {"layer0.3": "conv2", "layer0.4": "bn2", "layer0.6": "conv3", "layer0.7": "bn3"}
VGG_STARTS = {"layer0": 0, "layer1": 7, "layer2": 14, "layer3": 24, "layer4": 34}


def resnet_file(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    published = {}
    for key, tensor in state.items():
        module, _, entry = key.rpartition(".")
        published[f"{names.get(module, module)}.{entry}"] = tensor
    return {**published, "fc.weight": torch.zeros(5, 2), "fc.bias": torch.zeros(5)}


def vgg_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    published = {}
    for key, tensor in state.items():
        stage, index, entry = key.split(".")
        published[f"features.{VGG_STARTS[stage] + int(index)}.{entry}"] = tensor
    return {**published, "classifier.0.weight": torch.zeros(2, 2)}


FILES = {
    "torchvision resnet": (NARROW_PLAIN, lambda state: resnet_file(state, PLAIN_NAMES)),
    "deep stem": (NARROW_DEEP, lambda state: resnet_file(state, DEEP_NAMES)),
    "torchvision vgg16_bn": (NARROW_VGG, vgg_file),
    "own keys": (NARROW_DEEP, dict),
    "DataParallel": (NARROW_DEEP, lambda state: {f"module.{key}": tensor for key, tensor in state.items()}),
    "wrapped": (NARROW_DEEP, lambda state: {"epoch": 3, "state_dict": resnet_file(state, DEEP_NAMES)}),
    "without num_batches_tracked": (
        NARROW_PLAIN,
        lambda state: {key: t for key, t in resnet_file(state, PLAIN_NAMES).items() if "num_batches" not in key},
    ),
}


@pytest.mark.parametrize(("config", "published"), FILES.values(), ids=FILES.keys())
def test_published_layouts_load_whole(config, published, tmp_path):
    source, target = build_backbone(config, seed=1), build_backbone(config, seed=2)
    torch.save(published(source.state_dict()), tmp_path / "weights.pth")
    load_backbone_weights(target, tmp_path / "weights.pth")
    expected = source.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in target.state_dict().items())


def test_safetensors_load(tmp_path):
    source, target = build_backbone(NARROW_DEEP, seed=1), build_backbone(NARROW_DEEP, seed=2)
    save_file(resnet_file(source.state_dict(), DEEP_NAMES), tmp_path / "weights.safetensors")
    load_backbone_weights(target, tmp_path / "weights.safetensors")
    assert torch.equal(target.state_dict()["layer0.3.weight"], source.state_dict()["layer0.3.weight"])


def test_a_file_may_hold_stages_that_the_backbone_lacks(tmp_path):
    whole = build_backbone(NARROW_PLAIN, seed=1)
    short = build_backbone(BackboneConfig(stem="plain", depth=3, **NARROW), seed=2)
    torch.save(resnet_file(whole.state_dict(), PLAIN_NAMES), tmp_path / "weights.pth")
    load_backbone_weights(short, tmp_path / "weights.pth")
    assert torch.equal(short.state_dict()["layer3.0.conv2.weight"], whole.state_dict()["layer3.0.conv2.weight"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("layer2.0.conv2.weight"), "missing: layer2.0.conv2.weight"),
        (lambda state: state.update({"layer5.weight": torch.zeros(1)}), "superfluous: layer5.weight"),
        (
            lambda state: state.update({"conv1.weight": torch.zeros(4, 3, 3, 3)}),
            "of another shape: layer0.0.weight [4, 3, 3, 3], expected [4, 3, 7, 7]",
        ),
    ],
    ids=["missing", "superfluous", "shape"],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(change, problem, tmp_path):
    state = resnet_file(build_backbone(NARROW_PLAIN, seed=1).state_dict(), PLAIN_NAMES)
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    backbone = build_backbone(NARROW_PLAIN, seed=2)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit the backbone") as error:
        load_backbone_weights(backbone, tmp_path / "weights.pth")
    assert str(error.value).endswith(problem)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a weight file at all"])
def test_unreadable_files_are_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a complete PyTorch or safetensors file"):
        load_backbone_weights(build_backbone(NARROW_PLAIN), tmp_path / name)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*weights\.pth"):
        load_backbone_weights(build_backbone(NARROW_PLAIN), tmp_path / "weights.pth")


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds no state dict of named tensors"):
        load_backbone_weights(build_backbone(NARROW_PLAIN), tmp_path / "weights.pth")


def test_imagenet_resnet50_to_layer3_loads():
    path = SHARED / "data" / "weights" / "resnet50_imagenet_to_layer3.pth"
    if not path.is_file():
        pytest.skip("no ImageNet weights beside the repository")
    config = BackboneConfig(stem="plain", stride_on="conv1", bn_eps=1.001e-5, depth=3)
    backbone = build_backbone(config).eval()
    load_backbone_weights(backbone, path)
    image = torch.randn(1, 3, 65, 65, generator=torch.Generator().manual_seed(3))
    features = backbone(image)
    assert features.shape == (1, 1024, 9, 9)
    # a trained, normalised network is neither silent nor exploding
    assert 0.01 < features.mean() < 1
