"""Singular Value Fine-tuning (SVF): W = U diag(s) Vᵀ, train only s, keep next to nothing for backward."""

from pathlib import Path

# In a source checkout the sub-packages kernels/, train/ and bench/ are siblings of this folder (setup.py maps them);
# this lets `import svf_fast` work there without an installation.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))

from svf_fast import functional  # noqa: E402
from svf_fast.backends import backend  # noqa: E402
from svf_fast.convert import convert, disabled, merge, singular_values  # noqa: E402
from svf_fast.io import load_singular_values, load_svf_pytorch, save_singular_values  # noqa: E402
from svf_fast.modules import SVFConv2d, SVFLinear  # noqa: E402
from svf_fast.summary import summary  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "SVFConv2d",
    "SVFLinear",
    "__version__",
    "backend",
    "convert",
    "disabled",
    "functional",
    "load_singular_values",
    "load_svf_pytorch",
    "merge",
    "save_singular_values",
    "singular_values",
    "summary",
]
