"""Template hits: an inline file, the genuine ones against DeepMind's parser, and damage."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from damage import damaged
from hypothesis import given, settings

from foldcore.data.hhr import TemplateHit, parse_hhr, read_hhr
from foldcore.errors import DataError

_HEAD = """\
Query         query of 12
Match_columns 12
Command       hhsearch -i query.a3m

 No Hit                             Prob E-value P-value  Score    SS Cols Query HMM  Template HMM
  1 1ABC_A A PROTEIN                99.8 2.1E-25 2.3E-30  158.4   0.0    7    3-10      5-13  (20)
  2 2xyz_BC Another one             12.5     1.2 2.3E-02    8.4   0.0    3    1-3       1-3    (3)

"""
_HITS = """\
No 1
>1ABC_A A PROTEIN; WITH A LONG NAME {Homo sapiens}
Probab=99.80  E-value=2.1e-25 Score=158.4  Aligned_cols=7 Sum_probs=6.5 Template_Neff=8

Q ss_pred             CCCC
Q query             3 AC-DE    6 (12)
Q Consensus         3 ac~de    6 (12)
                      ||.|+
T Consensus         5 a~cde    9 (20)
T 1ABC_A            5 AKCDE    9 (20)
T ss_dssp             HHHHH
Confidence            99999

Q query             7 FGHI   10 (12)
T 1ABC_A           10 FG-X   12 (20)

No 2
>2xyz_BC Another one
Probab=12.5 E-value=1.2 Score=8.4 Aligned_cols=3 Identities=1% Similarity=0.1 Sum_probs=2.0

Q query             1 MKA    3 (12)
T 2xyz_BC           1 mka    3 (3)

"""
_HHR = _HEAD + _HITS


def test_hits() -> None:
    first, second = parse_hhr(_HHR, "x.hhr")
    assert (first.index, first.pdb_id, first.chain_id) == (1, "1abc", "A")
    assert first.name == "1ABC_A A PROTEIN; WITH A LONG NAME {Homo sapiens}"
    assert (first.aligned_cols, first.sum_probs) == (7, 6.5)
    assert (first.probability, first.e_value) == (99.8, 2.1e-25)
    assert (first.query, first.hit_sequence) == ("AC-DEFGHI", "AKCDEFG-X")
    assert first.indices_query.tolist() == [2, 3, -1, 4, 5, 6, 7, 8, 9]
    assert first.indices_hit.tolist() == [4, 5, 6, 7, 8, 9, 10, -1, 11]
    assert first.indices_query.dtype == first.indices_hit.dtype == np.int32
    assert (second.pdb_id, second.chain_id, second.hit_sequence) == ("2xyz", "BC", "MKA")


def test_no_hits() -> None:
    text = _HEAD[: _HEAD.index("  1 1ABC")]
    assert parse_hhr(text, "x.hhr") == []


def test_names_that_are_no_pdb_chains() -> None:
    for name in ("d1abca_ a.1.1.1", "UniRef100_Q1", "1abc", "12abc_A"):
        hit, _ = parse_hhr(_HHR.replace(">1ABC_A A PROTEIN", f">{name}"), "x.hhr")
        assert (hit.pdb_id, hit.chain_id) == ("", "")


def test_line_ends_and_gzip(tmp_path: Path) -> None:
    path = tmp_path / "x.hhr.gz"
    path.write_bytes(gzip.compress(_HHR.replace("\n", "\r\n").encode()))
    assert [_plain(hit) for hit in read_hhr(path)] == [_plain(h) for h in parse_hhr(_HHR, "")]


def _plain(hit: TemplateHit) -> tuple:
    indices = (hit.indices_query.tolist(), hit.indices_hit.tolist())
    scores = (hit.aligned_cols, hit.sum_probs, hit.probability, hit.e_value)
    return (hit.index, hit.name, hit.query, hit.hit_sequence, *scores, *indices)


@pytest.mark.parametrize(
    ("old", "new", "line", "reason"),
    [
        (_HHR, "", None, "the file is empty"),
        ("Query  ", "Que", 1, "not an hhr file"),
        (_HITS, "", 6, "no alignment follows: truncated"),
        (">1ABC_A A", "1ABC_A A", 9, "without its name and scores"),
        ("Sum_probs=6.5", "Sum_probs=", 11, "missing or not finite"),
        ("Sum_probs=6.5", "Sum_probs=nan", 11, "missing or not finite"),
        ("Sum_probs=6.5", "Sum_probs=6..5", 11, "not a number"),
        ("Q query             7 FGHI   10", "Q query             7 FGHI   11", 22, "do not fit"),
        ("Q query             7 FGHI   10", "Q query             8 FGHI   11", 22, "do not fit"),
        ("Q query             7 FGHI   10 (12)", "", 9, "5 aligned letters of the query, 9 of"),
        ("Aligned_cols=7", "Aligned_cols=9", 9, "7 aligned columns, 9 announced: truncated?"),
        (_HHR[_HHR.index("\nQ query             7") : _HHR.index("\nNo 2")], "", 9, "announced"),
    ],
)
def test_damage_is_explained(old: str, new: str, line: int | None, reason: str) -> None:
    assert _HHR.count(old) == 1
    with pytest.raises(DataError) as caught:
        read_hhr("x.hhr", data=_HHR.replace(old, new).encode())
    assert (caught.value.path, caught.value.line) == ("x.hhr", line)
    assert reason in caught.value.reason


@settings(max_examples=400, deadline=None, derandomize=True)
@given(damaged(_HHR.encode()))
def test_fuzz(data: bytes) -> None:
    try:
        hits = read_hhr("x.hhr", data=data)
    except DataError:
        return
    for hit in hits:
        aligned = (hit.indices_query >= 0) & (hit.indices_hit >= 0)
        assert aligned.sum() == hit.aligned_cols > 0
        assert len(hit.query) == len(hit.hit_sequence) == len(aligned)
        assert np.isfinite([hit.sum_probs, hit.probability, hit.e_value]).all()


# Genuine files ------------------------------------------------------------------------------------


def test_samples_agree_with_deepmind(shared_data: Path) -> None:
    parsers = pytest.importorskip("alphafold.data.parsers")
    paths = sorted((shared_data / "formats").glob("open*/**/*.hhr"))
    assert len(paths) == 7
    for path in paths:
        hits = read_hhr(path)
        expected = parsers.parse_hhr(path.read_text())
        assert len(hits) == len(expected) > 0
        for hit, other in zip(hits, expected, strict=True):
            assert (hit.index, hit.name) == (other.index, other.name.strip())
            assert (hit.query, hit.hit_sequence) == (other.query, other.hit_sequence)
            assert hit.indices_query.tolist() == other.indices_query
            assert hit.indices_hit.tolist() == other.indices_hit
            scores = (hit.aligned_cols, hit.sum_probs, hit.probability, hit.e_value)
            assert scores == (other.aligned_cols, other.sum_probs, other.prob_true, other.e_value)
            assert hit.name.startswith(f"{hit.pdb_id.upper()}_{hit.chain_id}")
