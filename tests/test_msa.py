"""Alignments: letters, deletions, repeats, damage; against plain readings and DeepMind's."""

import gzip
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from foldcore.data.msa import Msa, merge, parse_a3m, parse_stockholm, read_msa
from foldcore.errors import DataError

# Our 22 codes; B, J, O, U and Z stand for the parent the HHblits alphabet gives them.
_CODES = "ARNDCQEGHILKMFPSTWYVX-"
_PARENTS = {"B": "D", "J": "X", "O": "X", "U": "C", "Z": "E"}
_LETTERS = "ACDEFGHIKLMNPQRSTVWYBJOUZX"

_A3M = """\
>query
ACDEF
>first extra words
-CDdE-
>second/1-9
aaA
Cx-EyyyFzz
"""
_STOCKHOLM = """\
# STOCKHOLM 1.0

#=GF ID test
#=GS first DE words of the database

query        AC..D
first        -Cgg-
#=GR first PP .9999
second       acK-W

query        EF.-
#=GC RF      xx..
first        E---
second       -FLA
//
"""


def _codes(rows: list[str]) -> list[list[int]]:
    return [[_CODES.index(_PARENTS.get(letter, letter)) for letter in row] for row in rows]


def test_a3m() -> None:
    msa = parse_a3m(_A3M, "x.a3m")
    assert msa.rows.tolist() == _codes(["ACDEF", "-CDE-", "AC-EF"])
    assert msa.deletions.tolist() == [[0] * 5, [0, 0, 0, 1, 0], [2, 0, 1, 0, 3]]
    assert (msa.rows.dtype, msa.deletions.dtype) == (np.uint8, np.uint16)
    assert msa.names == ("query", "first", "second/1-9")
    assert (msa.left_out, msa.path) == (0, "x.a3m")


def test_stockholm() -> None:
    msa = parse_stockholm(_STOCKHOLM, "x.sto")
    assert msa.rows.tolist() == _codes(["ACDEF", "-C-E-", "ACW-F"])
    assert msa.deletions.tolist() == [[0] * 5, [0, 0, 2, 0, 0], [0, 0, 1, 0, 0]]
    assert msa.names == ("query", "first", "second")


def test_every_letter() -> None:
    msa = parse_a3m(f">q\n{'A' * 26}\n>r\n{_LETTERS}\n", "x.a3m")
    assert msa.rows[1].tolist() == _codes([_LETTERS])[0]
    lower = parse_stockholm(f"# STOCKHOLM 1.0\nq {'A' * 26}\nr {_LETTERS.lower()}\n//\n", "x.sto")
    assert (lower.rows[1] == msa.rows[1]).all()


def test_forms_in_use() -> None:
    """ColabFold's first line, structure records of HH-suite, A2M's dots, other line ends."""
    plain = parse_a3m(_A3M, "x.a3m")
    decorated = "#5\t1\n>ss_pred\nCCHHE\n>ss_conf\n99999\n" + _A3M.replace("-CDd", "-CD.d")
    for text in (decorated, decorated.replace("\n", "\r\n")):
        msa = read_msa("x.a3m", data=text.encode())
        assert (msa.rows == plain.rows).all() and (msa.deletions == plain.deletions).all()
        assert msa.names == plain.names


def test_max_rows_counts_the_rest() -> None:
    for msa in (parse_a3m(_A3M, "x.a3m", 2), parse_stockholm(_STOCKHOLM, "x.sto", 2)):
        assert (msa.rows.shape, msa.names, msa.left_out) == ((2, 5), ("query", "first"), 1)


def test_long_insertions_saturate() -> None:
    msa = parse_a3m(f">q\nAC\n>r\nA{'g' * 70_000}C\n", "x.a3m")
    assert msa.deletions[1].tolist() == [0, 65_535]


def test_many_rows_are_decoded_in_pieces() -> None:
    rows = ["ACDEF", *("kA" + "k" * (i % 7) + "CDEF" for i in range(3000))]
    msa = parse_a3m("".join(f">r\n{row}\n" for row in rows), "x.a3m")
    assert (msa.rows == _codes(["ACDEF"])).all()
    assert msa.deletions[1:, 0].tolist() == [1] * 3000
    assert msa.deletions[1:, 1].tolist() == [i % 7 for i in range(3000)]
    assert not msa.deletions[:, 2:].any()
    text = "".join(f">r\n{row}\n" for row in [*rows, "A*DEF"])
    assert _error("x.a3m", text) == "x.a3m:6004: illegal character '*'"


def test_merge_keeps_the_first_of_equal_rows_in_order() -> None:
    first, second = parse_a3m(_A3M, "1.a3m"), parse_stockholm(_STOCKHOLM, "2.sto", 2)
    again = parse_a3m(">query\nACDEF\n>other\nAC-EF\n>new\nWWWWW\n", "3.a3m")
    msa = merge([first, second, again], "ACDEF")
    assert msa.names == ("query", "first", "second/1-9", "first", "new")
    assert msa.rows.tolist() == _codes(["ACDEF", "-CDE-", "AC-EF", "-C-E-", "WWWWW"])
    assert msa.deletions[2].tolist() == [2, 0, 1, 0, 3]  # those of the row that was kept
    assert msa.left_out == 1


def test_merge_without_alignments_is_the_query_alone() -> None:
    msa = merge([], "ACX")
    assert msa.rows.tolist() == _codes(["ACX"])
    assert not msa.deletions.any()


def test_merge_puts_the_query_first_where_a_modified_residue_differs() -> None:
    query = "EACDEFGHIKLMNPQRSTVW"
    alignment = parse_a3m(f">query\nQ{query[1:]}\n>hit\n{'W' * 20}\n", "x.a3m")
    msa = merge([alignment], query)
    assert msa.rows[:2].tolist() == _codes([query, "Q" + query[1:]])
    assert len(msa.rows) == 3


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("ACDE", "its first row has 5 columns, but the query 4 residues"),
        ("WWDEF", "an alignment of another sequence: 3 of 5 residues agree"),
    ],
)
def test_merge_refuses_an_alignment_of_another_sequence(query: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        merge([parse_a3m(_A3M, "x.a3m")], query)
    assert str(caught.value) == f"x.a3m: {reason}"


def _error(name: str, text: str) -> str:
    with pytest.raises(DataError) as caught:
        read_msa(name, data=text.encode())
    return str(caught.value)


def test_damaged_a3m_is_explained() -> None:
    assert _error("x.a3m", "") == "x.a3m: the file is empty"
    assert _error("x.a3m", "# nothing\n") == "x.a3m: no records"
    assert _error("x.a3m", "ACDEF\n") == "x.a3m:1: expected a record that starts with '>'"
    ragged = _A3M.replace("-CDdE-", "-CDdE")
    assert _error("x.a3m", ragged) == "x.a3m:3: ragged: 'first' has 4 columns, the query 5"
    assert _error("x.a3m", _A3M[:-6]) == "x.a3m:5: ragged: 'second/1-9' has 4 columns, the query 5"
    illegal = _A3M.replace("Cx-E", "Cx*E")
    assert _error("x.a3m", illegal) == "x.a3m:7: illegal character '*'"
    assert _error("x.a3m", _A3M + ">last") == "x.a3m:8: record 'last' has no sequence"
    assert _error("x.a3m", ">q\nacd\n>r\nA\n") == "x.a3m:1: the query has no columns"
    assert _error("x.txt", _A3M).startswith("x.txt: unknown kind of file")


def test_damaged_stockholm_is_explained() -> None:
    assert _error("x.sto", _A3M).startswith("x.sto:1: not a Stockholm file")
    assert _error("x.sto", _STOCKHOLM[:-3]) == "x.sto:14: no // at the end: truncated"
    assert _error("x.sto", "# STOCKHOLM 1.0\n//\n") == "x.sto: no records"
    ragged = _STOCKHOLM.replace("E---", "E--")
    assert _error("x.sto", ragged) == "x.sto:13: ragged: 'first' has 8 columns, the query 9"
    fields = _STOCKHOLM.replace("E---", "E- --")
    assert _error("x.sto", fields).startswith("x.sto:13: expected a name and a sequence")
    assert _error("x.sto", _STOCKHOLM.replace("-FLA", "-F1A")) == "x.sto:14: illegal character '1'"
    assert _error("x.sto", "# STOCKHOLM 1.0\nq ...\n//\n") == "x.sto:2: the query has no residues"


# Properties ---------------------------------------------------------------------------------------


def _naive_a3m(sequence: str) -> tuple[str, list[int]]:
    aligned, deletions, count = "", [], 0
    for letter in sequence:
        if letter.islower():
            count += 1
        else:
            aligned += letter
            deletions.append(count)
            count = 0
    return aligned, deletions


@st.composite
def _alignments(draw: st.DrawFn) -> list[str]:
    width = draw(st.integers(1, 12))
    columns = st.lists(st.sampled_from(_LETTERS + "-"), min_size=width, max_size=width)
    insertion = st.text(st.sampled_from(_LETTERS.lower()), max_size=3)
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        inserts = draw(st.lists(insertion, min_size=width + 1, max_size=width + 1))
        pairs = zip(inserts, draw(columns), strict=False)
        rows.append("".join(i + c for i, c in pairs) + inserts[-1])
    return rows


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_alignments(), st.integers(1, 7))
def test_a3m_agrees_with_a_plain_reading(rows: list[str], wrap: int) -> None:
    text = ""
    for index, row in enumerate(rows):
        text += f">r{index}\n" + "".join(row[i : i + wrap] + "\n" for i in range(0, len(row), wrap))
    msa = parse_a3m(text, "x.a3m")
    plain = [_naive_a3m(row) for row in rows]
    assert msa.rows.tolist() == _codes([aligned for aligned, _ in plain])
    assert msa.deletions.tolist() == [deletions for _, deletions in plain]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_stockholm_agrees_with_a3m(data: st.DataObject) -> None:
    """Columns where the query has a gap are insertions of the other rows, in lower case in A3M."""
    width = data.draw(st.integers(1, 15))
    row = st.lists(st.sampled_from("ACW--"), min_size=width, max_size=width).map("".join)
    rows = data.draw(st.lists(row, min_size=1, max_size=5))
    query = "A" + rows[0][1:]  # at least one column
    blocks = data.draw(st.integers(1, width))
    body = ""
    for start in range(0, width, blocks):
        body += "".join(f"r{i} {r[start : start + blocks]}\n" for i, r in enumerate([query, *rows]))
    stockholm = parse_stockholm(f"# STOCKHOLM 1.0\n{body}//\n", "x.sto")
    a3m = ""
    for index, letters in enumerate([query, *rows]):
        pairs = zip(letters, query, strict=True)
        kept = (c if q != "-" else c.lower().replace("-", "") for c, q in pairs)
        a3m += f">r{index}\n{''.join(kept)}\n"
    expected = parse_a3m(a3m, "x.a3m")
    assert (stockholm.rows == expected.rows).all()
    assert (stockholm.deletions == expected.deletions).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=20))
def test_merge_agrees_with_a_plain_reading(rows: list[list[int]]) -> None:
    query = "".join(_CODES[code] for code in rows[0])
    text = "".join(f">r\n{''.join(_CODES[code] for code in row)}\n" for row in rows)
    kept: list[list[int]] = []
    for row in rows:
        if row not in kept:
            kept.append(row)
    assert merge([parse_a3m(text, "x.a3m")], query).rows.tolist() == kept


@settings(max_examples=200, deadline=None, derandomize=True)
@given(damaged(_A3M.encode()))
def test_fuzz_a3m(data: bytes) -> None:
    _valid_or_error("x.a3m", data)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(damaged(_STOCKHOLM.encode()))
def test_fuzz_stockholm(data: bytes) -> None:
    _valid_or_error("x.sto", data)


def _valid_or_error(name: str, data: bytes) -> None:
    try:
        msa = read_msa(name, data=data)
    except DataError:
        return
    assert msa.rows.shape == msa.deletions.shape
    assert msa.rows.shape[0] == len(msa.names) > 0
    assert msa.rows.size and msa.rows.max() <= 21


# Genuine files ------------------------------------------------------------------------------------


def _samples(shared_data: Path, suffix: str) -> list[Path]:
    paths = sorted((shared_data / "formats").glob(f"open*/**/*.{suffix}"))
    assert paths
    return paths


@pytest.mark.parametrize("suffix", ["a3m", "sto"])
def test_samples_agree_with_deepmind(shared_data: Path, suffix: str) -> None:
    parsers = pytest.importorskip("alphafold.data.parsers")
    theirs: Callable = parsers.parse_a3m if suffix == "a3m" else parsers.parse_stockholm
    for path in _samples(shared_data, suffix):
        msa = read_msa(path)
        sequences, deletions = theirs(path.read_text())
        table = np.zeros(256, np.uint8)
        for letter in _LETTERS + "-":
            table[ord(letter)] = _codes([letter])[0][0]
        expected = table[np.frombuffer("".join(sequences).encode(), np.uint8)]
        assert (msa.rows == expected.reshape(msa.rows.shape)).all(), path
        assert (msa.deletions == np.array(deletions)).all(), path


def test_alignments_of_one_chain_merge(shared_data: Path) -> None:
    folder = shared_data / "formats" / "openfold_example" / "alignments"
    names = ("uniref90_hits.sto", "bfd_uniclust_hits.a3m", "mgnify_hits.sto")
    msas: list[Msa] = [read_msa(folder / name) for name in names]
    query = "".join(_CODES[code] for code in msas[0].rows[0])
    msa = merge(msas, query)
    kept = dict.fromkeys(row.tobytes() for m in msas for row in m.rows)
    assert b"".join(kept) == msa.rows.tobytes()


def test_deepest_alignment_is_read_in_a_fraction_of_a_second(shared_data: Path) -> None:
    path = shared_data / "mini" / "alignments" / "7a4d_A" / "colabfold_hits.a3m"
    start = time.process_time()
    msa = read_msa(path)
    assert time.process_time() - start < 1.0  # 0.07 s on an idle core
    assert msa.rows.shape == (11905, 118)


def test_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "x.sto.gz"
    path.write_bytes(gzip.compress(_STOCKHOLM.encode()))
    assert read_msa(path).rows.shape == (3, 5)
