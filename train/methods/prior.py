"""The prior mask of PFENet (Tian et al. 2020, section 3.2): how much each query position looks like the support
object. Gradient flows through all of it: it is the only way by which layer 4 learns. Knows no backbone."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from svf_fast import functional, reference

CosineForm = Literal["streaming", "matrix"]
# streaming never holds the (query positions × support positions) matrix; matrix is the released form, for comparisons
MAX_COSINE: dict[CosineForm, Callable[..., Tensor]] = {
    "streaming": functional.max_cosine,
    "matrix": reference.max_cosine_matrix,
}
EPSILON = 1e-7


def prior_mask(query: Tensor, support: Tensor, mask: Tensor, *, cosine: CosineForm = "streaming") -> Tensor:
    """Largest cosine of each query position to any position of the masked support, min-max normalised per picture.
    query [B, C, h, w], support [B, C, hs, ws], mask [B, 1, hs, ws] that multiplies ``support`` -> [B, 1, h, w] in [0,
    1]."""
    best = MAX_COSINE[cosine](query, support, mask=mask, eps=EPSILON)  # [B, h·w]
    lowest = best.min(dim=1, keepdim=True).values
    highest = best.max(dim=1, keepdim=True).values
    normalised = (best - lowest) / (highest - lowest + EPSILON)
    return normalised.unflatten(1, (1, *query.shape[-2:]))
