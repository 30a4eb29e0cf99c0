"""The command line: ``svf-fast demo | prepare | config | train-base | train | reproduce | eval | summary``. Turns arguments into calls
and errors into one line; decides nothing else. Exit status 0 on success, 2 when the user has to change something, 1 when
a run fails or is stopped."""

import argparse
import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

import torch
import yaml
from rich.console import Console
from torch import nn

import svf_fast
from svf_fast.train.assembly import base_rates, build_model
from svf_fast.train.backbones import build_backbone
from svf_fast.train.composition import CONFIGURATIONS, shipped
from svf_fast.train.config import load_any_config, load_base_config, load_config
from svf_fast.train.distributed import PeerLost, ProcessError, launched_rank
from svf_fast.train.engine import TrainingError
from svf_fast.train.judging import Evaluation, GeneralisedEvaluation, evaluate, evaluate_generalised
from svf_fast.train.methods.bam import GeneralisedRule
from svf_fast.train.prepare.command import add_prepare
from svf_fast.train.reproduce.command import add_reproduce
from svf_fast.train.runs import train
from svf_fast.train.score_sheet import require_place, score_sheet, score_table, write_score_sheet
from svf_fast.train.two_stages import BASE_PREFIX, load_two_stages, train_two_stages
from svf_fast.train.validation import FIVE_SEEDS

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
USERS_MISTAKES = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake gets one line instead of the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # key=value may stand anywhere, also after options, which argparse's own positional arguments cannot
    overrides = [argument for argument in arguments if OVERRIDE.match(argument)]
    parser = _parser()
    try:
        options = parser.parse_args([argument for argument in arguments if not OVERRIDE.match(argument)])
        if overrides and not options.takes_overrides:
            parser.error(f"{options.command} takes no key=value arguments, found {overrides[0]}")
    except SystemExit as request:
        return int(request.code or 0)
    try:
        return int(options.run(options, overrides))
    except USERS_MISTAKES as error:
        return _fail(error, 2)
    except (TrainingError, PeerLost, ProcessError, OSError) as error:
        return _fail(error, 1)
    except (torch.OutOfMemoryError, MemoryError):
        if options.command == "prepare":
            return _fail("out of memory; fewer --workers need less, and the same command goes on from what is done", 1)
        return _fail(
            "out of memory; a smaller data.size, data.batch or validation.batch, tuning.save=int8 or recompute, or "
            "method.recompute=supports needs less; a run's last checkpoint stays, --resume goes on from it",
            1,
        )
    except KeyboardInterrupt:
        return _fail("interrupted", 1)


def _fail(error: object, status: int) -> int:
    # of several processes the first one says what they all find, or were told by one of them
    if launched_rank() == 0 or isinstance(error, ProcessError):
        print(f"svf-fast: {error}", file=sys.stderr)
    return status


def _tell(sentence: str) -> None:
    if launched_rank() == 0:
        print(sentence, flush=True)


def _parser() -> _Parser:
    parser = _Parser(prog="svf-fast", description="Singular value fine-tuning in few-shot segmentation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    shipped_ones = "a YAML file, a shipped name, or several joined with +: svf-fast config lists them"

    demo = commands.add_parser("demo", help="the embedded end-to-end run: no downloads, a CPU is enough")
    demo.add_argument("--output", metavar="DIR", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    demo.add_argument("--seed", metavar="S", type=_seed, default=321, help="default: 321")
    demo.set_defaults(run=_demo, takes_overrides=False)

    training = commands.add_parser(
        "train",
        help="one training run",
        usage="svf-fast train CONFIG [key=value ...] [--base-learner CONFIG [base.key=value ...]] [--resume]",
    )
    training.add_argument("config", metavar="CONFIG", help=shipped_ones)
    training.add_argument(
        "--base-learner",
        metavar="CONFIG",
        help="first train a base learner by this configuration, in base_learner in run.dir; --resume leaves a finished one",
    )
    training.add_argument("--resume", action="store_true", help="go on with the run in run.dir; begin it if it is new")
    training.set_defaults(run=_train, takes_overrides=True)

    base = commands.add_parser(
        "train-base",
        help="BAM's first stage: a base learner for method.base_learner",
        usage="svf-fast train-base CONFIG [key=value ...] [--resume]",
    )
    base.add_argument("config", metavar="CONFIG", help=shipped_ones)
    base.add_argument("--resume", action="store_true", help="as of train")
    base.set_defaults(run=_train_base, takes_overrides=True)

    evaluation = commands.add_parser(
        "eval",
        help="mIoU and FB-IoU of a checkpoint on its fold's novel classes",
        usage="svf-fast eval CHECKPOINT [--episodes N] [--seed S ... | --five-seeds] [--shots K] "
        "[--generalised [--rule R] [--tau T]] [--out FILE.json] [key=value ...]",
    )
    evaluation.add_argument("checkpoint", metavar="CHECKPOINT", help="last.pt or best.pt of a run")
    evaluation.add_argument("--episodes", metavar="N", help="default: as in the run's validation")
    seeds = evaluation.add_mutually_exclusive_group()
    seeds.add_argument("--seed", metavar="S", nargs="+", type=_seed, default=[], help="one evaluation each")
    seeds.add_argument(
        "--five-seeds",
        dest="seed",
        action="store_const",
        const=list(FIVE_SEEDS),
        help=f"the field's, as --seed {' '.join(map(str, FIVE_SEEDS))}",
    )
    evaluation.add_argument("--shots", metavar="K", help="default: as in the run's validation")
    evaluation.add_argument("--generalised", action="store_true", help="bam: base and novel classes together")
    evaluation.add_argument("--rule", choices=get_args(GeneralisedRule), help="which branch goes first; default: final")
    evaluation.add_argument("--tau", metavar="T", type=float, help="probability from which it is novel; default: 0.9")
    evaluation.add_argument(
        "--out", metavar="FILE.json", type=Path, help="the scores, and where they come from, as JSON"
    )
    evaluation.set_defaults(run=_eval, takes_overrides=True)

    add_prepare(commands)
    add_reproduce(commands)

    resolved = commands.add_parser(
        "config",
        help="a configuration as it resolves; alone, the shipped ones and the parts",
        usage="svf-fast config [CONFIG] [key=value ...]",
    )
    resolved.add_argument("config", metavar="CONFIG", nargs="?", help=shipped_ones)
    resolved.set_defaults(run=_config, takes_overrides=True)

    summary = commands.add_parser(
        "summary",
        help="the model of a configuration and what of it trains",
        usage="svf-fast summary CONFIG [key=value ...]",
    )
    summary.add_argument("config", metavar="CONFIG", help=shipped_ones)
    summary.set_defaults(run=_summary, takes_overrides=True)
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _demo(options: argparse.Namespace, overrides: list[str]) -> int:
    from svf_fast.train.demo import run_demo  # matplotlib comes with it

    return run_demo(options.output, options.seed)


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.base_learner is None:
        for text in overrides:
            if text.startswith(BASE_PREFIX):
                raise ValueError(f"{text} is of a base learner that is trained first: add --base-learner CONFIG")
        outcome = train(load_config(options.config, overrides), resume=options.resume, console=Console())
    else:
        stages = load_two_stages(options.config, options.base_learner, overrides)
        outcome = train_two_stages(*stages, resume=options.resume, console=Console())
    _tell(outcome.sentence)
    return 0 if outcome.is_finished else 1


def _train_base(options: argparse.Namespace, overrides: list[str]) -> int:
    outcome = train(load_base_config(options.config, overrides), resume=options.resume, console=Console())
    _tell(outcome.sentence)
    return 0 if outcome.is_finished else 1


def _eval(options: argparse.Namespace, overrides: list[str]) -> int:
    asked = {"episodes": options.episodes, "shots": options.shots}
    overrides += [f"validation.{key}={value}" for key, value in asked.items() if value is not None]
    if options.out is not None:
        require_place(options.out)
    console = Console(stderr=True, quiet=launched_rank() > 0)
    evaluation: Evaluation | GeneralisedEvaluation
    if options.generalised:
        tau, rule = 0.9 if options.tau is None else options.tau, options.rule or "final"
        evaluation = evaluate_generalised(
            options.checkpoint, overrides, seeds=options.seed, tau=tau, rule=rule, console=console
        )
    else:
        for name in ("rule", "tau"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} is of a generalised evaluation: add --generalised")
        evaluation = evaluate(options.checkpoint, overrides, seeds=options.seed, console=console)
    sheet = score_sheet(evaluation)
    iteration, episodes = evaluation.origin.iteration, evaluation.scores[0].episodes
    _tell(f"{options.checkpoint}: after step {iteration}, {episodes} episodes, in %")
    _tell(score_table(sheet))
    if options.out is not None and launched_rank() == 0:
        write_score_sheet(options.out, sheet)
    return 0


def _config(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.config is None:
        if overrides:
            raise ValueError(f"{overrides[0]} is of no use without a configuration: svf-fast config CONFIG key=value")
        print(_listing())
        return 0
    config = load_any_config(options.config, overrides)
    print(yaml.safe_dump(config.to_plain(), sort_keys=False), end="")
    return 0


def _listing() -> str:
    """The shipped names, each with what it is."""
    files = shipped()
    width = max(len(name) for entries in files.values() for name in entries)
    lines = []
    for file, entries in files.items():
        whole = file == CONFIGURATIONS
        lines.append(
            f"{file}, to be taken by name:" if whole else f"{file}, parts to be joined with +, later ones win:"
        )
        lines += [f"  {name:<{width}}  {entry.about}" for name, entry in entries.items()]
    return "\n".join(lines)


def _summary(options: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(options.config, overrides)
    model = build_model(config, pretrained=True)
    stages = nn.Sequential(OrderedDict((name, model.method.get_submodule(name)) for name in model.method.stages))
    with torch.device("meta"):
        original = sum(parameter.numel() for parameter in build_backbone(config.backbone).parameters())
    print(
        f"{config.method.name} on {config.backbone.architecture}: {original:,} parameters; its stages, as they are tuned:"
    )
    print(svf_fast.summary(stages, (1, 3, config.data.size, config.data.size)))
    print(f"BatchNorm in the backbone: method.bn_mode={config.method.bn_mode}")
    rates = base_rates(config, model.groups)
    print(f"tuning strategy {config.tuning.strategy} trains {model.strategy.trains}")
    print(f"groups, with their rates before the {config.schedule.name} schedule:")
    for group in model.groups:
        count = sum(parameter.numel() for parameter in group["params"])
        print(f"  {group['name']}: {count:,} trainable parameters, rate {rates[group['name']]:.4g}")
    return 0
