"""BAM's two stages as one run: a base learner in the run's folder, then the few-shot method that starts from it. Stands on
train/runs.py, and knows which keys the stages have in common."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from svf_fast.train.assembly import build_model, training_sampler, validation_sampler
from svf_fast.train.checkpoint import load_checkpoint
from svf_fast.train.config import BaseConfig, Config, ConfigError, config_from_plain, load_base_config, load_config
from svf_fast.train.distributed import launched_rank
from svf_fast.train.engine import BEST, LAST, LOG, Outcome
from svf_fast.train.journal import read_journal
from svf_fast.train.runs import require_run_folder, require_same_run, train
from svf_fast.train.schema import flatten

BASE_PREFIX = "base."
FOLDER = "base_learner"  # of the first stage, in the second one's
# What both stages have in common: the pictures, the backbone, and what they run on. Sizes, rates and lengths are their own.
SHARED_KEYS = (
    "data.root",
    "data.folds",
    "data.fold",
    "data.train_list",
    "data.val_list",
    "data.workers",
    "data.cache_mb",
    "run.seed",
    "run.device",
    "run.threads",
    "run.precision",
    "run.compile",
    "run.tensorboard",
    "run.checkpoint_every",
)
SHARED_SECTION = "backbone"
WEIGHTS, BASE_LEARNER_FILE, RUN_FOLDER = "backbone.weights", "method.base_learner", "run.dir"


def load_two_stages(name: str, base_name: str, overrides: Sequence[str]) -> tuple[BaseConfig, Config]:
    """The configurations of both stages. ``overrides`` are the second's; those that begin with ``base.`` are the first's
    alone. What the second has in :data:`SHARED_KEYS` and in the section ``backbone`` is the first's as well, but for
    ``backbone.weights``, which only the first reads.

    The first stage lies in ``base_learner`` of the second's ``run.dir``, or in ``base.run.dir``. Errors as of
    :func:`load_config`; ConfigError, too, where the second stage takes no base learner, or has one already.
    """
    if base_name.endswith((".pt", ".pth", ".safetensors")):
        raise ConfigError(
            f"--base-learner is {base_name}, expected a configuration: a trained one is given as {BASE_LEARNER_FILE}=FILE"
        )
    of_base = [text.removeprefix(BASE_PREFIX) for text in overrides if text.startswith(BASE_PREFIX)]
    own = [text for text in overrides if not text.startswith(BASE_PREFIX)]
    weights = [text for text in own if _key(text) == WEIGHTS]
    if any(_key(text) == BASE_LEARNER_FILE for text in own):
        raise ConfigError(f"{BASE_LEARNER_FILE} is set, and --base-learner trains one: leave one out")

    # where the first stage leaves its checkpoint is known once the second's folder is
    provisional = f"{BASE_LEARNER_FILE}={FOLDER}/{BEST}"
    config = load_config(name, [*(text for text in own if text not in weights), provisional])
    if config.run.dir is None:
        raise ConfigError("run.dir is not set: give the run's folder in the file or as run.dir=...")

    try:
        base = load_base_config(base_name, [*weights, *of_base])
        plain = base.to_plain()
        told = {_key(text) for text in (*weights, *of_base)} | {WEIGHTS}
        for key, value in flatten(config.to_plain()).items():
            section, _, option = key.partition(".")
            if (key in SHARED_KEYS or section == SHARED_SECTION) and key not in told:
                plain[section][option] = value
        if RUN_FOLDER not in told:
            plain["run"]["dir"] = str(Path(config.run.dir) / FOLDER)
        base = config_from_plain(plain, (), BaseConfig)
    except ConfigError as error:
        raise ConfigError(f"in the base learner: {error}") from error
    _require_common_ground(base, config)
    checkpoint = str(Path(str(base.run.dir)) / BEST)
    return base, replace(config, method=replace(config.method, base_learner=checkpoint))


def train_two_stages(base: BaseConfig, config: Config, *, resume: bool, console: Console) -> Outcome:
    """Train ``base``, then ``config``; what :func:`load_two_stages` returns. With ``resume`` an unfinished first stage
    goes on and a finished one is left as it is, when its settings are these. The outcome is that of the stage that ended
    last: the first one's when a signal stopped it.

    Arguments and errors as of :func:`train`; what is wrong with the second stage is said before the first begins.
    """
    speaker = console if launched_rank() == 0 else Console(quiet=True)
    require_run_folder(config, resume=resume)
    if not Path(str(config.method.base_learner)).exists():
        if (Path(str(config.run.dir)) / LAST).is_file():  # it holds what it took from the first stage
            return train(config, resume=resume, console=console)
        _require_sound(config, speaker)
    if resume and _is_finished(base):
        _say(speaker, f"first stage: finished, in {base.run.dir}")
    else:
        _say(speaker, f"first stage: a base learner in {base.run.dir}")
        outcome = train(base, resume=resume, console=console)
        if not outcome.is_finished or outcome.is_asked_to_stop:
            return replace(outcome, is_finished=False)
        _say(speaker, outcome.sentence)
    _say(speaker, f"second stage: {config.method.name} in {config.run.dir}")
    return train(config, resume=resume, console=console)


def _is_finished(base: BaseConfig) -> bool:
    """Whether the first stage has reached its end. ConfigError when that was with other settings."""
    folder = Path(str(base.run.dir))
    lines = read_journal(folder / LOG)
    if not lines or lines[-1]["kind"] != "finished":
        return False
    require_same_run(base, load_checkpoint(folder / BEST), folder / BEST)
    return True


def _require_common_ground(base: BaseConfig, config: Config) -> None:
    """A base learner of another fold or backbone would be refused only when it is trained."""
    first, second = flatten(base.to_plain()), flatten(config.to_plain())
    for key in second:
        is_ground = key in ("data.folds", "data.fold") or key.partition(".")[0] == SHARED_SECTION
        if is_ground and key != WEIGHTS and first[key] != second[key]:
            raise ConfigError(f"{key} is {second[key]!r}, but {BASE_PREFIX}{key} is {first[key]!r}: expected the same")


def _require_sound(config: Config, console: Console) -> None:
    """Raise now what the second stage would raise after the first has been trained."""
    training_sampler(config, console=console)
    validation_sampler(config, seed=config.validation.seed, console=console)
    with torch.device("meta"):  # costs no memory, and no decomposition
        build_model(config, pretrained=False)


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _key(assignment: str) -> str:
    return assignment.partition("=")[0]
