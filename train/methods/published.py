"""Whole checkpoints of PFENet, BAM and the SVF paper's baseline, as their authors' code writes them, into a method."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from svf_fast.train.backbones.weights import load_backbone_state, state_of
from svf_fast.train.methods.meta_learner import MetaLearner


def load_published(method: MetaLearner, source: Mapping[str, Tensor] | str | Path) -> None:
    """Fill backbone and head of an untuned ``method`` from a state dict or a file with the published keys, under a
    ``module.`` prefix or not, wrapped in ``{"state_dict": …}`` or not; a second copy of the backbone (``layer0p`` …) and
    a ``kshot_rw`` that the method does not have are passed by.

    Raises FileNotFoundError, or ValueError when the file cannot be read, or when keys or shapes are not exactly those
    of the method, naming what is missing and what is superfluous; the method is then unchanged.
    """
    state, name = state_of(source)
    if any(key.endswith(".vector_S") for key in state):
        raise ValueError(
            f"{name} holds layers of the SVF authors' code (vector_S), expected whole convolutions: convert the method, then "
            "svf_fast.load_svf_pytorch reads them"
        )
    for key in list(state):
        stage, _, rest = key.partition(".")
        original = f"{stage.removesuffix('p')}.{rest}"
        # the SVF authors' BAM keeps its backbone a second time for the base branch: layer0p …
        if stage.startswith("layer") and stage.endswith("p") and original in state:
            if not torch.equal(state[key], state[original]):
                raise ValueError(
                    f"{name} holds {key} beside another {original}: it is of a tuned method, expected an untuned one"
                )
            del state[key]
        # and their baseline registers BAM's weighting of shots, which it never uses
        elif stage == "kshot_rw" and not hasattr(method, stage):
            del state[key]
    load_backbone_state(method, state, source=name, owner=type(method).__name__)
