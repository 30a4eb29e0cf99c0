"""Starting and resuming runs by configuration: the layer between the command line and the engine, with the
checks that belong to a user's folder. Other programs that start runs use the functions here."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from rich.console import Console

from svf_fast.train.assembly import (
    base_training_pictures,
    base_validation_pictures,
    build_base_learner,
    build_model,
    choose_device,
    fold_in,
    seen_classes_sampler,
    training_sampler,
    validation_sampler,
)
from svf_fast.train.base_learner import BaseTask
from svf_fast.train.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from svf_fast.train.config import (
    BASE_LEARNER,
    BaseConfig,
    Config,
    ConfigError,
    Stage,
    StageConfig,
    config_from_plain,
)
from svf_fast.train.data.split import Split
from svf_fast.train.distributed import Processes, joined, launched_here
from svf_fast.train.engine import LAST, LOG, Outcome, Parts, Run, TrainingError
from svf_fast.train.files import write_atomically
from svf_fast.train.scalars import require_tensorboard
from svf_fast.train.schema import flatten
from svf_fast.train.tasks import EpisodeTask, SeenClasses
from svf_fast.train.validation import EpisodePlan

# What may differ between a run and its resumption: places, speed, and what is read at the start only.
FREE_ON_RESUME = (
    "run.dir",
    "run.device",
    "run.threads",
    "run.checkpoint_every",
    "run.accumulate",
    "run.compile",
    "run.tensorboard",
    "data.root",
    "data.workers",
    "data.cache_mb",
    "backbone.weights",
    "method.base_learner",
    "validation.batch",
)


def train(config: Config | BaseConfig, *, resume: bool, console: Console) -> Outcome:
    """Run ``config`` in its ``run.dir`` to the end, or until a signal. With ``resume`` it goes on from the folder's
    last checkpoint, or begins if there is none yet.

    Under ``torchrun`` its processes share every step and every validation, and only the first one writes.

    Raises FileNotFoundError or a ValueError (ConfigError, CheckpointError and others), before the first step, when
    something is wrong with what the user gave; TrainingError when the run itself fails. Of several processes the first
    one raises these, the others ProcessError for what they alone meet; PeerLost when another one fails.
    """
    config = with_absolute_places(config)
    processes = joined(config.run.device)
    quiet = console if processes.is_first else Console(quiet=True)
    mistakes = (ValueError, OSError)
    # agreed on first: the others would wait in the second for one that cannot get there
    prepared = processes.agreed(lambda: _prepare(config, resume=resume, console=quiet), mistakes)
    run = processes.agreed(lambda: _begin(config, prepared, processes, quiet), mistakes)
    with processes.signed(*mistakes, TrainingError, MemoryError, torch.OutOfMemoryError):
        return run.train()


def config_of(checkpoint: Checkpoint, path: str | Path, schema: type[Stage]) -> Stage:
    """The settings that a checkpoint was written with; CheckpointError when they are of another kind of run, or of
    another version."""
    is_base_learner = checkpoint.config.get("method", {}).get("name") == BASE_LEARNER
    if is_base_learner != issubclass(schema, BaseConfig):
        found, expected = ("a base learner", "a few-shot method")[:: 1 if is_base_learner else -1]
        raise CheckpointError(f"{path} is a checkpoint of {found}, expected one of {expected}")
    try:
        return config_from_plain(checkpoint.config, (), schema)
    except ConfigError as error:
        raise CheckpointError(f"{path} was written with settings that this version does not know: {error}") from error


def prepare_device(config: StageConfig) -> torch.device:
    """The device that ``config`` asks for; PyTorch uses its number of threads from here on."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    return choose_device(config.run.device, launched_here())


def with_absolute_places(config: Stage) -> Stage:
    """What a checkpoint remembers must be found from any working directory."""

    def absolute(place: str | None) -> str | None:
        return None if place is None else str(Path(place).absolute())

    if isinstance(config, Config):
        method = replace(config.method, base_learner=absolute(config.method.base_learner))
        config = replace(config, method=method)
    data = replace(config.data, root=absolute(config.data.root))
    return replace(config, data=data, backbone=replace(config.backbone, weights=absolute(config.backbone.weights)))


def data_digest(*splits: Split) -> str:
    """Tells one choice of pictures, classes and their order from another, wherever the folder lies."""
    digest = hashlib.blake2b(digest_size=16)
    for split in splits:
        digest.update(repr([(entry.image, entry.label, entry.present_classes) for entry in split.entries]).encode())
        digest.update(repr(sorted(split.files_of_class.items())).encode())
    return digest.hexdigest()


def episode_plan(config: Config, seed: int) -> EpisodePlan:
    """The validation of a configuration under ``seed``."""
    rule = config.validation
    return EpisodePlan(rule.episodes, seed, rule.order, rule.batch)


@dataclass(frozen=True)
class _Prepared:
    """All of a run that one process can get, or fail to get, by itself."""

    folder: Path
    checkpoint: Checkpoint | None
    device: torch.device
    parts: Parts
    data: str


def _prepare(config: Config | BaseConfig, *, resume: bool, console: Console) -> _Prepared:
    if config.run.tensorboard:
        require_tensorboard()
    folder = require_run_folder(config, resume=resume)
    checkpoint = load_checkpoint(folder / LAST) if (folder / LAST).is_file() else None
    if checkpoint is not None:
        require_same_run(config, checkpoint, folder / LAST)
    elif resume:
        console.print(f"no checkpoint in {folder} yet: the run begins", highlight=False, markup=False, soft_wrap=True)
    device = prepare_device(config)
    is_new = checkpoint is None
    if isinstance(config, Config):
        parts, splits = _few_shot_parts(config, pretrained=is_new, console=console)
    else:
        parts, splits = _base_learner_parts(config, pretrained=is_new, console=console)
    data = data_digest(*splits)
    if checkpoint is not None and checkpoint.state.data != data:
        raise CheckpointError(
            f"{folder / LAST} belongs to other data: the lists of {splits[0].root} select other pictures now; "
            "a resumed run needs the pictures that it began with"
        )
    return _Prepared(folder, checkpoint, device, parts, data)


def _begin(config: Config | BaseConfig, prepared: _Prepared, processes: Processes, console: Console) -> Run:
    """The run, which several processes can only build together."""
    folder = prepared.folder
    run = Run(config, prepared.parts, folder, device=prepared.device, console=console, processes=processes)
    if prepared.checkpoint is not None:
        run.restore(prepared.checkpoint)
    else:
        fold = fold_in(config.data)
        run.state.data, run.state.novel, run.state.base = prepared.data, fold.novel, fold.base
        if config.backbone.weights is None and not (isinstance(config, Config) and config.method.takes_base_learner):
            line = "backbone.weights is not set: the backbone starts from random weights"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not processes.is_first:
        return run
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.to_plain(), sort_keys=False)
    write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
    return run


def _few_shot_parts(config: Config, *, pretrained: bool, console: Console) -> tuple[Parts, list[Split]]:
    if pretrained and config.method.name == "bam" and config.method.base_learner is None:
        raise ConfigError(
            "method.base_learner is not set: bam starts from a base learner, give its checkpoint (svf-fast train-base)"
        )
    training = training_sampler(config, console=console)
    validation = validation_sampler(config, seed=config.validation.seed, console=console)
    model = build_model(config, pretrained=pretrained)
    plan = episode_plan(config, config.validation.seed)
    seen = None
    if config.validation.training_episodes:
        seen_plan = replace(plan, episodes=config.validation.training_episodes)
        seen_sampler = seen_classes_sampler(config, training)
        seen = SeenClasses(seen_sampler, seen_sampler.split.class_ids, seen_plan)
    task = EpisodeTask(training, validation, dict(validation.split.class_names), plan, seen)
    return Parts(model.method, model.groups, task), [training.split, validation.split]


def _base_learner_parts(config: BaseConfig, *, pretrained: bool, console: Console) -> tuple[Parts, list[Split]]:
    training = base_training_pictures(config, console=console)
    validation = base_validation_pictures(config, console=console)
    learner, groups = build_base_learner(config, pretrained=pretrained)
    names = tuple(training.split.class_names[class_id] for class_id in training.base_classes)
    task = BaseTask(training, validation, names, batch=config.data.batch)
    return Parts(learner, groups, task), [training.split, validation.split]


def require_run_folder(config: StageConfig, *, resume: bool) -> Path:
    """``run.dir``; ConfigError where it is not set, a file, or without ``resume`` holds a run already."""
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


def require_same_run(config: Config | BaseConfig, checkpoint: Checkpoint, path: Path) -> None:
    """ConfigError unless ``checkpoint``, read from ``path``, is of a run with these settings, but for those that are free."""
    before, now = flatten(config_of(checkpoint, path, type(config)).to_plain()), flatten(config.to_plain())
    changed = [key for key in now if now[key] != before[key] and key not in FREE_ON_RESUME]
    if changed:
        listed = ", ".join(f"{key} was {before[key]!r} and is now {now[key]!r}" for key in changed)
        raise ConfigError(f"the run in {path.parent} cannot be resumed with other settings: {listed}")
