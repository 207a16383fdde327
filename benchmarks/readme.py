"""The README's tables (tables.py), written from benchmarks/results/*.csv; `--check` only compares.

A block of the README between `<!-- table: KIND CARD ... -->` and `<!-- end -->` holds the table that TABLES[KIND] makes of
<CARD>.<file>.csv.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from benchmarks.measure import RESULTS
from benchmarks.tables import TABLES

README = RESULTS.parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- table: ([\w .:*-]+?) -->\n).*?(<!-- end -->)", re.S)


def fill(text: str) -> str:
    """The README with every block made anew. Raises KeyError for a kind of table that is none."""

    def block(match: re.Match[str]) -> str:
        kind, *arguments = match[2].split()
        return f"{match[1]}{TABLES[kind](*arguments)}\n{match[3]}"

    return BLOCK.sub(block, text)


def main(argv: Sequence[str]) -> int:
    old = README.read_text()
    new = fill(old)
    if "--check" in argv:
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
