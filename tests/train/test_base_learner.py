"""BAM's two stages on a small Shapes-5i, as a user runs them: the base learner, then the ensemble from its checkpoint;
scores, interruptions, and the one line that every mistake gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_fakes import stop_after

from svf_fast.train.backbones import build_backbone, load_backbone_weights
from svf_fast.train.base_learner import base_learner_state
from svf_fast.train.checkpoint import load_checkpoint
from svf_fast.train.cli import main
from svf_fast.train.config import BaseConfig, config_from_plain
from svf_fast.train.data.folds import fold_of
from svf_fast.train.data.shapes5i import generate
from svf_fast.train.journal import read_journal

MODEL = (
    "data.size=49",
    "data.workers=0",
    "backbone.stem=plain",
    "backbone.blocks=1,1,1,1",
    "backbone.width=4",
    "run.threads=1",
    "run.checkpoint_every=2",
    "schedule.epochs=null",
    "validation.every_epochs=null",
)
FIRST = (*MODEL, "data.batch=4", "schedule.iterations=6", "validation.every_iterations=3")
SECOND = (
    *MODEL,
    "data.batch=2",
    "method.head_width=8",
    "schedule.iterations=4",
    "validation.every_iterations=2",
    "validation.episodes=5",
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures, and a list of all of them beside those of each part."""
    root = generate(tmp_path_factory.mktemp("data") / "shapes", seed=0, images=120, size=160)
    lists = root / "lists"
    (lists / "all.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    return root


def first_stage(shapes: Path, folder: Path, *more: str) -> list[str]:
    return ["train-base", "pascal_base_resnet50", f"data.root={shapes}", f"run.dir={folder}", *FIRST, *more]


def second_stage(shapes: Path, folder: Path, *more: str, name: str = "bam") -> list[str]:
    return ["train", f"pascal_{name}_resnet50", f"data.root={shapes}", f"run.dir={folder}", *SECOND, *more]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "base"
    assert main(first_stage(shapes, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, shapes: Path, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "bam"
    assert main(second_stage(shapes, folder, f"method.base_learner={base / 'best.pt'}")) == 0
    return folder


def require_same_run(folder: Path, expected: Path) -> None:
    for name in ("last.pt", "best.pt"):
        found, wanted = load_checkpoint(folder / name), load_checkpoint(expected / name)
        assert found.state == wanted.state
        assert found.method.keys() == wanted.method.keys()
        assert all(torch.equal(found.method[key], tensor) for key, tensor in wanted.method.items())


def test_the_base_learner_is_told_and_saved_with_its_backbone_once(base: Path) -> None:
    assert sorted(path.name for path in base.iterdir()) == ["best.pt", "config.yaml", "last.pt", "log.jsonl"]
    lines = read_journal(base / "log.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["parts"] == {"main": line["loss"]} for line in steps)
    assert steps[0]["rates"]["head"] == pytest.approx(10 * steps[0]["rates"]["backbone"])
    assert steps[0]["rates"]["head"] == pytest.approx(2.5e-3 * (5 / 6) ** 0.9)
    assert steps[-1]["rates"] == {"head": 0.0, "backbone": 0.0}
    validations = [line for line in lines if line["kind"] == "validation"]
    assert [line["iteration"] for line in validations] == [3, 6]
    assert len(validations[0]["class_iou"]) == 15
    assert validations[0]["pictures"] == 24
    state = load_checkpoint(base / "last.pt").method
    assert {key.split(".")[0] for key in state} == {*(f"layer{number}" for number in range(5)), "ppm", "cls"}
    assert state["cls.4.weight"].shape == (16, 512, 1, 1)
    # everything trained, and BatchNorm followed the batches
    assert lines[0]["parameters"] == sum(lines[0]["trainable"].values())
    assert state["layer0.1.num_batches_tracked"] == 6


def test_a_base_learner_stopped_or_killed_is_resumed_to_the_same_bits(
    tmp_path: Path, shapes: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 3)
    assert main(first_stage(shapes, tmp_path / "base")) == 1
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "base" / "last.pt").state.iteration == 3
    assert main(first_stage(shapes, tmp_path / "base", "--resume", "data.workers=1")) == 0
    require_same_run(tmp_path / "base", base)


@pytest.mark.parametrize("strategy", ["freeze", "svf"])
@pytest.mark.parametrize("checkpoint", ["best.pt", "last.pt"])
def test_bam_starts_from_either_checkpoint_and_is_evaluated(
    tmp_path: Path, shapes: Path, base: Path, capsys: pytest.CaptureFixture[str], strategy: str, checkpoint: str
) -> None:
    folder = tmp_path / "bam"
    chosen = [f"method.base_learner={base / checkpoint}", f"tuning.strategy={strategy}"]
    assert main(second_stage(shapes, folder, *chosen)) == 0
    assert "starts from random weights" not in capsys.readouterr().out
    lines = read_journal(folder / "log.jsonl")
    first, *_ = (line for line in lines if line["kind"] == "step")
    assert set(first["parts"]) == {"main", "aux1", "aux2"}
    assert first["loss"] == pytest.approx(sum(first["parts"].values()))
    learnt, begun = load_checkpoint(base / checkpoint).method, load_checkpoint(folder / "last.pt").method
    assert torch.equal(begun["learner_base.1.4.weight"], learnt["cls.4.weight"])
    assert torch.equal(begun["layer1.0.bn1.running_mean"], learnt["layer1.0.bn1.running_mean"])
    # tuned stages have their originals beside them
    assert any(key.startswith("layer2p.") for key in begun) == (strategy == "svf")

    validation = [line for line in lines if line["kind"] == "validation"][-1]
    assert main(["eval", str(folder / "last.pt")]) == 0
    table = [line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for row, value in (
        ("mIoU", validation["miou"]),
        ("meta branch mIoU", validation["branches"]["meta_miou"]),
        ("meta branch FB-IoU", validation["branches"]["meta_fb_iou"]),
        ("base branch mIoU", validation["branches"]["base_miou"]),
    ):
        assert [row, f"{100 * value:.2f}"] in [[name.strip(), number] for name, number in table]


def test_bam_stopped_and_resumed_needs_no_base_learner_any_more(
    tmp_path: Path, shapes: Path, base: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 3)
    assert main(second_stage(shapes, tmp_path / "bam", f"method.base_learner={base / 'best.pt'}")) == 1
    monkeypatch.undo()
    assert main(second_stage(shapes, tmp_path / "bam", "--resume")) == 0
    require_same_run(tmp_path / "bam", tuned)


def test_generalised_evaluation_reports_novel_base_and_all(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for rule in (["validation.order=list"], ["--rule", "base", "--tau", "0.3"]):
        # so few pictures for validation do not show every novel class
        asked = ["--generalised", "data.val_list=lists/all.txt", "--seed", "1", "2", "--episodes", "6", *rule]
        assert main(["eval", str(tuned / "last.pt"), *asked]) == 0
        printed.append(capsys.readouterr().out)
        lines = printed[-1].splitlines()
        assert lines[0].endswith("after step 4, 6 episodes, in %")
        assert len(lines) >= 2 + 20 + 4
        assert [line[:10].strip() for line in lines[22:26]] == ["mIoU novel", "mIoU base", "mIoU all", "FB-IoU"]
    assert printed[0] != printed[1]


@pytest.mark.parametrize("name", ["baseline", "pfenet"])
def test_other_methods_take_the_base_learners_backbone(
    tmp_path: Path, shapes: Path, base: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    chosen = ["method.backbone_init=base_learner", f"method.base_learner={base / 'best.pt'}", "tuning.strategy=freeze"]
    assert main(second_stage(shapes, tmp_path / name, *chosen, name=name)) == 0
    assert "starts from random weights" not in capsys.readouterr().out
    learnt = load_checkpoint(base / "best.pt").method
    begun = load_checkpoint(tmp_path / name / "last.pt").method
    stages = [key for key in learnt if key.startswith("layer")]
    assert stages
    assert all(torch.equal(begun[key], learnt[key]) for key in stages)
    first, *_ = (line for line in read_journal(tmp_path / name / "log.jsonl") if line["kind"] == "step")
    assert set(first["parts"]) == ({"main"} if name == "baseline" else {"main", "aux"})


def test_five_shots_have_weights_of_their_own(shapes: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "pascal_bam_resnet50", *SECOND, "data.shots=5"]) == 0
    five = capsys.readouterr().out
    assert main(["summary", "pascal_bam_resnet50", *SECOND]) == 0
    one = capsys.readouterr().out

    def trainable(text: str) -> int:
        (line,) = [line for line in text.splitlines() if line.startswith("  head: ")]
        return int(line.split()[1].replace(",", ""))

    assert trainable(five) - trainable(one) == (2 * 5 + 2) + (5 * 2 + 5)


def test_weights_of_bams_code_are_a_base_learner_too(tmp_path: Path, shapes: Path, base: Path) -> None:
    """Every tensor of the backbone twice, under layer* and encoder.*, behind DataParallel's prefix."""
    state = load_checkpoint(base / "best.pt").method
    published = {f"module.{key}": tensor for key, tensor in state.items()}
    published |= {
        f"module.encoder.{key.removeprefix('layer')}": t for key, t in state.items() if key.startswith("layer")
    }
    torch.save({"epoch": 1, "state_dict": published}, tmp_path / "published.pth")
    chosen = [f"method.base_learner={tmp_path / 'published.pth'}", "tuning.strategy=freeze"]
    assert main(second_stage(shapes, tmp_path / "bam", *chosen)) == 0
    begun = load_checkpoint(tmp_path / "bam" / "last.pt").method
    assert torch.equal(begun["learner_base.0.features.3.1.weight"], state["ppm.features.3.1.weight"])
    assert torch.equal(begun["layer4.0.conv2.weight"], state["layer4.0.conv2.weight"])


def test_the_file_that_is_no_base_learner_is_named(tmp_path: Path, base: Path, tuned: Path) -> None:
    backbone = config_from_plain(load_checkpoint(base / "best.pt").config, schema=BaseConfig).backbone
    fold = fold_of("pascal", 0)
    with pytest.raises(
        ValueError, match=r"best\.pt is a base learner of the classes \[6, 7, .* 20\], expected one of \[1, 2, "
    ):
        base_learner_state(base / "best.pt", fold_of("pascal", 1), backbone)
    with pytest.raises(
        ValueError, match=r"best\.pt is a base learner with backbone\.dilation=uniform, but here it is torchvision"
    ):
        base_learner_state(base / "best.pt", fold, replace(backbone, dilation="torchvision"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*missing\.pt"):
        base_learner_state(tmp_path / "missing.pt", fold, backbone)
    with pytest.raises(ValueError, match=r"is a checkpoint of the method 'bam', expected one of svf-fast train-base"):
        base_learner_state(tuned / "last.pt", fold, backbone)
    content = torch.load(base / "best.pt", weights_only=True)
    # as older versions wrote it, which knew Pascal-5i only
    for name in ("novel", "base"):
        del content["state"][name]
    del content["config"]["data"]["folds"]
    torch.save(content, tmp_path / "old.pt")
    assert base_learner_state(tmp_path / "old.pt", fold, backbone)
    with pytest.raises(ValueError, match=r"old\.pt is a base learner of the classes \[6, 7, .* 20\], expected one of "):
        base_learner_state(tmp_path / "old.pt", fold_of("pascal", 1), backbone)
    content["method"]["cls.0.weight"][0] = torch.nan
    torch.save(content, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"nan\.pt holds values that are not finite: cls\.0\.weight$"):
        base_learner_state(tmp_path / "nan.pt", fold, backbone)
    content["config"]["method"] = None
    torch.save(content, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=r"damaged\.pt holds settings that this version does not know$"):
        base_learner_state(tmp_path / "damaged.pt", fold, backbone)
    with pytest.raises(ValueError, match=r"best\.pt is a checkpoint of svf-fast, not a weight file"):
        load_backbone_weights(build_backbone(backbone), base / "best.pt")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["train-base"], "the following arguments are required: CONFIG"),
        (["train-base", "pascal_bam_resnet50"], "is a configuration for svf-fast train: its method.name is 'bam'"),
        (["train", "pascal_base_resnet50"], "is a configuration for svf-fast train-base: its method.name is 'pspnet'"),
        (["train-base", "pascal_base_resnet50", "run.dir=out"], "data.root is not set"),
        (["train-base", "pascal_base_resnet50", "data.root={data}"], "run.dir is not set"),
        (
            ["train-base", "pascal_base_resnet50", "run.dir=out", "data.root={data}", "data.batch=999"],
            "data.batch is 999",
        ),
        (["train-base", "pascal_base_resnet50", "run.dir={base}", "data.root={data}"], "already holds a run"),
        (
            ["train-base", "pascal_base_resnet50", "run.dir={base}", "data.root={data}", "--resume"],
            "cannot be resumed with other settings",
        ),
        (
            ["train-base", "pascal_base_resnet50", "run.dir={tuned}", "data.root={data}", "--resume"],
            "last.pt is a checkpoint of a few-shot method, expected one of a base learner",
        ),
        (["eval", "{base}/best.pt"], "best.pt is a checkpoint of a base learner, expected one of a few-shot method"),
        (["eval", "{tuned}/last.pt", "--shots", "5"], "validation.shots is 5, expected 1 as in data.shots"),
        (["eval", "{tuned}/last.pt", "--tau", "0.5"], "--tau is of a generalised evaluation: add --generalised"),
        (
            ["eval", "{tuned}/last.pt", "--generalised", "validation.order=permuted"],
            "validation.order does not apply to a generalised evaluation, which follows the list's order",
        ),
        (["eval", "{tuned}/last.pt", "--generalised", "--tau", "1"], "tau is 1.0, expected at least 0 and below 1"),
        (["eval", "{tuned}/last.pt", "--generalised", "--rule", "best"], "argument --rule: invalid choice: 'best'"),
        (["eval", "{frozen}", "--generalised"], "is a model of baseline, which knows no base classes: only bam does"),
        (["train", "pascal_bam_resnet50", "run.dir=out", "data.root={data}"], "method.base_learner is not set"),
        (
            ["train", "pascal_bam_resnet50", "run.dir=out", "data.root={data}", "method.base_learner=no.pt"],
            "no checkpoint at",
        ),
        (
            [
                "train",
                "pascal_bam_resnet50",
                "run.dir=out",
                "data.root={data}",
                "method.base_learner={data}/classes.txt",
            ],
            "is not a complete PyTorch or safetensors file of tensors",
        ),
        (
            ["train", "pascal_bam_resnet50", "run.dir=out", "data.root={data}", "method.base_learner={base}/best.pt"],
            "best.pt is a base learner with backbone.stem=plain, but here it is deep: they must be one backbone",
        ),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(
    tmp_path: Path,
    shapes: Path,
    base: Path,
    tuned: Path,
    frozen: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    places = {"data": shapes, "base": base, "tuned": tuned, "frozen": frozen}
    assert main([argument.format(**places) for argument in command]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The checkpoint of a method without a base learner."""
    folder = tmp_path_factory.mktemp("runs") / "baseline"
    assert main(second_stage(shapes, folder, "tuning.strategy=freeze", name="baseline")) == 0
    return folder / "last.pt"
