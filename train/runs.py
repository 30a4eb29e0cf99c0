"""Starting, resuming and judging runs by configuration: the layer between the command line and the engine, with the
checks that belong to a user's folder. Other programs that start runs use the functions here."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import yaml
from rich.console import Console

from svf_fast.train.assembly import build_model, choose_device, training_sampler, validation_sampler
from svf_fast.train.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_method_state, write_atomically
from svf_fast.train.config import Config, ConfigError, config_from_plain
from svf_fast.train.data.voc import Split
from svf_fast.train.engine import LAST, LOG, Outcome, Parts, Run
from svf_fast.train.progress import WorkProgress
from svf_fast.train.schema import flatten
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


@dataclass(frozen=True)
class Evaluation:
    """Scores of one checkpoint, one a seed, and the names of the classes they speak of."""

    iteration: int
    scores: tuple[Scores, ...]
    class_names: dict[int, str]


def train(config: Config, *, resume: bool, console: Console) -> Outcome:
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
    checkpoint = load_checkpoint(path)
    for assignment in overrides:
        if assignment.partition("=")[0] not in FREE_IN_EVALUATION:
            raise ConfigError(
                f"{assignment} does not apply to a finished model: eval takes {', '.join(FREE_IN_EVALUATION)}"
            )
    config = config_from_plain(_config_of(checkpoint, path).to_plain(), overrides)
    device = _prepare(config)
    seeds = seeds or (config.validation.seed,)
    samplers = [validation_sampler(config, seed=seed) for seed in seeds]
    method = build_model(config, pretrained=False).method
    load_method_state(method, checkpoint, path)
    method.to(device)
    with WorkProgress(console) as progress:
        scores: list[Scores] = []
        for seed, sampler in zip(seeds, samplers, strict=True):
            name = f"validation, seed {seed}"
            progress.begin(name, 0, config.validation.episodes)
            scores.append(
                validate(
                    method,
                    sampler,
                    sampler.split.class_ids,
                    episodes=config.validation.episodes,
                    seed=seed,
                    workers=config.data.workers,
                    device=device,
                    watch=partial(progress.show, name),
                )
            )
    return Evaluation(checkpoint.state.iteration, tuple(scores), dict(samplers[0].split.class_names))


def _build_run(config: Config, *, resume: bool, console: Console) -> Run:
    folder = _run_folder(config, resume=resume)
    checkpoint = load_checkpoint(folder / LAST) if (folder / LAST).is_file() else None
    if checkpoint is not None:
        _require_same_run(config, checkpoint, folder / LAST)
    elif resume:
        console.print(f"no checkpoint in {folder} yet: the run begins", highlight=False, markup=False, soft_wrap=True)
    device = _prepare(config)
    training, validation = training_sampler(config), validation_sampler(config, seed=config.validation.seed)
    model = build_model(config, pretrained=checkpoint is None)
    parts = Parts(model.method, model.groups, training, validation, dict(validation.split.class_names))
    run = Run(config, parts, folder, device=device, console=console)
    data = _data_digest(training.split, validation.split)
    if checkpoint is not None:
        if checkpoint.state.data != data:
            raise CheckpointError(
                f"{folder / LAST} belongs to other data: the lists of {training.split.root} select other pictures now; "
                "a resumed run needs the pictures that it began with"
            )
        run.restore(checkpoint)
    else:
        run.state.data = data
        if config.backbone.weights is None:
            line = "backbone.weights is not set: the backbone starts from random weights"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.to_plain(), sort_keys=False)
    write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
    return run


def _with_absolute_places(config: Config) -> Config:
    """What a checkpoint remembers must be found from any working directory."""

    def absolute(place: str | None) -> str | None:
        return None if place is None else str(Path(place).absolute())

    data = replace(config.data, root=absolute(config.data.root))
    return replace(config, data=data, backbone=replace(config.backbone, weights=absolute(config.backbone.weights)))


def _data_digest(*splits: Split) -> str:
    """Tells one choice of pictures, classes and their order from another, wherever the folder lies."""
    digest = hashlib.blake2b(digest_size=16)
    for split in splits:
        digest.update(repr([(entry.image, entry.label, entry.present_classes) for entry in split.entries]).encode())
        digest.update(repr(sorted(split.files_of_class.items())).encode())
    return digest.hexdigest()


def _run_folder(config: Config, *, resume: bool) -> Path:
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


def _require_same_run(config: Config, checkpoint: Checkpoint, path: Path) -> None:
    before, now = flatten(_config_of(checkpoint, path).to_plain()), flatten(config.to_plain())
    changed = [key for key in now if now[key] != before[key] and key not in FREE_ON_RESUME]
    if changed:
        listed = ", ".join(f"{key} was {before[key]!r} and is now {now[key]!r}" for key in changed)
        raise ConfigError(f"the run in {path.parent} cannot be resumed with other settings: {listed}")


def _config_of(checkpoint: Checkpoint, path: str | Path) -> Config:
    try:
        return config_from_plain(checkpoint.config)
    except ConfigError as error:
        raise CheckpointError(f"{path} was written with settings that this version does not know: {error}") from error


def _prepare(config: Config) -> torch.device:
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    return choose_device(config.run.device)
