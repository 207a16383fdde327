"""The README's tables, of the result files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not in the wheel

from benchmarks import readme, tables_linear


@pytest.mark.parametrize("document", readme.DOCUMENTS, ids=lambda document: document.parent.name)
def test_a_document_holds_the_tables_of_the_result_files(document: Path) -> None:
    """Written by `python -m benchmarks.readme`; a number there that no file has would not survive this."""
    text = document.read_text()
    assert len(readme.BLOCK.findall(text)) >= 5
    assert readme.fill(document) == text


@pytest.mark.parametrize("document", readme.DOCUMENTS, ids=lambda document: document.parent.name)
def test_a_document_links_to_what_is_there(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert len(links) >= 5
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_a_table_takes_the_newest_row_and_leaves_wrong_kernels_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "scheme,n,k,m,kernel,config,us,ratio,note,card,threads,torch,commit\n"
    rows = ["s,8,16,1,a,x,9.0,1.1,,c,1,t,1", "s,8,16,1,a,x,4.0,2.5,,c,1,t,2", "s,8,16,1,a,y,1.0,9.9,WRONG 3,c,1,t,2",
            "s,8,16,1,_int_mm,,2.0,5.1,,c,1,t,2"]
    (tmp_path / "card.tune.csv").write_text(head + "\n".join(rows) + "\n")
    monkeypatch.setattr(tables_linear, "RESULTS", tmp_path)
    table = tables_linear.tune("card", "8x16")
    assert "| s, 8x16 | 4.0 us, 2.50x |" in table
    assert "9.9" not in table and "5.1" not in table


def test_a_table_of_peers_has_ours_and_theirs_of_one_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = "shape,m,scheme,mode,value,ratio,date,card,threads,torch,commit\n"
    wanted = (
        "8x16,1,bf16,default,8,1,1 8x16,1,int8wo,default,3,2.7,1 8x16,1,torchao int8wo,fast,5,1.6,1 "
        "8x16,1,bf16,default,9,1,2 8x16,1,int8wo,default,4.5,2,2 8x16,1,torchao int8wo,fast,18,0.5,2 8x16,4,torchao int8wo,fast,7,1,2 "
        "8x16,1,bf16,default,7,1,3 8x16,1,int8wo,default,3,2.3,3"  # a later run without peers
    )
    (tmp_path / "card.linear.csv").write_text(head + "\n".join(f"{row},c,1,t,1" for row in re.split(r" (?=8x)", wanted)) + "\n")
    monkeypatch.setattr(tables_linear, "RESULTS", tmp_path)
    table = tables_linear.peers("card", "8x16")
    assert "| 8x16, M = 1, int8wo | 9.0 | 4.5 us, 2.00x | 18.0 us, **0.50x** | - |" in table
    assert "M = 4" not in table and "int8wo" not in tables_linear.peers("card", "16x8").split("<sub>")[0]
