"""From a configuration to the things it names: splits, episode samplers, a method with its tuning strategy applied.
The one place that knows both the configuration's keys and the constructors behind them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from svf_fast.train.backbones import Backbone, build_backbone, load_backbone_weights
from svf_fast.train.base_learner import base_learner_state
from svf_fast.train.config import BaseConfig, Config, ConfigError, PicturesConfig, StageConfig
from svf_fast.train.data.base_labels import BasePictures
from svf_fast.train.data.episodes import EpisodeSampler
from svf_fast.train.data.folds import FOLD_RULES, Fold, fold_of, read_folds
from svf_fast.train.data.generalised import GeneralisedSampler
from svf_fast.train.data.split import Split
from svf_fast.train.data.transforms import Augmentation
from svf_fast.train.data.voc import VOCFolder
from svf_fast.train.distributed import Launched
from svf_fast.train.method_config import METHOD_OPTIONS
from svf_fast.train.methods import BAM, MetaLearner, PSPNet, build_method
from svf_fast.train.methods.pspnet import load_base_learner
from svf_fast.train.progress import WorkProgress
from svf_fast.train.tuning import ParameterGroup, Strategy, build_strategy


@dataclass(frozen=True)
class Model:
    """A method whose trainable parameters are those of its tuning strategy, and their optimiser groups."""

    method: MetaLearner
    strategy: Strategy
    groups: list[ParameterGroup]


def build_model(config: Config, *, pretrained: bool) -> Model:
    """The method on its backbone, on the CPU, tuned as the configuration says; random weights depend on ``run.seed``
    only.

    ``pretrained=False`` reads neither ``backbone.weights`` nor ``method.base_learner``: for a model whose state comes
    from a checkpoint.
    """
    backbone = build_backbone(config.backbone, seed=config.run.seed)
    if pretrained and config.backbone.weights is not None:
        load_backbone_weights(backbone, config.backbone.weights)
    method = build_method(config.method.name, backbone, **_method_options(config))
    if pretrained and config.method.base_learner is not None:
        _load_base_learner(method, backbone, config)
    # the layout that fused kernels read; maps take it from the first weight on
    method = method.to(memory_format=torch.channels_last)
    strategy = build_strategy(config.tuning.strategy, **config.tuning.options)
    strategy.apply(method)
    groups = strategy.parameter_groups(
        method,
        backbone_lr_scale=config.optimiser.backbone_lr_scale,
        svf_lr_scale=config.optimiser.svf_lr_scale,
    )
    return Model(method, strategy, groups)


def _load_base_learner(method: MetaLearner, backbone: Backbone, config: Config) -> None:
    """Fill the method's backbone, and BAM's base branch, from ``method.base_learner``."""
    path, fold = str(config.method.base_learner), fold_in(config.data)
    state = base_learner_state(path, fold, config.backbone)
    try:
        if isinstance(method, BAM):
            method.load_base_learner(state)
        else:  # the stages are the method's own modules: a base learner around them fills them, and is gone again
            load_base_learner(PSPNet(backbone, classes=len(fold.base)), state)
    except ValueError as error:
        raise ConfigError(f"method.base_learner={path} is of no use here: {error}") from error


def _method_options(config: Config) -> dict[str, Any]:
    """Keywords of the method's constructor; what the configuration leaves at null stays the method's default."""
    method = config.method
    options: dict[str, Any] = {
        "head_width": method.head_width,
        "prior_layer": method.prior_layer,
        "recompute": method.recompute,
        "bn_mode": method.bn_mode,
        "prior_masking": method.prior_masking,
        "seed": config.run.seed,
    }
    for name in METHOD_OPTIONS:
        if getattr(method, name) is not None:
            options[name] = getattr(method, name)
    if method.name == "bam":
        options |= {"base_classes": len(fold_in(config.data).base), "shots": config.data.shots}
    return options


def fold_in(data: PicturesConfig) -> Fold:
    """The fold that ``data.folds`` and ``data.fold`` name. ConfigError when ``data.root`` is needed for it and not set,
    ValueError or FileNotFoundError for a file of own folds that is of no use."""
    if data.folds in FOLD_RULES:
        return fold_of(data.folds, data.fold)
    if data.root is None:
        raise ConfigError(f"data.root is not set, but data.folds={data.folds} is a file of the data's folder: give it")
    path = Path(data.root) / data.folds
    folds = read_folds(path, VOCFolder(data.root).classes)
    if data.fold >= len(folds):
        raise ConfigError(f"data.fold is {data.fold}, expected 0 to {len(folds) - 1}: the folds of {path}")
    return folds[data.fold]


def training_sampler(config: Config, *, console: Console) -> EpisodeSampler:
    """Episodes of the fold's base classes with augmentation, after a check of their files, which ``console`` shows.
    ConfigError when they do not fill one batch."""
    data = config.data
    fold = fold_in(data)
    dropped = fold.novel if data.drop_novel_images else ()
    split = _checked(VOCFolder.split, data, data.train_list, fold.base, console, dropped=dropped)
    _require_one_batch(split, data)
    augmentation = Augmentation(scale_range=data.scale_range)
    base_classes = _base_classes(config)
    return EpisodeSampler(
        split,
        data.shots,
        data.size,
        config.run.seed,
        augmentation,
        base_classes=base_classes,
        cache_bytes=data.cache_bytes,
    )


def seen_classes_sampler(config: Config, training: EpisodeSampler) -> EpisodeSampler:
    """The episodes of ``training`` as validation would ask for them: under the test transform."""
    return EpisodeSampler(
        training.split,
        config.validation.shots or config.data.shots,
        config.data.size,
        config.validation.seed,
        base_classes=_base_classes(config),
        cache_bytes=config.data.cache_bytes,
    )


def validation_sampler(config: Config, *, seed: int, console: Console) -> EpisodeSampler:
    """Episodes of the fold's novel classes under the test transform; ``console`` as in :func:`training_sampler`."""
    data = config.data
    split = _checked(VOCFolder.split, data, data.val_list, fold_in(data).novel, console)
    shots = config.validation.shots or data.shots
    return EpisodeSampler(
        split, shots, data.size, seed, base_classes=_base_classes(config), cache_bytes=data.cache_bytes
    )


def generalised_sampler(config: Config, *, seed: int, console: Console) -> GeneralisedSampler:
    """Episodes of generalised few-shot segmentation over every picture of the validation list; ``console`` as in
    :func:`training_sampler`."""
    data = config.data
    fold = fold_in(data)
    split = _checked(VOCFolder.whole, data, data.val_list, fold.novel, console)
    return GeneralisedSampler(split, fold.base, data.shots, data.size, seed, cache_bytes=data.cache_bytes)


def build_base_learner(config: BaseConfig, *, pretrained: bool) -> tuple[PSPNet, list[ParameterGroup]]:
    """The base learner with everything trainable, and its optimiser groups; ``pretrained`` as in :func:`build_model`."""
    backbone = build_backbone(config.backbone, seed=config.run.seed)
    if pretrained and config.backbone.weights is not None:
        load_backbone_weights(backbone, config.backbone.weights)
    stages = tuple(f"{stage}." for stage in backbone.channels)
    learner = PSPNet(backbone, classes=len(fold_in(config.data).base), seed=config.run.seed)
    learner = learner.to(memory_format=torch.channels_last)
    named = list(learner.named_parameters())
    head = [parameter for name, parameter in named if not name.startswith(stages)]
    encoder = [parameter for name, parameter in named if name.startswith(stages)]
    scale = config.optimiser.backbone_lr_scale
    return learner, [
        ParameterGroup(name="head", params=head, lr_scale=1.0),
        ParameterGroup(name="backbone", params=encoder, lr_scale=scale),
    ]


def base_training_pictures(config: BaseConfig, *, console: Console) -> BasePictures:
    """The pictures of the training list with augmentation; ``console`` as in :func:`training_sampler`. ConfigError when
    they do not fill one batch."""
    data, fold = config.data, fold_in(config.data)
    dropped = fold.novel if data.base_filter else ()
    split = _checked(VOCFolder.whole, data, data.train_list, fold.base, console, dropped=dropped)
    _require_one_batch(split, data)
    augmentation = Augmentation(scale_range=data.scale_range, crop_keep=data.crop_keep)
    return BasePictures(split, fold.base, data.size, config.run.seed, augmentation, cache_bytes=data.cache_bytes)


def base_validation_pictures(config: BaseConfig, *, console: Console) -> BasePictures:
    """Every picture of the validation list under the test transform; ``console`` as in :func:`training_sampler`."""
    data, fold = config.data, fold_in(config.data)
    split = _checked(VOCFolder.whole, data, data.val_list, fold.base, console)
    return BasePictures(split, fold.base, data.size, config.run.seed, cache_bytes=data.cache_bytes)


def base_rates(config: StageConfig, groups: list[ParameterGroup]) -> dict[str, float]:
    """The learning rate of each group, by name, before the schedule: ``base_lr · lr_scale`` times the group's scale.

    ``lr_scale`` stands apart because PFENet's and BAM's code writes one rate in its files and multiplies it by ten
    before use; both numbers stay visible.
    """
    base_lr = config.optimiser.base_lr * config.optimiser.lr_scale
    return {group["name"]: base_lr * group["lr_scale"] for group in groups}


def choose_device(name: str, here: Launched | None = None) -> torch.device:
    """``auto`` is the first GPU if there is one; of several processes on this machine each has the GPU of its number.
    ConfigError when a GPU is asked for that PyTorch does not see."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and here is not None:
        if device.index is not None:
            raise ConfigError(f"run.device is {name}, one GPU for several processes: use run.device=cuda")
        if here.size > torch.cuda.device_count():
            raise ConfigError(
                f"torchrun has started {here.size} processes on this machine, but PyTorch sees "
                f"{torch.cuda.device_count()} GPUs: start one a GPU"
            )
        return torch.device("cuda", here.rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device is {name}, but PyTorch sees {torch.cuda.device_count()} GPUs: use run.device=cpu"
        )
    return device


def _folder(data: PicturesConfig) -> VOCFolder:
    if data.root is None:
        raise ConfigError("data.root is not set: give the data's folder in the file or as data.root=...")
    folder = VOCFolder(data.root)
    if data.folds in FOLD_RULES and set(folder.classes) != set(FOLD_RULES[data.folds].class_ids):
        raise ConfigError(
            f"data.folds is {data.folds}, a rule for the classes 1 to {FOLD_RULES[data.folds].classes}, but "
            f"{folder.root / 'classes.txt'} lists {len(folder.classes)} classes ({sorted(folder.classes)}): give another "
            "rule, or a JSON file of own folds"
        )
    return folder


def _checked(
    select: Callable[..., Split],
    data: PicturesConfig,
    name: str,
    class_ids: Sequence[int],
    console: Console,
    *,
    dropped: Sequence[int] = (),
) -> Split:
    """What ``select``, a method of the folder, takes of the list ``name``, shown while its files are looked at."""
    folder, list_file = _folder(data), name.replace("{fold}", str(data.fold))
    with WorkProgress(console) as progress:
        watch = progress.watch(f"checking {list_file}")
        return select(folder, list_file, class_ids, drop_images_with=dropped, on_progress=watch)


def _require_one_batch(split: Split, data: PicturesConfig) -> None:
    if len(split) < data.batch:
        raise ConfigError(f"data.batch is {data.batch}, but {split.list_file} leaves {len(split)} training images")


def _base_classes(config: Config) -> tuple[int, ...] | None:
    """Of the fold, where the method asks for base labels."""
    return fold_in(config.data).base if config.method.name == "bam" else None
