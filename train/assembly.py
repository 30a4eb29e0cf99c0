"""From a configuration to the things it names: splits, episode samplers, a method with its tuning strategy applied.
The one place that knows both the configuration's keys and the constructors behind them."""

from dataclasses import dataclass

import torch

from svf_fast.train.backbones import build_backbone, load_backbone_weights
from svf_fast.train.config import Config, ConfigError
from svf_fast.train.data.episodes import EpisodeSampler
from svf_fast.train.data.transforms import Augmentation
from svf_fast.train.data.voc import VOCFolder, pascal_fold
from svf_fast.train.methods import MetaLearner, build_method
from svf_fast.train.tuning import ParameterGroup, Strategy, build_strategy


@dataclass(frozen=True)
class Model:
    """A method whose trainable parameters are those of its tuning strategy, and their optimiser groups."""

    method: MetaLearner
    groups: list[ParameterGroup]


def build_model(config: Config, *, pretrained: bool) -> Model:
    """The method on its backbone, on the CPU, tuned as the configuration says; random weights depend on ``run.seed``
    only.

    ``pretrained=False`` does not read ``backbone.weights``: for a model whose state comes from a checkpoint.
    """
    backbone = build_backbone(config.backbone, seed=config.run.seed)
    if pretrained and config.backbone.weights is not None:
        load_backbone_weights(backbone, config.backbone.weights)
    options = config.method
    method = build_method(
        options.name,
        backbone,
        head_width=options.head_width,
        prior_layer=options.prior_layer,
        shot_reduction=options.shot_reduction,
        recompute=options.recompute,
        seed=config.run.seed,
    )
    # the layout that fused kernels read; maps take it from the first weight on
    method = method.to(memory_format=torch.channels_last)
    strategy = _strategy(config)
    strategy.apply(method)
    svf = config.tuning.strategy == "svf"
    scale = config.optimiser.svf_lr_scale if svf else config.optimiser.backbone_lr_scale
    return Model(method, strategy.parameter_groups(method, backbone_lr_scale=scale))


def training_sampler(config: Config) -> EpisodeSampler:
    """Episodes of the fold's base classes with augmentation. ConfigError when they do not fill one batch."""
    data = config.data
    fold = pascal_fold(data.fold)
    dropped = fold.novel if data.drop_novel_images else ()
    split = _folder(config).split(
        data.train_list.replace("{fold}", str(data.fold)), fold.base, drop_images_with=dropped
    )
    if len(split) < data.batch:
        raise ConfigError(f"data.batch is {data.batch}, but {split.list_file} leaves {len(split)} training images")
    augmentation = Augmentation(scale_range=data.scale_range)
    return EpisodeSampler(split, data.shots, data.size, config.run.seed, augmentation)


def validation_sampler(config: Config, *, seed: int) -> EpisodeSampler:
    """Episodes of the fold's novel classes under the test transform."""
    data = config.data
    split = _folder(config).split(data.val_list.replace("{fold}", str(data.fold)), pascal_fold(data.fold).novel)
    return EpisodeSampler(split, config.validation.shots or data.shots, data.size, seed)


def base_rates(config: Config, groups: list[ParameterGroup]) -> dict[str, float]:
    """The learning rate of each group, by name, before the schedule: ``base_lr · lr_scale`` times the group's scale.

    ``lr_scale`` stands apart because PFENet's and BAM's code writes one rate in its files and multiplies it by ten
    before use; both numbers stay visible.
    """
    base_lr = config.optimiser.base_lr * config.optimiser.lr_scale
    return {group["name"]: base_lr * group["lr_scale"] for group in groups}


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one; ConfigError when a GPU is asked for that PyTorch does not see."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device is {name}, but PyTorch sees {torch.cuda.device_count()} GPUs: use run.device=cpu"
        )
    return device


def _folder(config: Config) -> VOCFolder:
    if config.data.root is None:
        raise ConfigError("data.root is not set: give the data's folder in the file or as data.root=...")
    return VOCFolder(config.data.root)


def _strategy(config: Config) -> Strategy:
    if config.tuning.strategy == "svf":
        return build_strategy("svf", save=config.tuning.save)
    return build_strategy(config.tuning.strategy)
