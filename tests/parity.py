"""Checks every golden file of a folder against the methods, transforms and scores of svf_fast.train.

    python tests/parity.py DIR [--only PATTERN] [--contiguous]

Golden files (the methods' specification, section 10) are pairs ``{model}_{backbone}_{K}shot.json`` and ``.npz``, and
``data.json`` and ``.npz``. One line for each; below a miss, every quantity over its limit and everything in the file that
nothing was compared with. Exit status 1 on any miss, and on a folder without golden files.
"""

import argparse
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import cv2
import torch
from parity_rules.account import Account, Golden, GoldenError, read_golden
from parity_rules.methods import SETTINGS, check_model
from parity_rules.models import ARCHITECTURES, MODELS
from parity_rules.transforms import check_data
from rich.console import Console

DATA = "data"
MODEL_NAME = re.compile(rf"({'|'.join(MODELS)})_({'|'.join(ARCHITECTURES)})_(\d+)shot")
BASE_LEARNER = "pspnet"
# without which a file says too little to be met: prefixes of names
REQUIRED_OF_DATA = ("items/", "evaluation/")
REQUIRED_OF_A_MODEL = (
    "state_dict",
    "losses/fixbn/",
    "losses/bntrain/",
    "grad_norms/fixbn/",
    "grad_norms/bntrain/",
    "bntrain/",
)
REQUIRED_OF_A_METHOD = ("grad_norms/backbone_conv_fixbn/", "svf/S/", "svf/dS/")
# and what the line says is not there
USUAL_OF_A_MODEL = (
    "losses/fixbn_float64_run/",
    "bntrain_num_batches_tracked/",
    "grad_fixbn/",
    "grad_bntrain/",
    "noise/",
)
USUAL_OF_A_METHOD = ("losses/backbone_grad_fixbn/",)
GOLDEN_SUFFIXES = (".json", ".npz")
BESIDE_GOLDEN_FILES = (".py", ".md", ".txt")  # may lie in the folder


def main(arguments: list[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="check only files whose name fits, like 'bam_*'")
    parser.add_argument(
        "--contiguous", action="store_true", help="models in PyTorch's memory format, not channels_last"
    )
    options = parser.parse_args(arguments)
    memory_format = torch.contiguous_format if options.contiguous else torch.channels_last
    return check_folder(options.folder, options.only, memory_format)


def check_folder(folder: Path, only: str = "*", memory_format: torch.memory_format = torch.channels_last) -> int:
    """Prints a line for each golden file; the exit status."""
    if not folder.is_dir():
        print(f"MISS {folder} is no folder")
        return 1
    names = sorted({file_name(path) for path in folder.iterdir() if not lies_beside(path)})
    names = [name for name in names if fnmatch(name, only)]
    if not names:
        print(f"MISS {folder} holds no golden file" + ("" if only == "*" else f" whose name fits {only}"))
        return 1
    width = max(map(len, names))
    missed = 0
    for name in names:
        ok, text = check_file(folder / name, width, memory_format)
        missed += not ok
        print(text, flush=True)
    print(f"{len(names) - missed} of {len(names)} files ok (PyTorch {torch.__version__}, OpenCV {cv2.__version__})")
    return int(missed > 0)


def check_file(path: Path, width: int, memory_format: torch.memory_format) -> tuple[bool, str]:
    """Of ``DIR/NAME`` without a suffix: whether it is met, and what to print."""
    try:
        account = checked_account(path, memory_format)
    except GoldenError as error:
        return False, f"MISS {path.name:<{width}}   {error}"
    ok = not account.misses
    worst = max(account.comparisons, key=lambda comparison: comparison.share, default=None)
    share = f"largest {worst.share:.2f} of its limit: {worst}" if worst else "nothing compared"
    absent = f"   (not in the file: {', '.join(account.absent)})" if account.absent else ""
    line = (
        f"{'ok  ' if ok else 'MISS'} {path.name:<{width}}  {len(account.comparisons):>4} quantities   {share}{absent}"
    )
    return ok, "\n".join([line, *(f"         {miss}" for miss in account.misses)])


def checked_account(path: Path, memory_format: torch.memory_format) -> Account:
    """GoldenError where the file cannot be read or is none that is known."""
    known = MODEL_NAME.fullmatch(path.name)
    if not known and path.name != DATA:
        raise GoldenError("is no golden file's name: neither data nor {model}_{backbone}_{K}shot")
    account = Account(read_golden(path.with_name(f"{path.name}.json")))
    account.require(*(REQUIRED_OF_DATA if not known else REQUIRED_OF_A_MODEL))
    if known:
        account.note_absent(*USUAL_OF_A_MODEL)
    if known and known[1] != BASE_LEARNER:
        account.require(*REQUIRED_OF_A_METHOD)
        account.note_absent(*USUAL_OF_A_METHOD)
    if known:
        require_settings(account.golden, *known.groups())
        passes = check_model(account, memory_format)
    else:
        passes = check_data(account)
    with Console(stderr=True).status(path.name) as status:
        for what, run in passes:
            status.update(f"{path.name}: {what}")
            try:
                run()
            except Exception as error:  # whatever a method does wrong is a miss of its file, and the other passes go on
                sentence = str(error) if isinstance(error, GoldenError) else f"{type(error).__name__}: {error}"
                account.complaints.append(f"{what} could not be compared: {sentence}")
    account.close_books()
    return account


def require_settings(golden: Golden, model: str, backbone: str, shots: str) -> None:
    """GoldenError unless the JSON says how to build the model, and it is the one of the file's name."""
    settings = golden.settings
    for key in SETTINGS:
        if key not in settings:
            raise GoldenError(f"the JSON has no {key}")
    named = {"model": model, "backbone": backbone, "shot": int(shots) if settings["shot"] is not None else None}
    for key, expected in named.items():
        if settings[key] != expected:
            raise GoldenError(f"the JSON's {key} is {settings[key]!r}, but the file's name says {expected!r}")


def file_name(path: Path) -> str:
    """What a golden file's two halves have in common; any other file's whole name."""
    return path.stem if path.suffix in GOLDEN_SUFFIXES else path.name


def lies_beside(path: Path) -> bool:
    return path.suffix in BESIDE_GOLDEN_FILES or path.name == "__pycache__"


if __name__ == "__main__":
    sys.exit(main())
