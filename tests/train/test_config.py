"""Configurations: what is accepted, and the sentence that everything else gets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from svf_fast.train.config import ConfigError, DataConfig, config_from_plain, load_config, shipped_configs


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_config_survives_plain_data_and_yaml(name: str) -> None:
    config = load_config(name)
    assert config_from_plain(yaml.safe_load(yaml.safe_dump(config.to_plain()))) == config


def test_the_papers_setting_is_the_documented_one() -> None:
    config = load_config("pascal_baseline_resnet50")
    assert (config.data.size, config.data.batch, config.schedule.epochs, config.run.seed) == (473, 8, 200, 321)
    assert (config.optimiser.base_lr, config.optimiser.svf_lr_scale) == (0.015, 0.1)
    assert (config.optimiser.momentum, config.optimiser.weight_decay) == (0.9, 1e-4)
    assert (config.schedule.name, config.schedule.patience, config.validation.episodes) == ("cosine", 75, 1000)


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
        ("quite_another", "shipped ones are pascal_baseline_resnet50, voc_folder"),
    ],
)
def test_a_missing_config_is_told_with_what_there_is(name: str, hint: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"no configuration file {name}, and no shipped one of that name: {hint}")
    ):
        load_config(name)
