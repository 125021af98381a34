"""The import rules of docs/architecture.md, and the size budgets, checked on the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"jax", "flax", "optax", "chex", "torch"}
ALLOWED = {
    "foldcore": set(),
    "jaxfold": {"jax", "flax", "optax", "chex"},
    "torchfold": {"torch"},
    "parity": FRAMEWORKS,
}
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 400, 40, 80


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_layers(package: str) -> None:
    others = set(ALLOWED) - {package, "foldcore"} if package != "parity" else set()
    for path in sources(package):
        names = imported(ast.parse(path.read_text()))
        assert not (names & FRAMEWORKS) - ALLOWED[package], path
        assert not names & others, f"{path} imports a package above or beside it"


@pytest.mark.parametrize("package", ALLOWED)
def test_files_and_functions_stay_small(package: str) -> None:
    for path in sources(package):
        text = path.read_text()
        assert text.count("\n") <= MAX_FILE, path
        limit = MAX_KERNEL if "kernels" in path.parts else MAX_FUNCTION
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                assert size <= limit, f"{path}:{node.lineno} {node.name} has {size} lines"


@pytest.mark.parametrize("package", ALLOWED)
def test_public_functions_are_annotated_and_documented(package: str) -> None:
    for path in sources(package):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                if {"triton.jit", "gluon.jit"} & set(map(ast.unparse, node.decorator_list)):
                    continue  # typed by the launch; its pointers' shapes stand beside them
                assert node.returns is not None, f"{path}:{node.name} has no return annotation"
                assert ast.get_docstring(node), f"{path}:{node.name} has no docstring"
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}:{node.name} has no docstring"


def test_nothing_is_unpickled() -> None:
    for package in ALLOWED:
        for path in sources(package):
            text = path.read_text()
            allowed = "from pickle import UnpicklingError"  # torch.load raises it
            assert "pickle" not in imported(ast.parse(text.replace(allowed, ""))), path
            assert "allow_pickle=True" not in text, path
