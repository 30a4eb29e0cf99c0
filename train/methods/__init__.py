"""Few-shot segmentation methods by name. A new method is one file here and one line below."""

import inspect
from typing import Any

from svf_fast.train.backbones import Backbone
from svf_fast.train.methods.baseline import Baseline
from svf_fast.train.methods.meta_learner import MetaLearner

__all__ = ["METHODS", "Baseline", "MetaLearner", "build_method"]

METHODS = {"baseline": Baseline}


def build_method(name: str, backbone: Backbone, **options: Any) -> Baseline:
    """The method of that name on ``backbone``; ``options`` are its constructor's keywords. ValueError on an unknown
    one."""
    if name not in METHODS:
        raise ValueError(f"method is {name!r}, expected one of {', '.join(METHODS)}")
    known = [option for option in inspect.signature(METHODS[name]).parameters if option != "backbone"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"method {name!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return METHODS[name](backbone, **options)
