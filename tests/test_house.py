"""The house: who imports whom. Read from the sources, imports inside functions too."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "data", "eval", "memtrain")
# Programs that start memtrain.py and measure it from outside; nothing imports them.
ABOVE = {"eval.bench.main", "eval.bench.peers", "eval.bench.plain", "eval.bench.step", "eval.bench.gpu_steps",
         "eval.faults"}


def modules() -> dict[str, Path]:
    files = [ROOT / "memtrain.py", *(p for room in ROOMS[:3] for p in (ROOT / room).rglob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the project that a file imports anywhere; of `from package import name` the name, where it is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{a.name}" for a in node.names}
            found |= {n for n in inner if n in known} | ({node.module} if inner - known.keys() else set())
    return {n for n in found if n in known}


KNOWN = modules()
GRAPH = {name: imports(path, KNOWN) - {name} for name, path in KNOWN.items()}


def test_imports_go_one_way():
    """kernels and data know themselves alone; eval is handed the agent; memtrain.py stands above all three."""
    allowed = {"kernels": {"kernels"}, "data": {"data"}, "eval": {"kernels", "data", "eval"}, "memtrain": set(ROOMS)}
    wrong = [f"{name} imports {other}" for name, others in GRAPH.items() for other in others
             if other.partition(".")[0] not in allowed[name.partition(".")[0]]
             and not (other == "memtrain" and name in ABOVE)]
    assert not wrong


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(GRAPH):
        visit(name, ())


def test_what_stands_above_memtrain_is_imported_by_nothing():
    lower = {name: others & ABOVE for name, others in GRAPH.items() if name not in ABOVE | {"eval.bench.__main__"}}
    assert not any(lower.values()), lower


def test_every_file_says_what_it_is():
    for name, path in KNOWN.items():
        if path.name != "__main__.py":
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_the_main_file_is_read_in_one_sitting():
    tree = ast.parse((ROOT / "memtrain.py").read_text(encoding="utf-8"))
    assert max(node.end_lineno for node in tree.body) <= 1100
    long = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)
            and n.end_lineno - n.lineno + 1 > 60}
    assert not long
