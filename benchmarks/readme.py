"""The tables (tables.py) of both READMEs, here and above, written from benchmarks/results/*.csv; `--check` only compares.

A block between `<!-- table: KIND CARD ... -->` and `<!-- end -->` holds the table that TABLES[KIND] makes of
<CARD>.<file>.csv.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import RESULTS
from benchmarks.tables import TABLES

HERE = RESULTS.parent
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md")
BLOCK = re.compile(r"(<!-- table: ([\w .:*-]+?) -->\n).*?(<!-- end -->)", re.S)


def fill(document: Path) -> str:
    """Its text with every block made anew. Raises KeyError for a kind of table that is none."""

    def block(match: re.Match[str]) -> str:
        kind, *arguments = match[2].split()
        table = TABLES[kind](*arguments)
        if document.parent == HERE:  # tables link from the README's folder
            table = table.replace("](benchmarks/", "](")
        return f"{match[1]}{table}\n{match[3]}"

    return BLOCK.sub(block, document.read_text())


def main(argv: Sequence[str]) -> int:
    new = {document: fill(document) for document in DOCUMENTS}
    if "--check" in argv:
        return int(any(document.read_text() != text for document, text in new.items()))
    for document, text in new.items():
        document.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
