"""The shape of the code itself: who may import whom, what is torch-free, how long files and functions may be."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVER = ROOT / "server"
RANKS = {
    "errors": 0,
    "types": 0,
    "settings": 0,
    "metrics": 0,
    "sources": 1,
    "kernels": 1,
    "ipc": 1,
    "adapters": 1,
    "memory": 2,
    "model": 3,
    "engine": 4,
    "api": 4,
    "commands": 5,
    "host": 5,
    "__main__": 6,
}
TORCH_FREE = [
    "sources",
    "ipc",
    "adapters",
    "memory",
    "api",
    "settings",
    "metrics",
    "commands",
    "__main__",
    "host",
    "engine.sequence",
    "engine.scheduler",
    "engine.fairness",
    "engine.waits",
    "engine.grammar_queue",
    "engine.grammar_trial",
]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60
FOLDERS = ["server", "sizing", "infra", "benchmarks", "examples", "rehearse", "docs", "ami", "tests"]


def files():
    return sorted(SERVER.rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The file's syntax; parsed once for all tests."""
    return ast.parse(path.read_text())


def part_of(path: Path) -> str:
    """The package (or top-level module) of server/ that a file belongs to."""
    return path.relative_to(SERVER).parts[0].removesuffix(".py")


def imports(path: Path):
    """(line, what) of every import of a module of ours, those inside functions included; not those for type checkers alone."""
    tree = tree_of(path)
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "server":
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "server" else [node.module]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "server")


def test_every_part_has_a_rank():
    assert {part_of(path) for path in files()} - {"__init__"} == set(RANKS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SERVER)))
def test_imports_go_down_the_ranks(path):
    own = part_of(path)
    if own == "__init__":
        return
    for line, name in imports(path):
        parts = name.split(".")
        other = parts[1] if len(parts) > 1 else None
        if other is None or other == own or other not in RANKS:
            assert other in (own, None, "__version__"), f"{path}:{line} imports {name}"
            continue
        assert RANKS[other] < RANKS[own], f"{path.relative_to(ROOT)}:{line}: rank {RANKS[own]} imports {name} of rank {RANKS[other]}"


def test_nobody_of_the_server_imports_the_rest_of_the_repository():
    others = {"infra", "benchmarks", "examples", "rehearse", "tests", "ami", "aws_cdk"}
    for path in files():
        for node in ast.walk(tree_of(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & others, path


def test_the_api_half_never_loads_torch():
    modules = ", ".join(f"server.{name}" for name in TORCH_FREE)
    code = f"import importlib, pkgutil, sys\nimport {modules}\n"
    code += (
        "for name in ('sources', 'ipc', 'adapters', 'api', 'settings', 'commands'):\n"
        "    package = sys.modules['server.' + name]\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        "loaded = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_only_the_entry_points_read_the_environment():
    allowed = {SERVER / "__main__.py", SERVER / "engine" / "__main__.py"}  # of the server, and of the engine process
    for path in files():
        text = path.read_text()
        if "os.environ" in text or "os.getenv" in text:
            assert path in allowed, f"{path.relative_to(ROOT)} reads the environment"


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_functions_stay_short(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= MAX_FILE_LINES, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"


def test_every_module_says_what_it_is():
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            assert not text.strip() or ast.get_docstring(tree_of(path)), f"{path.relative_to(ROOT)} has no docstring"


def test_the_deployment_stands_by_itself():
    """infra/ installs without the server and reads no environment: app.py does."""
    for path in sorted((ROOT / "infra").rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not {name.split(".")[0] for name in names} & {"server", "torch", "transformers", "benchmarks", "rehearse", "tests"}, path
        assert "os.environ" not in path.read_text() and "os.getenv" not in path.read_text(), path


def test_sizing_is_arithmetic_that_both_halves_import():
    """Numbers and tables: the standard library alone, so that neither torch nor the CDK comes with it."""
    for path in sorted((ROOT / "sizing").rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                assert name.split(".")[0] in sys.stdlib_module_names | {"sizing"}, f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        assert "os.environ" not in path.read_text() and "os.getenv" not in path.read_text(), path
