"""Compositions: the shipped configurations and parts, files of one's own on top of them, and the sentence that a wrong one gets."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from svf_fast.bench.trainable import ROWS
from svf_fast.train.cli import main
from svf_fast.train.composition import (
    CONFIGURATIONS,
    PART_FILES,
    SHIPPED_FOLDER,
    Entry,
    layers_of,
    shipped,
    shipped_configs,
    shipped_parts,
)
from svf_fast.train.config import BaseConfig, Config, ConfigError, load_any_config, load_base_config, load_config
from svf_fast.train.schema import flatten, require_fit
from svf_fast.train.tuning import build_strategy

PARTS = [(file, entry) for file in PART_FILES for entry in shipped()[file].values()]
ENTRIES = [*PARTS, *((CONFIGURATIONS, entry) for entry in shipped()[CONFIGURATIONS].values())]
BASE_PARTS = ("base_learner", "base_learner_coco")

# What the values of the SVF paper and of BAM's code were before they were put together from parts.
PAPER: dict[str, Any] = {
    "data": {
        "root": None,
        "folds": "pascal",
        "fold": 0,
        "train_list": "lists/train.txt",
        "val_list": "lists/val.txt",
        "drop_novel_images": True,
        "size": 473,
        "shots": 1,
        "batch": 8,
        "scale_range": [0.9, 1.1],
    },
    "backbone": {"architecture": "resnet", "stem": "deep", "dilation": "uniform", "stride_on": "conv2", "depth": 4},
    "method": {"head_width": 256, "prior_layer": "layer4", "bn_mode": "eval"},
    "tuning": {"strategy": "svf", "stages": None, "subspaces": None, "batch_norm": None},
    "optimiser": {
        "base_lr": 0.015,
        "lr_scale": 1.0,
        "backbone_lr_scale": 0.1,
        "svf_lr_scale": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
    },
    "schedule": {"name": "cosine", "iterations": None, "epochs": 200, "patience": 75},
    "validation": {"every_iterations": None, "every_epochs": 1.0, "episodes": 1000, "seed": 321, "shots": None},
    "run": {"seed": 321, "checkpoint_every": 100},
}
METHODS: dict[str, dict[str, Any]] = {
    "baseline": {"method.name": "baseline", "method.shot_reduction": "mean", "method.bins": None},
    "pfenet": {"method.name": "pfenet", "method.bins": [60.0, 30.0, 15.0, 8.0], "method.shot_reduction": None},
    "bam": {"method.name": "bam", "method.kshot_trans_dim": 2, "method.base_learner": None},
}
COCO = {
    "data.folds": "coco",
    "data.size": 641,
    "data.scale_range": [0.8, 1.25],
    "schedule.epochs": 50,
    "validation.every_epochs": 0.5,
}
VGG = {"backbone.architecture": "vgg16"}
BASE = {
    "method.name": "pspnet",
    "data.train_list": "lists/train.txt",
    "data.val_list": "lists/val.txt",
    "data.size": 417,
    "data.batch": 12,
    "data.scale_range": [0.5, 2.0],
    "optimiser.base_lr": 0.00025,
    "optimiser.lr_scale": 10.0,
    "optimiser.backbone_lr_scale": 0.1,
    "schedule.name": "poly",
    "schedule.epochs": 100,
    "schedule.patience": 75,
    "validation.every_epochs": 1.0,
    "run.seed": 321,
}
BASE_COCO = {"data.folds": "coco", "optimiser.backbone_lr_scale": 1.0, "schedule.epochs": 20}
VOC_FOLDER = {
    "data.train_list": "lists/fold{fold}_train.txt",
    "data.val_list": "lists/fold{fold}_val.txt",
    "data.size": 161,
    "data.batch": 4,
    "backbone.stem": "plain",
    "backbone.stride_on": "conv1",
    "backbone.bn_eps": 1.001e-5,
    "backbone.depth": 3,
    "method.name": "baseline",
    "method.head_width": 128,
    "method.prior_layer": "layer3",
    "method.shot_reduction": None,
    "optimiser.base_lr": 0.02,
    "optimiser.svf_lr_scale": 25.0,
    "schedule.iterations": 400,
    "schedule.epochs": None,
    "schedule.patience": None,
    "validation.every_iterations": 100,
    "validation.every_epochs": None,
    "validation.episodes": 200,
    "run.checkpoint_every": 25,
}
EXPECTED = {
    "voc_folder": flatten(PAPER) | VOC_FOLDER,
    **{
        f"{data}_{method}_{backbone}": flatten(PAPER) | METHODS[method] | of_data | of_backbone
        for method in METHODS
        for data, of_data in (("pascal", {}), ("coco", COCO))
        for backbone, of_backbone in (("resnet50", {}), ("vgg16", VGG))
    },
    **{
        f"{data}_base_{backbone}": BASE | of_data | of_backbone
        for data, of_data in (("pascal", {}), ("coco", BASE_COCO))
        for backbone, of_backbone in (("resnet50", {}), ("vgg16", VGG))
    },
}


def id_of(value: object) -> str:
    return value.name if isinstance(value, Entry) else str(value)


def test_every_shipped_configuration_is_expected() -> None:
    assert shipped_configs() == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_shipped_configuration_has_the_documented_values(name: str) -> None:
    found = flatten(load_any_config(name).to_plain())
    assert {key: found[key] for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize(("file", "entry"), ENTRIES, ids=id_of)
def test_a_part_says_what_it_is_and_has_keys_of_the_schema_only(file: str, entry: Entry) -> None:
    assert re.fullmatch(r"[A-Z0-9].{5,112}\.", entry.about)
    assert isinstance(entry.content, dict)
    own = {key: value for key, value in entry.content.items() if key != "compose"}
    require_fit(BaseConfig if entry.name in BASE_PARTS else Config, own)
    assert own or "compose" in entry.content


def test_names_stand_for_one_thing() -> None:
    names = [entry.name for _, entry in PARTS]
    assert len(set(names)) == len(names)
    for file in (
        SHIPPED_FOLDER / f"{CONFIGURATIONS}.yaml",
        *(SHIPPED_FOLDER / "parts" / f"{f}.yaml" for f in PART_FILES),
    ):
        # YAML would take the last of two equal names
        keys = re.findall(r"^(\w+):", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert keys == list(shipped()[file.stem])
    assert sorted(path.stem for path in (SHIPPED_FOLDER / "parts").iterdir()) == sorted(PART_FILES)


def test_every_combination_of_tables_1_to_3_resolves() -> None:
    made_of = (
        ("pascal", "coco"),
        ("resnet50", "vgg16"),
        METHODS,
        ("svf", "frozen"),
        ("", "+no_trick"),
        ("", "+five_shot"),
    )
    for data, backbone, method, recipe, trick, shots in itertools.product(*made_of):
        config = load_config(f"{data}+{backbone}+{method}+{recipe}{trick}{shots}")
        assert (config.data.folds, config.method.name) == (data, method)
        assert config.data.drop_novel_images == (trick == "")
        assert config.data.shots == (5 if shots else 1)


def test_every_row_of_tables_4_to_10_has_its_recipe() -> None:
    recipes = {name: load_config(f"pascal+resnet50+pfenet+{name}").tuning for name in shipped()["recipes"]}
    strategies = [build_strategy(tuning.strategy, **tuning.options) for tuning in recipes.values()]
    for row in ROWS:
        assert build_strategy(row.strategy, **row.options) in strategies


@pytest.mark.parametrize(
    ("name", "head", "backbone", "schedule"),
    [
        ("pascal+resnet50+pfenet+frozen", 0.05, None, "poly"),
        ("pascal+resnet50+pfenet+pfenet_original", 0.025, None, "poly"),
        ("coco+resnet50+pfenet+pfenet_original_coco", 0.2, None, "poly"),
        ("pascal+resnet50+baseline+svf", 0.015, 0.0015, "cosine"),
        ("pascal+resnet50_released+baseline_released+svf_released", 0.015, 0.0015, "constant"),
        ("pascal+vgg16+bam+full", 0.015, 0.0015, "cosine"),
        ("pascal+resnet50+base_learner", 0.0025, 0.00025, "poly"),
        ("coco+resnet50+base_learner_coco", 0.0025, 0.0025, "poly"),
    ],
)
def test_a_recipes_rates_in_effect(name: str, head: float, backbone: float | None, schedule: str) -> None:
    config = load_any_config(name)
    rate = config.optimiser.base_lr * config.optimiser.lr_scale
    assert rate == pytest.approx(head)
    if backbone is not None:
        assert rate * config.optimiser.backbone_lr_scale == pytest.approx(backbone)
    assert config.schedule.name == schedule


def test_the_released_codes_variants() -> None:
    config = load_config("pascal+resnet50_released+baseline_released+svf_released")
    assert config.backbone.dilation == "torchvision"
    assert (config.method.shot_reduction, config.method.train_down_query) == ("sum", False)


def test_pfenets_own_repository() -> None:
    config = load_config("pascal+resnet50+pfenet+pfenet_original")
    assert (config.data.batch, config.data.drop_novel_images, config.method.bn_mode) == (4, False, "train")
    assert (config.schedule.patience, config.validation.every_epochs, config.validation.episodes) == (None, 2.0, 5000)
    coco = load_config("coco+resnet50+pfenet+pfenet_original_coco")
    assert (coco.data.batch, coco.method.bins, coco.schedule.epochs) == (32, (1.0, 0.5, 0.25, 0.125), 50)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("pascal+resnet50+baseline+frozen+svf", "pascal_baseline_resnet50"),
        ("coco+pascal+resnet50+baseline+svf", "pascal_baseline_resnet50"),
        ("any_folder+coco+resnet50+bam+svf", "coco_bam_resnet50"),
        ("pascal_baseline_resnet50+frozen", "pascal+resnet50+baseline+frozen"),
        ("five_shot+no_trick+pascal+vgg16+pfenet+svf", "pascal+vgg16+pfenet+svf+five_shot+no_trick"),
        ("any_folder+resnet50+base_learner", "any_folder+base_learner+resnet50"),
    ],
)
def test_later_parts_win(name: str, same: str) -> None:
    assert load_any_config(name) == load_any_config(same)


def test_the_base_learners_backbone_is_a_part_too() -> None:
    config = load_config("pascal+resnet50+baseline+svf+base_learner_init", ["method.base_learner=x.pt"])
    assert config.method.takes_base_learner


def test_own_files_lie_on_top_of_parts_and_of_each_other(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "small.yaml").write_text("data: {size: 97, batch: 2}\nschedule: {patience: 3}\n")
    (tmp_path / "run.yaml").write_text(
        "compose: [pascal, vgg16, pfenet, full_layer_4, lab/small.yaml]\ndata:\n  batch: 3\n  root: here\n"
    )
    config = load_config(tmp_path / "run.yaml", ["data.fold=2"])
    assert (config.data.size, config.data.batch, config.data.root, config.data.fold) == (97, 3, "here", 2)
    assert (config.schedule.patience, config.schedule.epochs, config.tuning.stages) == (3, 200, ("layer4",))
    joined = load_config(f"coco_bam_vgg16+{tmp_path / 'lab' / 'small.yaml'}+frozen")
    assert (joined.data.size, joined.data.folds, joined.tuning.strategy) == (97, "coco", "freeze")


def test_a_file_whose_name_holds_a_plus_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a+b.yaml").write_text("compose: [any_folder, vgg16, baseline, svf]\n")
    assert load_config(tmp_path / "a+b.yaml").backbone.architecture == "vgg16"


def test_a_part_is_not_hidden_by_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("svf").write_text("tuning: {strategy: freeze}\n")
    assert load_config("pascal+resnet50+baseline+svf").tuning.strategy == "svf"
    assert load_config("pascal+resnet50+baseline+./svf").tuning.strategy == "freeze"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a": "compose: [svff]"}, "a.yaml composes 'svff', which is no part and no file: did you mean svf?"),
        (
            {"a": "compose: [missing.yaml]"},
            "a.yaml composes 'missing.yaml', which is no part and no file: svf-fast config",
        ),
        ({"a": "compose: svf"}, "a.yaml: compose is 'svf', expected a list of names of parts and files"),
        ({"a": "compose: [1]"}, "a.yaml: compose is [1], expected a list of names of parts and files"),
        ({"a": "compose: [a.yaml]"}, "a.yaml composes {folder}/a.yaml"),
        (
            {"a": "compose: [b.yaml]", "b": "compose: [pascal, a.yaml]"},
            "a.yaml composes {folder}/b.yaml composes {folder}/a",
        ),
        ({"a": "compose: [b.yaml]", "b": "just text"}, "b.yaml holds no sections, but 'just text'"),
        ({"a": "compose: [b.yaml]", "b": ""}, "b.yaml holds no sections"),
        ({"a": "compose: [b.yaml]", "b": "data: ["}, "b.yaml is not readable as YAML"),
        ({"a": "compose: [b.yaml]", "b": "tuning: {stratgy: svf}"}, "b.yaml: unknown key tuning.stratgy: did you mean"),
        (
            {"a": "compose: [b.yaml]", "b": "data: {size: big}"},
            "b.yaml: data.size is 'big' (str), expected a whole number",
        ),
        ({"a": "compose: [b.yaml]", "b": "data: 5"}, "b.yaml: data is 5 (int), expected keys with values"),
        (
            {"a": "compose: [any_folder, vgg16, baseline, svf]\ndata: {size: 162}"},
            "data.size is 162, expected a multiple",
        ),
    ],
)
def test_a_wrong_composition_gets_one_sentence_that_names_the_file(
    tmp_path: Path, files: dict[str, str], sentence: str
) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises((ConfigError, FileNotFoundError)) as raised:
        load_config(tmp_path / "a.yaml")
    assert sentence.format(folder=tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_composes_itself_by_a_detour_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text("compose: [../sub/a.yaml]")
    with pytest.raises(ConfigError, match="a configuration composes itself"):
        load_config(tmp_path / "sub" / "a.yaml")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pascal+resnet50+baselin+svf", "there is no configuration part 'baselin': did you mean baseline?"),
        ("pascal++svf", "there is no configuration part '': svf-fast config lists them"),
        ("pascal+resnet50+baseline+pfenet+svf", "method.shot_reduction is 'mean', but name is 'pfenet'"),
        ("pascal+resnet50+base_learner", "is a configuration for svf-fast train-base: its method.name is 'pspnet'"),
        ("svf", "schedule.iterations is not set: give it, or epochs"),
    ],
)
def test_names_that_do_not_go_together_get_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises((ConfigError, FileNotFoundError)) as raised:
        load_config(name)
    assert sentence in str(raised.value)


def test_what_only_few_shot_runs_have_is_refused_in_a_base_learner_with_its_place() -> None:
    with pytest.raises(ConfigError, match=re.escape("five_shot (in configs/parts/data.yaml): unknown key data.shots")):
        load_base_config("pascal+resnet50+base_learner+five_shot")


def test_layers_are_told_in_order() -> None:
    assert [layer.origin.split()[0] for layer in layers_of("coco+svf_u")] == [
        "pascal",
        "coco",
        "fine_tuned",
        "svf",
        "svf_u",
    ]


@pytest.mark.parametrize("name", ["pascal+resnet50+pfenet+rotated_frozen", "coco_base_vgg16"])
def test_the_command_prints_a_configuration_that_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["config", name, "data.fold=3"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_any_config(tmp_path / "printed.yaml") == load_any_config(name, ["data.fold=3"])
    assert yaml.safe_load((tmp_path / "printed.yaml").read_text())["data"]["fold"] == 3


def test_the_command_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    for name in (*shipped_configs(), *shipped_parts()):
        assert re.search(rf"^  {name} +\S", printed, flags=re.MULTILINE)
    assert main(["config", "data.fold=3"]) == 2
    assert "data.fold=3 is of no use without a configuration" in capsys.readouterr().err


def test_no_part_has_the_name_of_a_whole_configuration() -> None:
    assert not set(shipped_parts()) & set(shipped_configs())
