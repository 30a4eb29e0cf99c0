"""Starting, resuming and judging runs by configuration: the layer between the command line and the engine, with the
checks that belong to a user's folder. Other programs that start runs use the functions here."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from rich.console import Console

from svf_fast.train.assembly import (
    base_training_pictures,
    base_validation_pictures,
    build_base_learner,
    build_model,
    choose_device,
    generalised_sampler,
    training_sampler,
    validation_sampler,
)
from svf_fast.train.base_learner import BaseTask
from svf_fast.train.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_method_state, write_atomically
from svf_fast.train.config import BASE_LEARNER, BaseConfig, Config, ConfigError, Stage, StageConfig, config_from_plain
from svf_fast.train.data.episodes import EpisodeSampler
from svf_fast.train.data.generalised import GeneralisedSampler
from svf_fast.train.data.voc import Split
from svf_fast.train.engine import LAST, LOG, Outcome, Parts, Run
from svf_fast.train.generalised import GeneralisedScores, validate_generalised
from svf_fast.train.methods import BAM, MetaLearner
from svf_fast.train.methods.bam import GeneralisedRule
from svf_fast.train.progress import WorkProgress
from svf_fast.train.schema import flatten
from svf_fast.train.tasks import EpisodeTask, Watch
from svf_fast.train.validation import Scores, validate

# What may differ between a run and its resumption: places, speed, and what is read at the start only.
FREE_ON_RESUME = (
    "run.dir",
    "run.device",
    "run.threads",
    "run.checkpoint_every",
    "data.root",
    "data.workers",
    "backbone.weights",
    "method.base_learner",
)
# What an evaluation may ask otherwise. Not the fold: its classes would be those that the model was trained on.
FREE_IN_EVALUATION = (
    "data.root",
    "data.val_list",
    "data.size",
    "data.workers",
    "validation.episodes",
    "validation.seed",
    "validation.shots",
    "run.device",
    "run.threads",
)


Sampler = TypeVar("Sampler", bound=EpisodeSampler)
Judged = TypeVar("Judged")


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint, one a seed, and the names of the classes they speak of."""

    iteration: int
    scores: tuple[Scores, ...]
    class_names: dict[int, str]


@dataclass(frozen=True)
class GeneralisedEvaluation:
    """As :class:`Evaluation`, of base and novel classes together."""

    iteration: int
    scores: tuple[GeneralisedScores, ...]
    class_names: dict[int, str]


def train(config: Config | BaseConfig, *, resume: bool, console: Console) -> Outcome:
    """Run ``config`` in its ``run.dir`` to the end, or until a signal. With ``resume`` it goes on from the folder's
    last checkpoint, or begins if there is none yet.

    Raises FileNotFoundError or a ValueError (ConfigError, CheckpointError and others), before the first step, when
    something is wrong with what the user gave; TrainingError when the run itself fails.
    """
    return _build_run(_with_absolute_places(config), resume=resume, console=console).train()


def evaluate(
    path: str | Path, overrides: Sequence[str] = (), *, seeds: Sequence[int] = (), console: Console
) -> Evaluation:
    """Scores of a checkpoint on the novel classes of its fold, once for each of ``seeds`` (none: the validation seed).

    ``overrides`` may change where the data lie and how they are asked for, not the model. Needs no other file of the
    run. Raises FileNotFoundError or a ValueError as :func:`train` does.
    """
    trained, config, device = _trained(path, overrides)
    seeds = seeds or (config.validation.seed,)
    samplers = [validation_sampler(config, seed=seed) for seed in seeds]
    method, episodes = _restored(trained, path, config, device), config.validation.episodes

    def judge(sampler: EpisodeSampler, watch: Watch) -> Scores:
        return validate(
            method,
            sampler,
            sampler.split.class_ids,
            episodes=episodes,
            seed=sampler.seed,
            workers=config.data.workers,
            device=device,
            watch=watch,
        )

    scores = _one_by_one("validation", samplers, episodes, judge, console)
    return Evaluation(trained.state.iteration, scores, dict(samplers[0].split.class_names))


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
    order. ``tau`` and ``rule`` as in :func:`predict_generalised`."""
    if not 0 <= tau < 1:
        raise ConfigError(f"tau is {tau}, expected at least 0 and below 1")
    trained, config, device = _trained(path, overrides)
    if config.method.name != "bam":
        raise ConfigError(f"{path} is a model of {config.method.name}, which knows no base classes: only bam does")
    seeds = seeds or (config.validation.seed,)
    samplers = [generalised_sampler(config, seed=seed) for seed in seeds]
    method, episodes = _restored(trained, path, config, device), config.validation.episodes
    assert isinstance(method, BAM)

    def judge(sampler: GeneralisedSampler, watch: Watch) -> GeneralisedScores:
        return validate_generalised(
            method,
            sampler,
            episodes=episodes,
            tau=tau,
            rule=rule,
            workers=config.data.workers,
            device=device,
            watch=watch,
        )

    scores = _one_by_one("generalised", samplers, episodes, judge, console)
    return GeneralisedEvaluation(trained.state.iteration, scores, dict(samplers[0].split.class_names))


def _one_by_one(
    name: str,
    samplers: Sequence[Sampler],
    episodes: int,
    judge: Callable[[Sampler, Watch], Judged],
    console: Console,
) -> tuple[Judged, ...]:
    """``judge`` on every sampler, each with a bar of its own."""
    scores: list[Judged] = []
    with WorkProgress(console) as progress:
        for sampler in samplers:
            bar = f"{name}, seed {sampler.seed}"
            progress.begin(bar, 0, episodes)
            scores.append(judge(sampler, partial(progress.show, bar)))
    return tuple(scores)


def _trained(path: str | Path, overrides: Sequence[str]) -> tuple[Checkpoint, Config, torch.device]:
    """A few-shot method's checkpoint, its settings with ``overrides``, and the device for it."""
    checkpoint = load_checkpoint(path)
    for assignment in overrides:
        if assignment.partition("=")[0] not in FREE_IN_EVALUATION:
            raise ConfigError(
                f"{assignment} does not apply to a finished model: eval takes {', '.join(FREE_IN_EVALUATION)}"
            )
    config = config_from_plain(_config_of(checkpoint, path, Config).to_plain(), overrides)
    return checkpoint, config, _prepare(config)


def _restored(checkpoint: Checkpoint, path: str | Path, config: Config, device: torch.device) -> MetaLearner:
    method = build_model(config, pretrained=False).method
    load_method_state(method, checkpoint, path)
    return method.to(device)


def _build_run(config: Config | BaseConfig, *, resume: bool, console: Console) -> Run:
    folder = _run_folder(config, resume=resume)
    checkpoint = load_checkpoint(folder / LAST) if (folder / LAST).is_file() else None
    if checkpoint is not None:
        _require_same_run(config, checkpoint, folder / LAST)
    elif resume:
        console.print(f"no checkpoint in {folder} yet: the run begins", highlight=False, markup=False, soft_wrap=True)
    device = _prepare(config)
    is_new = checkpoint is None
    if isinstance(config, Config):
        parts, splits = _few_shot_parts(config, pretrained=is_new)
    else:
        parts, splits = _base_learner_parts(config, pretrained=is_new)
    run = Run(config, parts, folder, device=device, console=console)
    data = _data_digest(*splits)
    if checkpoint is not None:
        if checkpoint.state.data != data:
            raise CheckpointError(
                f"{folder / LAST} belongs to other data: the lists of {splits[0].root} select other pictures now; "
                "a resumed run needs the pictures that it began with"
            )
        run.restore(checkpoint)
    else:
        run.state.data = data
        if config.backbone.weights is None and not (isinstance(config, Config) and config.method.takes_base_learner):
            line = "backbone.weights is not set: the backbone starts from random weights"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.to_plain(), sort_keys=False)
    write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
    return run


def _few_shot_parts(config: Config, *, pretrained: bool) -> tuple[Parts, list[Split]]:
    if pretrained and config.method.name == "bam" and config.method.base_learner is None:
        raise ConfigError(
            "method.base_learner is not set: bam starts from a base learner, give its checkpoint (svf-fast train-base)"
        )
    training, validation = training_sampler(config), validation_sampler(config, seed=config.validation.seed)
    model = build_model(config, pretrained=pretrained)
    rule = config.validation
    task = EpisodeTask(training, validation, dict(validation.split.class_names), rule.episodes, rule.seed)
    return Parts(model.method, model.groups, task), [training.split, validation.split]


def _base_learner_parts(config: BaseConfig, *, pretrained: bool) -> tuple[Parts, list[Split]]:
    training, validation = base_training_pictures(config), base_validation_pictures(config)
    learner, groups = build_base_learner(config, pretrained=pretrained)
    names = tuple(training.split.class_names[class_id] for class_id in training.base_classes)
    task = BaseTask(training, validation, names, batch=config.data.batch)
    return Parts(learner, groups, task), [training.split, validation.split]


def _with_absolute_places(config: Stage) -> Stage:
    """What a checkpoint remembers must be found from any working directory."""

    def absolute(place: str | None) -> str | None:
        return None if place is None else str(Path(place).absolute())

    if isinstance(config, Config):
        method = replace(config.method, base_learner=absolute(config.method.base_learner))
        config = replace(config, method=method)
    data = replace(config.data, root=absolute(config.data.root))
    return replace(config, data=data, backbone=replace(config.backbone, weights=absolute(config.backbone.weights)))


def _data_digest(*splits: Split) -> str:
    """Tells one choice of pictures, classes and their order from another, wherever the folder lies."""
    digest = hashlib.blake2b(digest_size=16)
    for split in splits:
        digest.update(repr([(entry.image, entry.label, entry.present_classes) for entry in split.entries]).encode())
        digest.update(repr(sorted(split.files_of_class.items())).encode())
    return digest.hexdigest()


def _run_folder(config: StageConfig, *, resume: bool) -> Path:
    if config.run.dir is None:
        raise ConfigError("run.dir is not set: give the run's folder in the file or as run.dir=...")
    folder = Path(config.run.dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir is {folder}, which is a file: give a folder")
    if not resume and ((folder / LAST).exists() or (folder / LOG).exists()):
        raise ConfigError(
            f"run.dir {folder} already holds a run: add --resume to go on with it, or give another run.dir"
        )
    return folder


def _require_same_run(config: Config | BaseConfig, checkpoint: Checkpoint, path: Path) -> None:
    before, now = flatten(_config_of(checkpoint, path, type(config)).to_plain()), flatten(config.to_plain())
    changed = [key for key in now if now[key] != before[key] and key not in FREE_ON_RESUME]
    if changed:
        listed = ", ".join(f"{key} was {before[key]!r} and is now {now[key]!r}" for key in changed)
        raise ConfigError(f"the run in {path.parent} cannot be resumed with other settings: {listed}")


def _config_of(checkpoint: Checkpoint, path: str | Path, schema: type[Stage]) -> Stage:
    is_base_learner = checkpoint.config.get("method", {}).get("name") == BASE_LEARNER
    if is_base_learner != issubclass(schema, BaseConfig):
        found, expected = ("a base learner", "a few-shot method")[:: 1 if is_base_learner else -1]
        raise CheckpointError(f"{path} is a checkpoint of {found}, expected one of {expected}")
    try:
        return config_from_plain(checkpoint.config, (), schema)
    except ConfigError as error:
        raise CheckpointError(f"{path} was written with settings that this version does not know: {error}") from error


def _prepare(config: StageConfig) -> torch.device:
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    return choose_device(config.run.device)
