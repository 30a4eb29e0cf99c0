"""Singular Value Fine-tuning (SVF): W = U diag(s) Vᵀ, train only s, keep next to nothing for backward."""

from pathlib import Path

# In a source checkout the sub-packages kernels/, train/ and bench/ are siblings of this folder (setup.py maps them);
# this lets `import svf_fast` work there without an installation.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))
