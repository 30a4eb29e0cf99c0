"""From rows to runs: what is one run, what it needs, which keys it sets, what it costs, and arguments that are refused."""

import re
from pathlib import Path

import pytest
import torch

from svf_fast.train.backbones import BackboneConfig, build_backbone
from svf_fast.train.composition import shipped_parts
from svf_fast.train.config import BaseConfig, Config, ConfigError, load_base_config, load_config
from svf_fast.train.reproduce import estimate
from svf_fast.train.reproduce.assignments import Assignments
from svf_fast.train.reproduce.manifest import FOLDS, paper
from svf_fast.train.reproduce.quotation import Quotation
from svf_fast.train.reproduce.resolve import Case, PlannedRun, Planner
from svf_fast.train.reproduce.scale import Dataset

DATASETS = ("paper", "shapes5i", "voc_folder")
FIRST = Case(shots=1, fold=0, seed=321)


def planner(tmp_path: Path, dataset: str = "paper", *arguments: str) -> Planner:
    named = f"voc_folder:{tmp_path}" if dataset == "voc_folder" else dataset
    return Planner(Dataset.read(named), tmp_path / "out", Assignments(arguments, shipped_parts()))


def planned(tmp_path: Path, parts: str, *arguments: str, dataset: str = "paper", case: Case = FIRST) -> PlannedRun:
    return planner(tmp_path, dataset, *arguments).few_shot("pascal", parts.split("+"), case)


def plan_everything(planner: Planner, folds: tuple[int, ...] = FOLDS) -> dict[str, PlannedRun]:
    for table in paper().tables.values():
        for row in table.rows.values():
            for shots in table.shots if row.parts else ():
                for fold in folds:
                    planner.few_shot(table.data, row.parts, Case(shots, fold, 321))
    for figure in paper().figures.values():
        for parts in figure.runs.values():
            planner.few_shot(figure.data, parts, FIRST, has_curves=figure.has_curves)
    return planner.plan.runs


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_run_is_a_composition_and_documented_keys(tmp_path: Path, dataset: str) -> None:
    runs = plan_everything(planner(tmp_path, dataset), folds=(3,))
    for run in runs.values():
        load = load_base_config if isinstance(run.config, BaseConfig) else load_config
        places = [f"run.dir={run.folder}"]
        if run.config.backbone.weights is not None:
            places.append(f"backbone.weights={run.config.backbone.weights}")
        if isinstance(run.config, Config) and run.config.method.base_learner is not None:
            places.append(f"method.base_learner={run.config.method.base_learner}")
        assert load(run.composition, [*run.changed, *places]) == run.config
        assert all(need in runs or need in run.needs for need in run.needs)


def test_the_paper_is_so_many_runs(tmp_path: Path) -> None:
    runs = plan_everything(planner(tmp_path)).values()
    base_learners = [run for run in runs if isinstance(run.config, BaseConfig)]
    # two backbones on two data sets, four folds
    assert len(base_learners) == 16
    # 18 and 12 rows with two numbers of shots, 24 more of tables 4 to 10, all of four folds; 7 with curves
    assert len(runs) - len(base_learners) == (2 * 18 + 2 * 12 + 24) * 4 + 7


def test_rows_of_several_tables_share_their_run(tmp_path: Path) -> None:
    one = planner(tmp_path)
    names = {
        one.few_shot("pascal", paper().tables[number].rows["svf"].parts, FIRST).name for number in ("4", "5", "7", "10")
    }
    assert names == {one.few_shot("pascal", paper().tables["1"].rows["resnet50-baseline-svf"].parts, FIRST).name}
    assert len(one.plan.runs) == 1


def test_bams_rows_share_the_base_learner_of_their_fold(tmp_path: Path) -> None:
    one = planner(tmp_path)
    cases = [Case(1, 0, 321), Case(5, 0, 321), Case(1, 1, 321), Case(1, 0, 7)]
    svf = [one.few_shot("pascal", ("resnet50", "bam", "svf"), case) for case in cases]
    frozen = one.few_shot("pascal", ("resnet50", "bam", "frozen", "no_trick"), cases[0])
    assert svf[0].needs == svf[1].needs == frozen.needs
    assert len({run.needs for run in svf}) == 3
    base = one.plan.runs[svf[0].needs[0]]
    assert svf[0].config.method.base_learner == str(base.folder / "best.pt")  # type: ignore[union-attr]
    assert base.composition == "pascal+resnet50+base_learner"
    assert (
        one.few_shot("coco", ("vgg16", "bam", "svf"), FIRST).needs[0].startswith("coco-vgg16-base_learner_coco-fold0")
    )


def test_the_other_reading_of_the_backbone_needs_a_base_learner_too(tmp_path: Path) -> None:
    run = planned(tmp_path, "resnet50+pfenet+svf", "method.backbone_init=base_learner", "backbone.weights=w.pth")
    assert run.needs[0].startswith("pascal-resnet50-base_learner-fold0")
    assert run.config.backbone.weights is None


def test_a_base_learner_of_ones_own_is_taken_by_fold(tmp_path: Path) -> None:
    own = planner(tmp_path, "paper", "bam.method.base_learner=base{fold}.pth")
    runs = [own.few_shot("pascal", ("resnet50", "bam", "svf"), Case(1, fold, 321)) for fold in (0, 3)]
    assert [run.config.method.base_learner for run in runs] == ["base0.pth", "base3.pth"]  # type: ignore[union-attr]
    assert [run.needs for run in runs] == [(), ()]


@pytest.mark.parametrize(
    "arguments",
    [["data.root=elsewhere"], ["run.device=cuda:1"], ["run.threads=3"], ["data.workers=7"], ["run.checkpoint_every=5"]],
)
def test_places_and_speed_do_not_make_another_run(tmp_path: Path, arguments: list[str]) -> None:
    assert (
        planned(tmp_path, "resnet50+baseline+svf", *arguments).name == planned(tmp_path, "resnet50+baseline+svf").name
    )


@pytest.mark.parametrize("argument", ["data.size=241", "backbone.weights=other.pth", "svf.optimiser.svf_lr_scale=3"])
def test_what_decides_the_result_does(tmp_path: Path, argument: str) -> None:
    assert planned(tmp_path, "resnet50+baseline+svf", argument).name != planned(tmp_path, "resnet50+baseline+svf").name


def test_a_key_at_its_default_does_not_make_another_run(tmp_path: Path) -> None:
    defaults = ("run.precision=float32", "backbone.width=64", "method.recompute=none")
    assert planned(tmp_path, "resnet50+baseline+svf", *defaults).name == planned(tmp_path, "resnet50+baseline+svf").name


def test_arguments_reach_the_runs_that_have_their_key(tmp_path: Path) -> None:
    arguments = [
        "method.bins=1,0.5",
        "data.root=both",
        "data.batch=4",
        "base.data.batch=6",
        "vgg16.backbone.weights=vgg.pth",
        "resnet50.backbone.weights=resnet.pth",
    ]
    one = planner(tmp_path, "paper", *arguments)
    bam = one.few_shot("pascal", ("vgg16", "bam", "svf"), FIRST)
    pfenet = one.few_shot("pascal", ("resnet50", "pfenet", "svf"), FIRST)
    base = one.plan.runs[bam.needs[0]].config
    assert (bam.config.data.batch, pfenet.config.data.batch, base.data.batch) == (4, 4, 6)
    assert bam.config.data.root == base.data.root == "both"
    assert (bam.config.method.bins, pfenet.config.method.bins) == (None, (1.0, 0.5))  # type: ignore[union-attr]
    weights = [config.backbone.weights for config in (bam.config, base, pfenet.config)]
    assert weights == [None, "vgg.pth", "resnet.pth"]
    one.assignments.require_all_taken()


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("optimiser.base_lrr=1", "unknown key optimiser.base_lrr: did you mean optimiser.base_lr?"),
        ("svff.data.batch=1", "unknown key svff.data.batch: did you mean data.batch?"),
        ("base.data.bach=1", "unknown key base.data.bach: did you mean data.batch?"),
        ("data.fold=1", "data.fold is what --folds says: use that"),
        ("base.run.seed=1", "base.run.seed is what --seeds says: use that"),
        ("data.batch=none", "data.batch is 'none' (str), expected a whole number"),
        ("method.bins=1", "method.bins=1: none of the runs asked for has this key"),
        ("pfenet.data.batch=1", "pfenet.data.batch=1: none of the runs asked for has this key"),
    ],
)
def test_an_argument_that_is_of_no_use_is_refused(tmp_path: Path, argument: str, sentence: str) -> None:
    def ask() -> None:
        one = planner(tmp_path, "paper", argument)
        one.few_shot("pascal", ("resnet50", "baseline", "svf"), FIRST)
        one.assignments.require_all_taken()

    with pytest.raises(ConfigError, match=re.escape(sentence)):
        ask()


def test_shapes_runs_of_a_fold_share_one_backbone(tmp_path: Path) -> None:
    one = planner(tmp_path, "shapes5i")
    needs = [
        one.few_shot("coco", (backbone, "baseline", recipe), Case(1, fold, 321)).needs
        for backbone, recipe, fold in (
            ("resnet50", "svf", 0),
            ("resnet50", "full", 0),
            ("resnet50", "svf", 1),
            ("vgg16", "svf", 0),
        )
    ]
    assert needs[0] == needs[1]
    assert len(set(needs)) == len(one.plan.pretrainings) == 3
    assert all(weights.weights.startswith(str(tmp_path)) for weights in one.plan.pretrainings.values())


def test_a_folder_of_photographs_has_the_settings_of_its_configuration_under_the_rows_recipe(tmp_path: Path) -> None:
    shipped = load_config("voc_folder")
    run = planned(tmp_path, "resnet50+baseline+full_layers_3_4", dataset="voc_folder").config
    assert isinstance(run, Config)
    assert (run.data.size, run.backbone, run.schedule) == (shipped.data.size, shipped.backbone, shipped.schedule)
    assert (run.optimiser, run.validation) == (shipped.optimiser, shipped.validation)
    assert run.data.root == str(tmp_path)
    assert (run.tuning.strategy, run.tuning.stages) == ("full", ("layer3", "layer4"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("shapes5", "did you mean shapes5i?"), ("voc_folder", "expected voc_folder:PATH"), ("paper:x", "expected paper")],
)
def test_a_data_set_that_is_none_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Dataset.read(text)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Dataset.read(f"voc_folder:{tmp_path / 'gone'}")


# --- what it costs


def test_the_rate_rests_on_the_flops_of_the_step_that_was_measured() -> None:
    """Layers 2-4 of ResNet-50, 473×473, batch 8, in the two products a convolution that the measured step had."""
    import svf_fast

    with torch.device("meta"):
        stages = torch.nn.Sequential(*(build_backbone(BackboneConfig()).stage(f"layer{i}") for i in (2, 3, 4))).eval()
        svf_fast.convert(stages, ["0", "1", "2"])
        features = torch.empty(8, 256, 119, 119)
        with estimate._counter() as counter:
            stages(features.requires_grad_(True)).sum().backward()
    assert counter.get_total_flops() == pytest.approx(estimate._STEP_TFLOP * 1e12, rel=0.01)


def test_costs_are_in_the_order_of_what_trains(tmp_path: Path) -> None:
    rows = ("frozen", "svf", "full", "svf_usv")
    small = ("data.size=105", "backbone.width=16", "backbone.blocks=2,2,2,1")
    costs = [estimate.cost(planned(tmp_path, f"resnet50+baseline+{row}", *small).config) for row in rows]
    assert {cost.steps for cost in costs} == {105_200}  # 200 epochs of 4,208 pictures in batches of 8
    hours = [cost.gpu_hours or 0.0 for cost in costs]
    memory = [cost.memory_bytes for cost in costs]
    assert 0 < hours[0] < hours[1] < hours[2] < hours[3]
    assert estimate.ALLOWANCE_BYTES < memory[0] < memory[1] < memory[2] < memory[3]


def test_half_the_batch_at_a_time_needs_less_memory(tmp_path: Path) -> None:
    small = ("data.size=105", "backbone.width=16", "backbone.blocks=2,2,2,1")
    whole, parts = (
        estimate.cost(planned(tmp_path, "resnet50+baseline+svf", *small, argument).config).memory_bytes
        - estimate.ALLOWANCE_BYTES
        for argument in ("run.accumulate=1", "run.accumulate=2")
    )
    assert 0.4 < parts / whole < 0.8


def test_epochs_are_as_long_as_the_fields_lists(tmp_path: Path) -> None:
    pictures = [
        estimate.training_pictures(planned(tmp_path, parts, case=Case(1, 2, 321)).config)
        for parts in ("resnet50+baseline+svf", "resnet50+baseline+svf+no_trick")
    ]
    assert pictures == [2752, 4097]
    base = planner(tmp_path).base_learner("pascal", ("resnet50",), FIRST).config
    assert estimate.training_steps(base) == 100 * (5953 // 12)
    folder = planned(
        tmp_path, "resnet50+baseline+svf", "schedule.epochs=2", "schedule.iterations=null", dataset="voc_folder"
    )
    assert estimate.training_steps(folder.config) is None


def test_a_row_whose_layer_the_backbone_does_not_have_does_not_apply(tmp_path: Path) -> None:
    one = planner(tmp_path, "voc_folder", "backbone.width=4", "data.size=33")
    layer_4 = one.few_shot("pascal", ("resnet50", "baseline", "full_layer_4"), FIRST)
    layers_3_4 = one.few_shot("pascal", ("resnet50", "baseline", "full_layers_3_4"), FIRST)
    quotation = Quotation(one.plan)
    assert "the method's backbone ends with layer3" in str(quotation.obstacle(layer_4.name))
    assert quotation.obstacle(layers_3_4.name) is None
    told = quotation.text(in_full=True)
    assert "does not apply: stages is ('layer4',)" in told
    assert "1 runs, 1 of them not finished, and 1 that do not apply" in told
    assert "400 steps, under 0.01 GPU hours" in told


def test_a_part_reaches_the_rows_that_are_composed_of_it_by_way_of_others(tmp_path: Path) -> None:
    argument = "svf.optimiser.svf_lr_scale=50"
    scales = {
        parts: planned(tmp_path, f"resnet50+baseline+{parts}", argument).config.to_plain()["optimiser"]["svf_lr_scale"]
        for parts in ("svf", "svf_u", "svf_layer_4", "bn_svf", "full", "frozen")
    }
    assert scales == {"svf": 50, "svf_u": 50, "svf_layer_4": 50, "bn_svf": 50, "full": 0.1, "frozen": 0.1}


def test_what_a_run_on_a_base_learner_is_said_to_change_is_what_it_has(tmp_path: Path) -> None:
    run = planned(tmp_path, "resnet50+bam+svf", "backbone.weights=/weights.pth")
    changed = dict(text.split("=", 1) for text in run.changed)
    assert "backbone.weights" not in changed
    assert changed["method.base_learner"] == str(run.config.to_plain()["method"]["base_learner"])


def test_memory_holds_what_a_forward_needs_at_one_time(tmp_path: Path) -> None:
    """One map of VGG-16's first convolution, of 8 queries with 5 supports each, all supports at once."""
    found = estimate.cost(planned(tmp_path, "vgg16+baseline+frozen", case=Case(5, 0, 321)).config)
    assert found.memory_bytes > 8 * 5 * 64 * 473 * 473 * 4
