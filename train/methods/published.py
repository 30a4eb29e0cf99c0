"""Whole checkpoints of PFENet, BAM and the SVF paper's baseline, as their authors' code writes them, into a method."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from svf_fast.train.backbones.weights import load_backbone_state, state_of
from svf_fast.train.methods.meta_learner import MetaLearner


def load_published(method: MetaLearner, source: Mapping[str, Tensor] | str | Path) -> None:
    """Fill backbone and head of an untuned ``method`` from a state dict or a file with the published keys, under a
    ``module.`` prefix or not, wrapped in ``{"state_dict": …}`` or not.

    Raises FileNotFoundError, or ValueError when the file cannot be read, or when keys or shapes are not exactly those
    of the method, naming what is missing and what is superfluous; the method is then unchanged.
    """
    state, name = state_of(source)
    load_backbone_state(method, state, source=name, owner=type(method).__name__)
