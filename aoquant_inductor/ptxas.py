"""`python -m aoquant_inductor.ptxas` prints the path of the ptxas that pip installed, for TRITON_PTXAS_PATH."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from unittest import mock

from aoquant_inductor.card import ptxas_version, version_of

PACKAGE = "nvidia-cuda-nvcc"
VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


def installed() -> Path | None:
    """The ptxas of the package that the extra `cuda` asks for."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    listed = [Path(str(package.locate_file(file))) for file in package.files or () if file.name == "ptxas"]
    beside = sorted(Path(str(package.locate_file("nvidia"))).glob("*/bin/ptxas"))
    return next((path for path in (*listed, *beside) if path.is_file()), None)


def main() -> int:
    """Exit code 1, with a sentence on stderr, where there is none or Triton's own is newer."""
    path = installed()
    if path is None:
        print('no ptxas is installed beside Triton\'s own: pip install "aoquant-inductor[cuda]".', file=sys.stderr)
        return 1
    with mock.patch.dict(os.environ):
        for variable in VARIABLES:
            os.environ.pop(variable, None)
        found, own = version_of(str(path)), ptxas_version(90)
    if found < own:
        found_text, own_text = (".".join(map(str, version)) for version in (found, own))
        print(f"{path} is ptxas {found_text}, older than Triton's own, which is {own_text}.", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
