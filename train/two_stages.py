"""A few-shot method and the base learner that it starts from, trained one after the other as one job (BAM's two stages)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from svf_fast.train.config import BaseConfig, Config, ConfigError, config_from_plain, load_base_config, load_config
from svf_fast.train.engine import BEST, Outcome
from svf_fast.train.runs import require_run_folder, train
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
    "run.tensorboard",
)
SHARED_SECTION = "backbone"


def load_two_stages(name: str, base_name: str, overrides: Sequence[str]) -> tuple[BaseConfig, Config]:
    """Both stages' configurations. ``overrides`` are the second's; those that begin with ``base.`` are the first's alone, and
    what :data:`SHARED_KEYS` and the section ``backbone`` hold in the second goes for the first as well. Pre-trained weights
    go into the first stage, whose best checkpoint the second begins with. Errors as of :func:`load_config`."""
    own = [each for each in overrides if not each.startswith(BASE_PREFIX)]
    base_own = [each.removeprefix(BASE_PREFIX) for each in overrides if each.startswith(BASE_PREFIX)]
    weights = [each for each in own if each.startswith("backbone.weights=")]
    given = [each for each in own if each.startswith(("method.base_learner=", "run.dir="))]
    if any(each.startswith("method.base_learner=") for each in given):
        raise ConfigError("method.base_learner is set, and --base-learner trains one: leave one out")
    # what the first stage leaves is known only with the run's folder
    second = load_config(name, [*(each for each in own if each not in weights), f"method.base_learner={FOLDER}/{BEST}"])
    if not second.method.takes_base_learner or second.run.dir is None:
        missing = "run.dir is not set: give the run's folder" if second.run.dir is None else f"{name} takes none"
        raise ConfigError(f"--base-learner: {missing}")
    folder = Path(second.run.dir) / FOLDER
    second = replace(second, method=replace(second.method, base_learner=str(folder / BEST)))

    base = load_base_config(base_name, [*weights, *base_own]).to_plain()
    told = {each.partition("=")[0] for each in (*weights, *base_own)}
    for key, value in flatten(second.to_plain()).items():
        section, _, field = key.partition(".")
        if (key in SHARED_KEYS or section == SHARED_SECTION) and key not in told and key != "backbone.weights":
            base[section][field] = value
    base["run"]["dir"] = str(folder)
    return config_from_plain(base, (), BaseConfig), second


def train_two_stages(base: BaseConfig, config: Config, *, resume: bool, console: Console) -> Outcome:
    """Train ``base``, then ``config``; the outcome is that of the last stage that ran. Arguments and errors as of
    :func:`train`."""
    require_run_folder(config, resume=resume)
    console.print("first stage: the base learner", highlight=False)
    outcome = train(base, resume=resume, console=console)
    if not outcome.is_finished:
        return outcome
    console.print(f"{outcome.sentence}\nsecond stage: {config.method.name}", highlight=False, soft_wrap=True)
    return train(config, resume=resume, console=console)
