"""jaxfold and torchfold are twins: the same files, classes, functions, arguments and defaults.

Allowed to differ: array types in annotations, ``__call__`` against ``forward``, anything whose name
begins with an underscore. The inside of functions is compared by the parity tests.
"""

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAIN_DIFFERENCE = 60  # lines of diff for train.py: more means that something leaked into it

Signatures = dict[str, str]


def test_the_tracks_are_twins() -> None:
    differences = list(compare(ROOT / "jaxfold", ROOT / "torchfold"))
    assert not differences, "\n".join(differences)


def test_train_reads_alike() -> None:
    jax, torch = (
        (ROOT / track / "train.py").read_text().splitlines() for track in ("jaxfold", "torchfold")
    )
    blocks = difflib.SequenceMatcher(None, jax, torch, False).get_opcodes()
    # as diff prints them: where, what was, a line of dashes, and what is
    lines = [
        1 + (i1 - i0) + (j1 - j0) + (tag == "replace")
        for tag, i0, i1, j0, j1 in blocks
        if tag != "equal"
    ]
    assert sum(lines) < TRAIN_DIFFERENCE


def compare(jax: Path, torch: Path) -> Iterator[str]:
    """One line for each difference between two trees."""
    jax_files, torch_files = ({p.name for p in public_files(tree)} for tree in (jax, torch))
    for name in sorted(jax_files ^ torch_files):
        yield f"{name}: only in {jax.name if name in jax_files else torch.name}"
    for name in sorted(jax_files & torch_files):
        ours, theirs = signatures(jax / name), signatures(torch / name)
        for symbol in sorted(ours.keys() | theirs.keys()):
            if symbol not in theirs or symbol not in ours:
                yield f"{name}: {symbol} only in {jax.name if symbol in ours else torch.name}"
            elif ours[symbol] != theirs[symbol]:
                yield (
                    f"{name}: {symbol}{ours[symbol]} in {jax.name}, "
                    f"{symbol}{theirs[symbol]} in {torch.name}"
                )


def public_files(tree: Path) -> Iterator[Path]:
    for path in tree.rglob("*.py"):
        if path.name == "__init__.py" or not path.name.startswith("_"):
            yield path


def signatures(path: Path) -> Signatures:
    """Public names of a file: functions and methods with their arguments, classes, constants."""
    found: Signatures = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found |= class_signatures(node)
        else:
            found |= entry(node)
    return found


def class_signatures(node: ast.ClassDef) -> Signatures:
    found = {node.name: ""}
    for member in node.body:
        found |= {f"{node.name}.{name}": text for name, text in entry(member).items()}
    return found


def entry(node: ast.stmt) -> Signatures:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        name = "__call__" if node.name == "forward" else node.name
        special = name.startswith("__") and name.endswith("__")
        return {name: arguments(node.args)} if special or not name.startswith("_") else {}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        names = [node.target.id]
    elif isinstance(node, ast.Assign):
        names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    else:
        names = []
    return {name: "" for name in names if not name.startswith("_")}


def arguments(args: ast.arguments) -> str:
    """Names in order with their defaults, and where keyword-only ones begin; no annotations."""
    bare = ast.parse(ast.unparse(args_without_annotations(args)), mode="eval")
    return "(" + ast.unparse(bare).removeprefix("lambda").removesuffix(": 0").strip() + ")"


def args_without_annotations(args: ast.arguments) -> ast.expr:
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    for argument in every:
        if argument is not None:
            argument.annotation = None
    return ast.Lambda(args, ast.Constant(0))


# Every kind of difference is found --------------------------------------------------------------

ORIGINAL = """
LIMIT = 3

class Block:
    size: int
    def __init__(self, c_m, *, rate=0.1): ...
    def __call__(self, msa, mask=None): ...
    def _update(self, msa): ...

def loss(outputs: dict, batch: dict, also=()): ...
"""


def differences_of(tmp_path: Path, text: str, file: str = "a.py") -> list[str]:
    for tree, name, content in (("one", "a.py", ORIGINAL), ("two", file, text)):
        (tmp_path / tree).mkdir()
        (tmp_path / tree / name).write_text(content)
    return list(compare(tmp_path / "one", tmp_path / "two"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def loss", "def losses"),
        ("class Block", "class Blocks"),
        ("LIMIT", "BOUND"),
        ("size: int", "length: int"),
        ("outputs: dict, batch: dict", "batch, outputs"),
        ("also=()", "also=None"),
        ("also=()", "also"),
        ("c_m, *, rate", "c_m, rate"),
        ("mask=None", "mask=None, dropout=None"),
        ("def __call__", "def call"),
    ],
)
def test_a_difference_is_found(tmp_path: Path, old: str, new: str) -> None:
    assert old in ORIGINAL
    assert differences_of(tmp_path, ORIGINAL.replace(old, new))


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    assert len(differences_of(tmp_path, ORIGINAL, file="b.py")) == 2


def test_what_may_differ_is_not_reported(tmp_path: Path) -> None:
    text = ORIGINAL.replace("__call__", "forward").replace("_update", "_other")
    text = text.replace("outputs: dict", "outputs: list")
    assert differences_of(tmp_path, text) == []
