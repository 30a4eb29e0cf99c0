"""BAM's meta learner (Lang et al. 2022), which is also the SVF paper's whole baseline: query features,
prototype and prior through an ASPP. State-dict keys are those of the authors' code. Knows no loss."""

from collections.abc import Sequence

from torch import Tensor

from svf_fast.train.methods.layers import ASPP, ConcatConvReLU, classifier, residual_pair
from svf_fast.train.methods.meta_learner import MetaLearner, require_width


class ASPPLearner(MetaLearner):
    """Adds ``init_merge``, ``ASPP_meta``, ``res1_meta``, ``res2_meta`` and ``cls_meta`` to the reductions."""

    def build_head(self, width: int, dilations: Sequence[int]) -> None:
        """Register the head's modules, in the published order."""
        require_width(width)
        self.down_query = ConcatConvReLU(self.middle_channels, width)
        self.down_supp = ConcatConvReLU(self.middle_channels, width)
        self.init_merge = ConcatConvReLU(2 * width + 1, width)
        self.ASPP_meta = ASPP(width, dilations)
        self.res1_meta = ConcatConvReLU((2 + len(dilations)) * width, width)
        self.res2_meta = residual_pair(width)
        self.cls_meta = classifier(width)

    def decide(self, query: Tensor, prototype: Tensor, prior: Tensor) -> Tensor:
        """query [B, width, h, w], prototype [B, width, 1, 1], prior [B, 1, h, w] -> logits [B, 2, h, w]."""
        merged = self.init_merge(query, prototype, prior)  # the prototype expanded over the map
        context = self.res1_meta(*self.ASPP_meta(merged))
        refined = context + self.res2_meta(context)
        return self.cls_meta(refined)
