"""Configurations: what is accepted, and the sentence that everything else gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from svf_fast.train.config import (
    BaseConfig,
    ConfigError,
    DataConfig,
    config_from_plain,
    load_base_config,
    load_config,
)

BASE = "pascal_base_resnet50"


@pytest.mark.parametrize("name", ["voc_folder", "pascal_bam_resnet50", "coco_pfenet_vgg16"])
def test_a_config_survives_plain_data_and_yaml(name: str) -> None:
    config = load_config(name)
    assert config_from_plain(yaml.safe_load(yaml.safe_dump(config.to_plain()))) == config


def test_the_base_learners_config_survives_plain_data_and_yaml() -> None:
    config = load_base_config(BASE)
    assert config_from_plain(yaml.safe_load(yaml.safe_dump(config.to_plain())), (), BaseConfig) == config


def test_the_papers_setting_is_the_documented_one() -> None:
    config = load_config("pascal_baseline_resnet50")
    assert (config.data.size, config.data.batch, config.schedule.epochs, config.run.seed) == (473, 8, 200, 321)
    assert (config.optimiser.base_lr, config.optimiser.svf_lr_scale) == (0.015, 0.1)
    assert (config.optimiser.momentum, config.optimiser.weight_decay) == (0.9, 1e-4)
    assert (config.schedule.name, config.schedule.patience, config.validation.episodes) == ("cosine", 75, 1000)


def test_the_base_learners_rates_are_those_of_bams_code() -> None:
    config = load_base_config(BASE)
    sgd = config.optimiser
    assert sgd.base_lr * sgd.lr_scale == pytest.approx(2.5e-3)
    assert sgd.base_lr * sgd.lr_scale * sgd.backbone_lr_scale == pytest.approx(2.5e-4)
    assert (config.data.size, config.data.batch, config.data.scale_range) == (417, 12, (0.5, 2.0))
    assert (config.schedule.name, config.schedule.epochs, config.schedule.patience) == ("poly", 100, 75)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("tuning.strategy=full", "tuning", "strategy", "full"),
        ("data.root=1234", "data", "root", "1234"),
        ("data.root=a=b", "data", "root", "a=b"),
        ("data.drop_novel_images=false", "data", "drop_novel_images", False),
        ("optimiser.base_lr=1e-3", "optimiser", "base_lr", 0.001),
        ("optimiser.base_lr=1", "optimiser", "base_lr", 1.0),
        ("backbone.blocks=1,2,3,4", "backbone", "blocks", (1, 2, 3, 4)),
        ("backbone.blocks=[1, 2, 3]", "backbone", "blocks", (1, 2, 3)),
        ("data.scale_range=0.8,1.25", "data", "scale_range", (0.8, 1.25)),
        ("backbone.weights=null", "backbone", "weights", None),
        ("schedule.patience=5", "schedule", "patience", 5),
        ("validation.shots=5", "validation", "shots", 5),
        ("method.base_learner=null", "method", "base_learner", None),
    ],
)
def test_an_override_takes_the_type_of_its_key(override: str, section: str, key: str, value: object) -> None:
    found = getattr(getattr(load_config("voc_folder", [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_and_the_file_stays_as_it_is() -> None:
    before = load_config("voc_folder")
    assert load_config("voc_folder", ["data.size=97", "data.size=33"]).data.size == 33
    assert load_config("voc_folder") == before


def test_a_run_counted_in_steps_can_be_counted_in_epochs() -> None:
    schedule = load_config("voc_folder", ["schedule.iterations=null", "schedule.epochs=3"]).schedule
    assert (schedule.iterations, schedule.epochs) == (None, 3)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tuning.stratgy=svf", "unknown key tuning.stratgy: did you mean tuning.strategy?"),
        ("strategy=svf", "unknown key strategy: did you mean tuning.strategy?"),
        ("optimizer.momentum=0.5", "unknown key optimizer.momentum: did you mean optimiser.momentum?"),
        ("tuning=svf", "tuning is a section, not a key: it has tuning.strategy, tuning.save"),
        ("backbone", "'backbone' is not key=value"),
        ("tuning.strategy=svd", "tuning.strategy is 'svd', expected one of 'freeze', 'full', 'svf'"),
        ("data.size=big", "data.size is 'big' (str), expected a whole number"),
        ("data.size=160.0", "data.size is '160.0' (str), expected a whole number"),
        ("data.size=160", "data.size is 160, expected a multiple of 8 plus 1, such as 161 or 473"),
        ("data.fold=4", "data.fold is 4, expected 0 to 3"),
        ("data.folds=voc", "data.folds is 'voc', expected pascal, coco, coco_contiguous, or a .json file of own folds"),
        ("data.base_filter=true", "unknown key data.base_filter"),
        ("validation.episodes=1000001", "validation.episodes is 1000001, expected 1 to 1,000,000"),
        ("data.scale_range=1.2,0.8", "data.scale_range is (1.2, 0.8), expected two numbers above 0, the smaller first"),
        ("data.scale_range=1", "data.scale_range has 1 values, expected 2"),
        ("data.drop_novel_images=1", "data.drop_novel_images is 1 (int), expected true or false"),
        ("backbone.blocks=3", "backbone.blocks is (3,), expected at least 3 whole numbers above 0"),
        ("backbone.blocks=a,b,c", "backbone.blocks is 'a' (str), expected a whole number"),
        ("backbone.depth=5", "backbone.depth is 5, expected one of 3, 4"),
        ("optimiser.base_lr=fast", "optimiser.base_lr is 'fast' (str), expected a number"),
        ("optimiser.base_lr=nan", "optimiser.base_lr is nan, expected a number, 0 or more"),
        ("optimiser.momentum=1", "optimiser.momentum is 1.0, expected at least 0 and below 1"),
        ("schedule.epochs=3", "schedule.iterations is set, and so is epochs: leave one out"),
        ("schedule.iterations=null", "schedule.iterations is not set: give it, or epochs"),
        ("schedule.iterations=0", "schedule.iterations is 0, expected more than 0"),
        ("validation.shots=0", "validation.shots is 0, expected 1 or more, or null"),
        ("run.device=tpu", "run.device is 'tpu', expected auto, cpu, cuda or cuda:N"),
        ("method.prior_layer=layer4", "method.prior_layer is 'layer4', but backbone.depth=3 has none"),
    ],
)
def test_a_wrong_override_gets_one_sentence_that_names_the_key(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("voc_folder", [override])
    assert str(raised.value).startswith(sentence)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method.bins=4,2"], "method.bins is (4.0, 2.0), but name is 'baseline': only pfenet has it"),
        (["method.kshot_trans_dim=0"], "method.kshot_trans_dim is 0, but name is 'baseline': only bam has it"),
        (
            ["method.name=pfenet", "method.shot_reduction=sum"],
            "method.shot_reduction is 'sum', but name is 'pfenet': only baseline has it",
        ),
        (
            ["method.name=bam", "method.backbone_init=base_learner"],
            "method.backbone_init is 'base_learner', but name is 'bam': only baseline and pfenet have it",
        ),
        (["method.name=pfenet", "method.bins=0"], "method.bins is (0.0,), expected one or more sides above 1"),
        (["method.name=pfenet", "method.bins=2.5"], "method.bins is (2.5,), expected one or more sides above 1"),
        (["method.name=pfenet", "method.bins=[]"], "method.bins is (), expected one or more sides above 1"),
        (["method.name=bam", "method.kshot_trans_dim=-1"], "method.kshot_trans_dim is -1, expected 0 or more"),
        (["method.bn_mode=train", "method.recompute=stages"], "method.recompute is 'stages' with bn_mode 'train'"),
        (["method.backbone_init=base_learner"], "method.base_learner is not set, but backbone_init is 'base_learner'"),
        (["method.base_learner=x.pt"], "method.base_learner is set, but baseline starts from backbone.weights"),
        (
            ["method.name=bam", "method.base_learner=x.pt", "backbone.weights=y.pt"],
            "backbone.weights is set, but the backbone comes from method.base_learner: leave one out",
        ),
        (
            ["method.name=bam", "validation.shots=5"],
            "validation.shots is 5, expected 1 as in data.shots: BAM learns one weight a shot",
        ),
        (["method.name=pspnet"], "method.name is 'pspnet', expected one of 'baseline', 'pfenet', 'bam'"),
    ],
)
def test_a_combination_that_makes_no_sense_gets_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("voc_folder", overrides)
    assert str(raised.value).startswith(sentence)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.batch=1", "data.batch is 1, expected 2 or more"),
        ("data.shots=5", "unknown key data.shots"),
        ("data.crop_keep=all", "data.crop_keep is 'all', expected one of 'ref', 'any'"),
        ("method.name=bam", "method.name is 'bam', expected one of 'pspnet'"),
        ("tuning.strategy=svf", "unknown key tuning.strategy"),
    ],
)
def test_a_wrong_override_of_a_base_learner_gets_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load_base_config(BASE, [override])


def test_each_stage_takes_its_own_configurations() -> None:
    with pytest.raises(ConfigError, match=r"is a configuration for svf-fast train: its method\.name is 'baseline'"):
        load_base_config("pascal_baseline_resnet50")
    with pytest.raises(ConfigError, match=r"is a configuration for svf-fast train-base: its method\.name is 'pspnet'"):
        load_config(BASE)


def test_what_only_svf_has_is_refused_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"tuning\.save is 'int8', but strategy is 'freeze'"):
        load_config("voc_folder", ["tuning.save=int8", "tuning.strategy=freeze"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no sections"),
        ("- a\n- b", "holds no sections"),
        ("data: [", "is not readable as YAML"),
        ("data: !!python/object/apply:os.getcwd []", "is not readable as YAML"),
        ("schedul: {}", "unknown key schedul: did you mean schedule?"),
        ("schedule: {iterations: 5, epoch: 1}", "unknown key schedule.epoch: did you mean schedule.epochs?"),
        ("schedule: 5", "schedule is 5 (int), expected keys with values"),
        ("schedule: {iterations: 5}", "validation.every_iterations is not set: give it, or every_epochs"),
        ("schedule: {iterations: true}", "schedule.iterations is True (bool), expected a whole number"),
    ],
)
def test_a_wrong_file_gets_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_empty_section_holds_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("schedule: {iterations: 5}\nvalidation: {every_iterations: 5}\ndata:\n")
    assert load_config(path).data == DataConfig()


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("schedule: {iterations: 5}\nvalidation: {every_iterations: 5}\noptimiser: {base_lr: 1e-4}\n")
    assert load_config(path).optimiser.base_lr == 1e-4


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("voc_foldr", "did you mean voc_folder?"),
        ("quite_another", "svf-fast config lists them"),
    ],
)
def test_a_missing_config_is_told_with_what_there_is(name: str, hint: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"no configuration file {name}, and no shipped one of that name: {hint}")
    ):
        load_config(name)
