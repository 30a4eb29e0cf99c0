"""Evaluating the checkpoint of a run: by configuration and seeds, on the novel classes or on base and novel classes together.
Stands beside the running of runs. Other programs that evaluate use the functions here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from rich.console import Console

from svf_fast.train.assembly import build_model, fold_in, generalised_sampler, validation_sampler
from svf_fast.train.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_method_state
from svf_fast.train.config import Config, ConfigError, config_from_plain
from svf_fast.train.data.episodes import EpisodeSampler
from svf_fast.train.data.generalised import GeneralisedSampler
from svf_fast.train.data.split import Split
from svf_fast.train.distributed import Processes, joined
from svf_fast.train.files import sha256_of
from svf_fast.train.generalised import GeneralisedScores, validate_generalised
from svf_fast.train.methods import BAM, MetaLearner
from svf_fast.train.methods.bam import GeneralisedRule
from svf_fast.train.precision import arithmetic
from svf_fast.train.progress import WorkProgress
from svf_fast.train.runs import config_of, data_digest, episode_plan, prepare_device, with_absolute_places
from svf_fast.train.tasks import Watch
from svf_fast.train.validation import Scores, validate

# What an evaluation may ask otherwise. Not the fold: its classes would be those that the model was trained on.
FREE_IN_EVALUATION = (
    "data.root",
    "data.val_list",
    "data.size",
    "data.workers",
    "data.cache_mb",
    "validation.batch",
    "validation.episodes",
    "validation.order",
    "validation.seed",
    "validation.shots",
    "run.device",
    "run.threads",
    "run.precision",
)

Sampler = TypeVar("Sampler", bound=EpisodeSampler)
Judged = TypeVar("Judged")


@dataclass(frozen=True)
class Origin:
    """What was evaluated, places absolute: a checkpoint's file, with its hash and its step, under the settings in effect
    and on a device; on which list, and a digest of the pictures and classes that it selects."""

    checkpoint: Path
    sha256: str
    iteration: int
    config: Config
    device: torch.device
    list_file: Path
    data: str


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint, one a seed, and the names of the classes they speak of."""

    origin: Origin
    scores: tuple[Scores, ...]
    class_names: dict[int, str]


@dataclass(frozen=True)
class GeneralisedEvaluation:
    """As :class:`Evaluation`, of base and novel classes together."""

    origin: Origin
    scores: tuple[GeneralisedScores, ...]
    class_names: dict[int, str]
    tau: float
    rule: GeneralisedRule


def evaluate(
    path: str | Path, overrides: Sequence[str] = (), *, seeds: Sequence[int] = (), console: Console
) -> Evaluation:
    """Scores of a checkpoint on the novel classes of its fold, once for each of ``seeds`` (none: the validation seed).

    ``overrides`` may change where the data lie and how they are asked for, not the model. Needs no other file of the
    run. Raises FileNotFoundError or a ValueError as :func:`train` does. Under ``torchrun`` its processes share the
    episodes, and all of them get the same scores.
    """
    _require_different(seeds)
    trained = _open(path, overrides)
    config = trained.config
    seeds = seeds or (config.validation.seed,)
    sampler = validation_sampler(config, seed=seeds[0], console=console)  # its pictures are checked once, for all seeds
    samplers, split = [sampler.with_seed(seed) for seed in seeds], sampler.split
    origin, method = trained.origin(split), trained.method()

    def judge(sampler: EpisodeSampler, watch: Watch, processes: Processes) -> Scores:
        return validate(
            method,
            sampler,
            sampler.split.class_ids,
            episode_plan(config, sampler.seed),
            workers=config.data.workers,
            device=trained.device,
            watch=watch,
            processes=processes,
        )

    return Evaluation(origin, _one_by_one("validation", trained, samplers, judge, console), dict(split.class_names))


def evaluate_generalised(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    tau: float,
    rule: GeneralisedRule,
    console: Console,
) -> GeneralisedEvaluation:
    """As :func:`evaluate`, base and novel classes together, for a checkpoint of BAM; the episodes follow the list's
    order, whatever the run's validation does. ``tau`` and ``rule`` as in :func:`predict_generalised`."""
    _require_different(seeds)
    if not 0 <= tau < 1:
        raise ConfigError(f"tau is {tau}, expected at least 0 and below 1")
    trained = _open(path, overrides)
    config = trained.config
    if config.method.name != "bam":
        raise ConfigError(f"{path} is a model of {config.method.name}, which knows no base classes: only bam does")
    if any(key == "validation.order" and value != "list" for key, _, value in (o.partition("=") for o in overrides)):
        raise ConfigError("validation.order does not apply to a generalised evaluation, which follows the list's order")
    config = replace(config, validation=replace(config.validation, order="list"))
    trained = trained._replace(config=config)
    seeds = seeds or (config.validation.seed,)
    sampler = generalised_sampler(config, seed=seeds[0], console=console)
    samplers, split = [sampler.with_seed(seed) for seed in seeds], sampler.split
    origin, method = trained.origin(split), trained.method()
    assert isinstance(method, BAM)

    def judge(sampler: GeneralisedSampler, watch: Watch, processes: Processes) -> GeneralisedScores:
        return validate_generalised(
            method,
            sampler,
            episode_plan(config, sampler.seed),
            tau=tau,
            rule=rule,
            workers=config.data.workers,
            device=trained.device,
            watch=watch,
            processes=processes,
        )

    scores = _one_by_one("generalised", trained, samplers, judge, console)
    return GeneralisedEvaluation(origin, scores, dict(split.class_names), tau, rule)


def _one_by_one(
    name: str,
    trained: "_Trained",
    samplers: Sequence[Sampler],
    judge: Callable[[Sampler, Watch, Processes], Judged],
    console: Console,
) -> tuple[Judged, ...]:
    """``judge`` on every sampler, each with a bar of its own."""
    scores: list[Judged] = []
    run = trained.config.run
    processes = joined(run.device)
    with (
        processes.signed(ValueError, OSError, MemoryError, torch.OutOfMemoryError),
        arithmetic(run.precision, trained.device),
        WorkProgress(console if processes.is_first else Console(quiet=True)) as progress,
    ):
        for sampler in samplers:
            bar = f"{name}, seed {sampler.seed}"
            progress.begin(bar, 0, trained.config.validation.episodes)
            scores.append(judge(sampler, partial(progress.show, bar), processes))
    return tuple(scores)


class _Trained(NamedTuple):
    """A few-shot method's checkpoint and its file's hash, the settings in effect, and the device for it."""

    path: Path
    sha256: str
    checkpoint: Checkpoint
    config: Config
    device: torch.device

    def method(self) -> MetaLearner:
        method = build_model(self.config, pretrained=False).method
        load_method_state(method, self.checkpoint, self.path)
        return method.to(self.device)

    def origin(self, split: Split) -> Origin:
        return Origin(
            self.path.absolute(),
            self.sha256,
            self.checkpoint.state.iteration,
            with_absolute_places(self.config),
            self.device,
            split.list_file.absolute(),
            data_digest(split),
        )


def _require_different(seeds: Sequence[int]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ConfigError(
            f"the seeds are {', '.join(map(str, seeds))}; expected each once: the same again is no spread"
        )


def _open(path: str | Path, overrides: Sequence[str]) -> _Trained:
    """A checkpoint under its own settings with ``overrides``."""
    sha256 = sha256_of(Path(path)) if Path(path).is_file() else ""
    checkpoint = load_checkpoint(path)
    # a run that goes on replaces its files: what was read must be what was hashed
    if sha256_of(Path(path)) != sha256:
        raise CheckpointError(f"{path} was replaced while it was read, perhaps by a run that goes on: try again")
    for assignment in overrides:
        if assignment.partition("=")[0] not in FREE_IN_EVALUATION:
            raise ConfigError(
                f"{assignment} does not apply to a finished model: eval takes {', '.join(FREE_IN_EVALUATION)}"
            )
    config = config_from_plain(config_of(checkpoint, path, Config).to_plain(), overrides)
    fold, state = fold_in(config.data), checkpoint.state
    if state.base and (state.novel, state.base) != (fold.novel, fold.base):
        raise CheckpointError(
            f"{path} was trained on a fold with the novel classes {list(state.novel)} and the base classes "
            f"{list(state.base)}, but data.folds={config.data.folds} now has {list(fold.novel)} and {list(fold.base)}"
        )
    return _Trained(Path(path), sha256, checkpoint, config, prepare_device(config))
