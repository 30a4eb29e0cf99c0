"""`python tests/parity.py`: what it checks holds for the golden data beside the repository, and it misses nothing."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import parity
import pytest
import torch
from parity_rules.filling import entry_values, filled_state, stream
from parity_rules.inputs import Episodes, make_episodes, make_photo
from torch import nn
from torch.nn import functional as F

from svf_fast.train.data.transforms import blur

GOLDEN = Path(__file__).resolve().parents[1] / ".." / "shared" / "golden"
needs_golden = pytest.mark.skipif(not (GOLDEN / "fill.py").is_file(), reason="no golden data beside the repository")
FAST = ("bam_resnet50_1shot", "bam_vgg16_1shot", "data")  # BAM holds the baseline, and a base learner
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))
CASES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@needs_golden
@pytest.mark.parametrize("name", CASES)
def test_golden_data_are_met(name: str) -> None:
    account = parity.checked_account(GOLDEN / name, torch.channels_last)
    assert not account.misses
    assert len(account.comparisons) > 50


@needs_golden
@pytest.mark.slow
def test_golden_data_are_met_in_the_plain_memory_format() -> None:
    assert not parity.checked_account(GOLDEN / "baseline_vgg16_1shot", torch.contiguous_format).misses


def test_numbers_from_names_are_those_of_the_specification() -> None:
    assert stream("0|demo", 3).tolist() == [-0.6879165172576904, 0.7952855825424194, -0.34592223167419434]
    weight = entry_values("layer1.0.conv1.weight", (64, 128, 1, 1), 0).astype(np.float32)
    assert weight[0, 0].item() == 0.012005862779915333
    assert weight[63, 127].item() == -0.21361593902111053
    episodes = make_episodes(73, 2, 1, 15, 0)
    assert episodes.query_images[1, 2, 72, 72].item() == -1.5257765054702759
    assert (episodes.support_labels == 1).sum() == 2592
    assert episodes.base_labels[episodes.base_labels < 255].sum() == 76218


@needs_golden
@pytest.mark.parametrize(
    ("size", "batch", "shots", "base_classes", "seed"), [(73, 2, 5, 15, 0), (97, 3, 2, 60, 7), (65, 1, 1, 3, 11)]
)
def test_inputs_are_those_of_the_golden_datas_own_code(
    size: int, batch: int, shots: int, base_classes: int, seed: int
) -> None:
    fill = golden_code()
    theirs = fill.make_inputs(size, batch, shots, base_classes, seed)
    inputs = [theirs["x"], theirs["y_m"], theirs["s_x"], theirs["s_y"], theirs["y_b"], *theirs["cat_idx"]]
    ours = make_episodes(size, batch, shots, base_classes, seed)
    for field, expected in zip(fields(Episodes), inputs, strict=True):
        assert torch.equal(getattr(ours, field.name), expected), field.name
    for actual, expected in zip(make_photo(size, 40, seed), fill.make_photo(size, 40, seed), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


@needs_golden
def test_weights_are_those_of_the_golden_datas_own_code() -> None:
    block = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "bn": nn.BatchNorm2d(5), "bn3": nn.BatchNorm2d(5)})
    ours = filled_state(nn.Sequential(block), 6)
    for key, expected in golden_code().fill_state_dict(nn.Sequential(block), 6).state_dict().items():
        assert ours[key].dtype == expected.dtype
        assert torch.equal(ours[key], expected), key


def test_an_entry_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vector_S of shape \[1, 4\] has no filling rule"):
        entry_values("layer2.vector_S", (1, 4), 0)


class Folder:
    """A folder with a golden file ``data`` of one blurred photo, which is met until it is changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        image, label = make_photo(30, 40, 3)
        self.arrays = {"blur/image": blur(image), "blur/label": label}
        entry = {"op": "RandomGaussianBlur", "image_shape": [30, 40, 3], "label_shape": [30, 40]}
        self.settings: dict[str, Any] = {"cv2": cv2.__version__, "photo_seed": 3, "size": 33, "items": {"blur": entry}}
        self.settings["evaluation"] = {"shape": [30, 40], **counts_by_hand(label, size=33, seed=3)}

    def write(self, name: str = "data") -> None:
        (self.path / f"{name}.json").write_text(json.dumps(self.settings))
        np.savez_compressed(self.path / f"{name}.npz", **self.arrays)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    folder.write()
    return folder


def test_a_folder_that_is_met_exits_with_0(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.path / "fill.py").write_text("")
    assert parity.main([str(folder.path)]) == 0
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith("ok   data")
    assert "8 quantities   largest 0.00 of its limit" in line
    assert summary.startswith("1 of 1 files ok")


def perturb(folder: Folder) -> None:
    folder.arrays["blur/image"][3, 4, 1] += 0.002
    folder.write()


def relabel(folder: Folder) -> None:
    folder.arrays["blur/label"][0, 0] = 1
    folder.write()


def other_shape(folder: Folder) -> None:
    folder.arrays["blur/image"] = folder.arrays["blur/image"][1:]
    folder.write()


def add_array(folder: Folder) -> None:
    folder.arrays["blur/mystery"] = np.zeros(3)
    folder.write()


def add_entry(folder: Folder) -> None:
    folder.settings["items"]["blur"]["sigma"] = 1.1
    folder.write()


def add_operation(folder: Folder) -> None:
    folder.settings["items"]["blur"]["op"] = "Sharpen"
    folder.write()


def not_finite_entry(folder: Folder) -> None:
    folder.settings["size"] = float("nan")
    folder.write()


def not_finite_array(folder: Folder) -> None:
    folder.arrays["blur/image"][0] = np.inf
    folder.write()


def truncate_json(folder: Folder) -> None:
    path = folder.path / "data.json"
    path.write_text(path.read_text()[:-20])


def truncate_npz(folder: Folder) -> None:
    path = folder.path / "data.npz"
    path.write_bytes(path.read_bytes()[:-200])


def spoil_npz(folder: Folder) -> None:
    path = folder.path / "data.npz"
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


def lose_npz(folder: Folder) -> None:
    (folder.path / "data.npz").unlink()


def lose_json(folder: Folder) -> None:
    (folder.path / "data.json").unlink()


def unknown_model(folder: Folder) -> None:
    folder.write("hsnet_resnet50_1shot")


def stray_file(folder: Folder) -> None:
    (folder.path / "weights.pt").touch()


def other_settings(folder: Folder) -> None:
    described = ("param_seed", "input_seed", "torch", "batch", "n_base", "shot")
    folder.settings |= {"model": "bam", "backbone": "vgg16"} | dict.fromkeys(described, 1)
    folder.write("baseline_vgg16_1shot")


def no_settings(folder: Folder) -> None:
    folder.write("baseline_vgg16_1shot")


def say_nothing(folder: Folder) -> None:
    folder.arrays.clear()
    del folder.settings["items"]
    folder.write()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (perturb, "blur/image (2.0e-03 of 1e-03)"),
        (relabel, "blur/label (1.0e+00 of 0e+00)"),
        (other_shape, "blur/image has the shape [30, 40, 3], expected [29, 40, 3]"),
        (add_array, "not compared: blur/mystery"),
        (add_entry, "not compared: items/blur/sigma"),
        (add_operation, "items/blur/op is 'Sharpen', which no rule is known for"),
        (not_finite_entry, "data.json cannot be read: it holds NaN"),
        (not_finite_array, "data.npz holds values that are not finite in blur/image"),
        (truncate_json, "data.json cannot be read: "),
        (truncate_npz, "data.npz cannot be read: "),
        (spoil_npz, "data.npz cannot be read: "),
        (lose_npz, "data.npz is missing"),
        (lose_json, "data.json is missing"),
        (unknown_model, "hsnet_resnet50_1shot   is no golden file's name"),
        (stray_file, "weights.pt   is no golden file's name"),
        (other_settings, "the JSON's model is 'bam', but the file's name says 'baseline'"),
        (no_settings, "the JSON has no model"),
        (say_nothing, "the file holds nothing of items/"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_whatever_is_wrong_with_a_folder_exits_with_1_and_says_so(
    folder: Folder, change: Callable[[Folder], None], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    assert parity.main([str(folder.path)]) == 1
    printed = capsys.readouterr().out
    assert "MISS" in printed
    assert complaint in printed
    assert "Traceback" not in printed


def test_a_folder_without_golden_files_exits_with_1(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    empty = folder.path / "empty"
    empty.mkdir()
    assert parity.main([str(empty)]) == 1
    assert parity.main([str(empty / "absent")]) == 1
    assert parity.main([str(folder.path), "--only", "bam_*"]) == 1
    assert "holds no golden file whose name fits bam_*" in capsys.readouterr().out


@needs_golden
def test_every_perturbed_quantity_of_a_model_is_a_miss_and_nothing_else(tmp_path: Path) -> None:
    name = "baseline_vgg16_1shot"
    settings = json.loads((GOLDEN / f"{name}.json").read_text())
    for unused in ("noise", "bntrain_num_batches_tracked"):
        settings.pop(unused)
    losses, norms = settings["losses"], settings["grad_norms"]
    settings["losses"] = {"fixbn": losses["fixbn"]}
    settings["grad_norms"] = {"fixbn": norms["fixbn"]}
    kept = ("out", "prior", "proto", "grad_fixbn/cls_meta.3.bias")
    with np.load(GOLDEN / f"{name}.npz") as golden:
        arrays = {array: golden[array] for array in kept}
    arrays["prior"][0, 0, 0, 0] += 2e-4  # the largest is 1
    arrays["grad_fixbn/cls_meta.3.bias"] *= 1.002
    losses["fixbn"]["main"] *= 1.0002
    norms["fixbn"]["res1_meta.0.weight"] *= 1.002
    del norms["fixbn"]["cls_meta.0.weight"]
    settings["state_dict"]["cls_meta.3.bias"] = [3]
    settings["n_parameters"] += 1
    (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    np.savez(tmp_path / f"{name}.npz", **arrays)

    account = parity.checked_account(tmp_path / name, torch.channels_last)
    assert {"out_low", "query_layer4/channel_mean"} <= set(account.absent)
    misses = [miss for miss in account.misses if not miss.startswith("the file holds nothing of")]
    assert len(account.misses) == len(misses) + 2
    expected = [
        "state_dict (cls_meta.3.bias: [2], expected [3])",
        "n_parameters (is 19247170, expected 19247171)",
        "prior (2.0e-04 of 1e-04)",
        "losses/fixbn/main (2.0e-04 of 1e-04)",
        "grad_norms/fixbn/res1_meta.0.weight (2.0e-03 of 1e-03)",
        "grad_fixbn/cls_meta.3.bias (2.0e-03 of 1e-03)",
        "what has a gradient (grad_norms/fixbn): has besides cls_meta.0.weight",
    ]
    assert misses == expected


def counts_by_hand(label: np.ndarray, *, size: int, seed: int) -> dict[str, list[int]]:
    """Of the golden data's made-up logits, per label 0 and 1: void ignored, label 2 background."""
    noise = torch.from_numpy(stream(f"{seed}|eval_logits", 1, 2, size, size)).float()
    logits = F.avg_pool2d(noise, 5, stride=1, padding=2)
    square = F.interpolate(logits, (max(label.shape),) * 2, mode="bilinear", align_corners=True)[0]
    predicted = square.argmax(0).numpy()[: label.shape[0], : label.shape[1]]
    target = np.where(label == 2, 0, label)
    hits = [(each == predicted) & (each == target) for each in (0, 1)]
    unions = [((each == predicted) | (each == target)) & (target != 255) for each in (0, 1)]
    targets = [target == each for each in (0, 1)]
    counts = {"intersection": hits, "union": unions, "target": targets}
    return {name: [int(pixels.sum()) for pixels in masks] for name, masks in counts.items()}


def golden_code() -> Any:
    """The filling rules as code, from the golden data's folder."""
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
