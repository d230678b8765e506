"""Who may import whom, and that checking a configuration loads nothing heavy."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ullme", "indexes", "flows")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = {
    "torch", "transformers", "peft", "faiss", "mteb", "sentence_transformers",
    "mlflow", "prefect", "matplotlib", "pyarrow",
}  # fmt: skip
ONLY_IN = {
    "prefect": ("flows/",),
    "mlflow": ("flows/tracking.py", "flows/registry.py", "flows/model.py"),
    "faiss": ("indexes/_faiss.py",),
    "mteb": ("ullme/evaluation.py", "ullme/tasks/"),
}
INDEXES_MAY_USE = {"ullme.artifacts", "ullme.components", "ullme.errors", "ullme.neighbours", "ullme.vector_file"}
COMPONENT_PACKAGES = ("ullme.sources", "ullme.miners", "ullme.objectives", "ullme.rerankers", "ullme.tasks", "indexes")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, *, at_import: bool = False) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of a file; `at_import`: only those that run when the module is imported."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module in PACKAGES else [node.module]
            yield from ((name, node.lineno) for name in names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_what_its_place_allows(path: Path) -> None:
    here, wrong = name_of(path), []
    for module, line in imports(path):
        top = module.partition(".")[0]
        if top in ONLY_IN and not here.startswith(ONLY_IN[top]):
            wrong.append(f"{here}:{line} imports {module}; only {', '.join(ONLY_IN[top])} may")
        if here.startswith("ullme/") and top in ("indexes", "flows"):
            wrong.append(f"{here}:{line} imports {module}; ullme imports neither indexes nor flows")
        if here.startswith("indexes/") and (top == "flows" or (top == "ullme" and module not in INDEXES_MAY_USE)):
            wrong.append(f"{here}:{line} imports {module}; indexes may use {', '.join(sorted(INDEXES_MAY_USE))}")
    assert wrong == []


@pytest.mark.parametrize("path", [path for path in FILES if not name_of(path).startswith("flows/")], ids=name_of)
def test_environment_variables_are_read_in_flows_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "os.environ" not in text
    assert "os.getenv" not in text


@pytest.mark.parametrize("path", [path for path in FILES if not name_of(path).startswith("flows/")], ids=name_of)
def test_nothing_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def defines_section(path: Path) -> bool:
    classes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)]
    return any(isinstance(base, ast.Name) and base.id in {"Section", "Component"} for node in classes for base in node.bases)


def _config_modules() -> list[str]:
    kinds = [name_of(path) for package in COMPONENT_PACKAGES for path in (ROOT / package.replace(".", "/")).glob("*.py")]
    sections = [name_of(path) for path in FILES if defines_section(path) and name_of(path) != "ullme/encoder.py"]
    return sorted({*kinds, *sections})


@pytest.mark.parametrize("name", _config_modules())
def test_modules_of_sections_and_kinds_import_nothing_heavy(name: str) -> None:
    """`ullme/encoder.py` is left out: its settings are part of a saved model, no section of a run."""
    assert [
        f"{name}:{line} {module}" for module, line in imports(ROOT / name, at_import=True) if module.partition(".")[0] in HEAVY
    ] == []


def test_checking_a_configuration_loads_nothing_heavy() -> None:
    script = (
        "import sys; from flows.config import load; import flows.cli, flows.plugin, flows.stage, flows.pipeline;"
        f"load('{ROOT}/configs/reference.yaml');"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_ullme_loads_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, ullme; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=name_of)
def test_modules_say_what_they_are_and_names_in_all_exist(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    stated = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    ]
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    defined |= {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for place in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for target in (place.elts if isinstance(place, ast.Tuple) else [place])
        if isinstance(target, ast.Name)
    }
    defined |= {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert [name for names in stated for name in names if name not in defined] == []


def test_packages_of_kinds_are_importable() -> None:
    for package in COMPONENT_PACKAGES:
        assert importlib.import_module(package).__doc__
