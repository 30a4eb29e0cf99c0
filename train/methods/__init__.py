"""Few-shot segmentation methods by name. A new method is one file here and one line below."""

import inspect
from typing import Any

from svf_fast.train.backbones import Backbone
from svf_fast.train.methods.bam import BAM
from svf_fast.train.methods.baseline import Baseline
from svf_fast.train.methods.losses import Losses, TrainingBatch
from svf_fast.train.methods.meta_learner import MetaLearner
from svf_fast.train.methods.pfenet import PFENet
from svf_fast.train.methods.pspnet import PSPNet
from svf_fast.train.methods.published import load_published

__all__ = [
    "BAM",
    "METHODS",
    "Baseline",
    "Losses",
    "MetaLearner",
    "PFENet",
    "PSPNet",
    "TrainingBatch",
    "build_method",
    "load_published",
]

METHODS: dict[str, type[MetaLearner]] = {"baseline": Baseline, "pfenet": PFENet, "bam": BAM}


def build_method(name: str, backbone: Backbone, **options: Any) -> MetaLearner:
    """The method of that name on ``backbone``; ``options`` are its constructor's keywords. ValueError on an unknown
    one."""
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, expected one of {', '.join(METHODS)}")
    known = [option for option in inspect.signature(METHODS[name]).parameters if option != "backbone"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"method {name!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return METHODS[name](backbone, **options)
