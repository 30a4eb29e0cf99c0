"""Segmentation cues (SVF paper, section 4.4, Figures 4 and 5): what a left factor of a converted convolution responds to, and
whether that lies on the object. Knows methods and episodes; no run, no file that it writes and no plot.

The paper does not say how a column of U becomes a picture. Here: a converted convolution is y = U diag(s) Vᵀx, and the columns
of U are orthonormal, so that cue i answers at a position with uᵢᵀy = sᵢzᵢ, z = Vᵀx, bias and BatchNorm left out: a map [h, w].
Its sign is arbitrary (uᵢ and vᵢ flip together), so the cue's response is the magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

import svf_fast
from svf_fast.train.data import VOID
from svf_fast.train.data.episodes import Episode, EpisodeSampler, Order
from svf_fast.train.evaluation import logits_at_original_size
from svf_fast.train.methods import MetaLearner
from svf_fast.train.spectra import MovedValue, moved_values


@dataclass(frozen=True)
class Shown:
    """An episode's query, and the response [H, W] of each cue to it at its original size: fallen cues, then risen ones."""

    episode: Episode
    responses: Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class CueStudy:
    """The cues of one convolution whose singular values ``fallen`` and ``risen`` most (``study_cues``), and where all of its cues
    respond.

    ``preferences`` [pictures, cues] are those of ``object_preferences``, a column for each of ``cues``, which leave out
    singular values that began near zero.
    """

    cues: list[MovedValue]
    fallen: list[MovedValue]
    risen: list[MovedValue]
    preferences: NDArray[np.float64]
    shown: list[Shown]

    def of(self, cues: Sequence[MovedValue]) -> NDArray[np.float64]:
        """Mean preference of some of the cues in each picture [pictures]."""
        return np.asarray(self.preferences[:, [self.cues.index(cue) for cue in cues]].mean(axis=1))

    @property
    def rank_correlation(self) -> float:
        """Spearman's, over all cues: of the relative change and the preference, mean over the pictures. Above 0: the more a cue
        rose, the more it lies on objects."""
        return float(spearmanr([cue.change for cue in self.cues], self.preferences.mean(axis=0)).statistic)


def study_cues(
    method: MetaLearner,
    name: str,
    layer: svf_fast.SVFConv2d,
    source: EpisodeSampler,
    order: Order,
    *,
    pictures: int,
    shown: int,
    amount: int,
    watch: Callable[[int, int], None],
) -> CueStudy:
    """The cues of ``layer``, the converted convolution of that name in ``method``, on the queries of the first ``pictures``
    validation episodes of ``source`` (at most each of its pictures once), their class being the object.

    ``amount`` cues that fell and that rose most, relative to the value before: fewer where fewer did; where none fell those
    that rose least, and the other way round. ``shown`` pictures, the first of each class, come with the responses. ``watch``
    is told how many pictures of how many are done. ValueError where the values have not moved.
    """
    cues = moved_values(name, layer)
    fallen, risen = _extremes(cues, amount)
    keys = source.validation_indices(min(pictures, len(source)), source.seed, order)
    columns = [cue.rank - 1 for cue in cues]  # factors come in the order of falling singular values
    preferences, first_of_class = [], dict[int, Shown]()
    for done, key in enumerate(keys, 1):
        episode = source.episode(*key)
        if (episode.query_label == 1).any():  # the test transform may lose a very small object
            response = responses(layer, input_of(method, name, episode.query_image[None]))[0].cpu()
            preferences.append(object_preferences(response[columns], episode.query_label).numpy())
            if episode.class_id not in first_of_class and len(first_of_class) < shown:
                maps = [relative_response(response[cue.rank - 1], episode.original_label) for cue in (*fallen, *risen)]
                first_of_class[episode.class_id] = Shown(episode, maps)
        watch(done, len(keys))
    if not preferences:
        raise ValueError(
            f"{source.split.list_file}: no object of the {len(keys)} pictures is left at size {source.size}"
        )
    in_order = [first_of_class[class_id] for class_id in sorted(first_of_class)]
    return CueStudy(cues, fallen, risen, np.stack(preferences), in_order)


def input_of(method: MetaLearner, name: str, image: Tensor) -> Tensor:
    """What the backbone's module of that name takes in when the method, in the mode it is in, sees image [B, 3, S, S];
    no stage behind the module runs."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    # the hook makes a fused block run layer by layer while it is there
    hook = method.get_submodule(name).register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            features = image.to(next(method.parameters()).device)
            for stage in method.stages[: method.stages.index(name.partition(".")[0]) + 1]:
                features = method.get_submodule(stage)(features)
    finally:
        hook.remove()
    return seen[0]


def responses(layer: svf_fast.SVFConv2d, x: Tensor) -> Tensor:
    """|sᵢ zᵢ| of every cue, [B, Ci, H, W] -> [B, R, h, w]."""
    geometry, sides = layer.plan()
    with torch.no_grad():
        z = functional.conv2d(layer.pad(x, sides), layer.v, None, *geometry)
        return (z * layer.singular_values()[:, None, None]).abs()


def relative_response(response: Tensor, label: Tensor) -> NDArray[np.float32]:
    """A cue's response [h, h] to the canvas of the test transform -> [H, W], over the picture alone (resized as logits are),
    divided by its maximum there; zeros stay zeros."""
    shown = logits_at_original_size(response[None], label)[0]
    return (shown / shown.max().clamp_min(torch.finfo(shown.dtype).tiny)).numpy()


def object_preferences(response: Tensor, label: Tensor) -> Tensor:
    """The share of each cue's response that lies on the object, over the object's share of the picture: 1 is no preference.
    response [R, h, h] -> [R] float64.

    label [S, S] is the test transform's, on the canvas that the network saw: 1 on the object, void where nothing is counted, which
    is all around the picture. A cue that answers nowhere has no preference.
    """
    is_object, is_counted = (mask.double() for mask in (label == 1, label != VOID))
    # resizing is linear: one mask goes back to the responses' size instead of all responses to the mask's
    response = response.double()
    on_object, in_all = (
        (response * _resized_back(mask, response.shape[-1])).sum(dim=(1, 2)) for mask in (is_object, is_counted)
    )
    share = on_object / in_all / (is_object.sum() / is_counted.sum())
    return torch.where(in_all > 0, share, 1.0)


def _resized_back(mask: Tensor, size: int) -> Tensor:
    """The weight [size, size] of each place of a response in the sum of mask [S, S] times the response at that size: the transpose
    of the bilinear resize of logits."""
    along = functional.interpolate(
        torch.eye(size, dtype=mask.dtype)[None, None], (mask.shape[0], size), mode="bilinear", align_corners=True
    )[0, 0]  # [S, size]
    return along.T @ mask @ along


def _extremes(cues: Sequence[MovedValue], amount: int) -> tuple[list[MovedValue], list[MovedValue]]:
    """The lowest and the highest relative changes, most extreme first, at most ``amount`` of each; where some did, only those
    that fell and those that rose."""
    by_change = sorted(cues, key=lambda cue: cue.change)
    lowest, highest = by_change[:amount], by_change[::-1][:amount]
    if lowest[0].change == highest[0].change:
        raise ValueError(
            f"the singular values of {cues[0].layer} have not moved apart, expected those of a tuned method"
        )
    fallen = [cue for cue in lowest if cue.change < 0] or lowest
    risen = [cue for cue in highest if cue.change > 0] or highest
    return fallen, risen
