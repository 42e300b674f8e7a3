"""Holds the layout of the packages: who may import whom, and what never appears in package code.

Everything is read with `ast`, nothing is imported. CONTRIBUTING.md explains the floors.
"""

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

# A module is on the floor of its longest listed prefix.
FLOORS = {
    "kernels": ["pallas_kernels"],
    "base": [
        f"qjax.{name}"
        for name in (
            "errors",
            "registry",
            "config",
            "scheme",
            "qtypes",
            "packing",
            "numerics",
            "lazy",
            "host_memory",
            "qarray",
            "parts",
        )
    ],
    "formats": ["qjax.formats"],
    "state": ["qjax.sharding", "qjax.params", "qjax.kv_cache"],
    "ops": ["qjax.ops"],
    "layers": ["qjax.layers", "qjax.sampler"],
    "models": ["qjax.models"],
    "checkpoint": ["qjax.checkpoint"],
    "running": ["qjax.engine", "qjax.compress", "qjax.forward", "qjax.key_bases"],
    "api": ["qjax.api", "qjax.llm", "qjax.distributed", "qjax.evaluate"],
    "measuring": [
        "qjax.bench",
        "qjax.tune",
        "qjax.report",
        "qjax.planning",
        "qjax.recommend",
        "qjax.doctor",
    ],
    "programs": ["qjax.cli", "qjax.server", "qjax.__main__", "qjax.bench.__main__"],
    "facade": ["qjax"],
}

# What each floor may import besides itself.
MAY_IMPORT = {
    "kernels": [],
    "base": [],
    "formats": ["base"],
    "state": ["base"],
    "ops": ["kernels", "base", "state"],
    "layers": ["base", "state", "ops"],
    "models": ["base", "state", "ops", "layers"],
    "checkpoint": ["base", "formats", "state", "models"],
    "running": ["base", "formats", "state", "ops", "layers", "models", "checkpoint"],
    "api": ["base", "formats", "state", "models", "checkpoint", "running"],
    "measuring": [*(floor for floor in FLOORS if floor not in ("programs", "facade"))],
    "programs": [*(floor for floor in FLOORS if floor != "programs")],
    "facade": [*(floor for floor in FLOORS if floor != "facade")],
}

# Single modules that a floor may import from a floor it may not import as a whole.
ALSO = {
    "base": [
        "pallas_kernels.unpack",
        "pallas_kernels.codes",
        "pallas_kernels.inputs",
        "pallas_kernels.matmul.spec",
    ],
    "formats": ["pallas_kernels.codes", "pallas_kernels.inputs"],
    "state": ["pallas_kernels.kv_update.pages", "pallas_kernels.matmul.spec"],
    "layers": ["pallas_kernels.paged_attention.spec"],
    "models": ["pallas_kernels.paged_attention.spec"],
    "checkpoint": [
        "pallas_kernels.user_cache",
        "pallas_kernels.inputs",
        "qjax.ops",
    ],  # prepare: the layout of this machine, as a weight is read
    # Which implementation was named, and which ran; on what; what caches hold.
    "running": [
        f"pallas_kernels.{name}"
        for name in ("dispatch", "platform", "tuning", "user_cache", "kv_update.pages")
    ]
    # What weights are rounded with.
    + [
        f"pallas_kernels.{name}"
        for name in (
            "codes",
            "gram",
            "hadamard",
            "inputs",
            "iq_grids",
            "nearest",
            "quantize",
            "unpack",
        )
    ],
    "api": ["pallas_kernels.dispatch"],
}

# Libraries beyond the standard one that the lowest floors may use.
PLAIN_ARRAYS = {"jax", "jaxlib", "numpy", "ml_dtypes"}
LIBRARIES = {"kernels": PLAIN_ARRAYS, "base": PLAIN_ARRAYS, "ops": PLAIN_ARRAYS}

# Where a library is imported by another name.
IMPORTED_AS = {"pyyaml": "yaml", "orbax_checkpoint": "orbax"}

# A package that is nothing without its extra imports that at once; who uses it does not.
NEEDS_ITS_EXTRA = {"qjax.server": "server"}

# Other engines and their libraries: tests may read the files they wrote, the package needs none.
ENGINES = {
    *("torch", "transformers", "vllm", "llmcompressor", "compressed_tensors", "gptqmodel"),
    *("auto_gptq", "awq", "autoawq", "auto_round", "bitsandbytes", "torchao", "hqq", "modelopt"),
    *("quark", "optimum", "gguf", "llama_cpp", "openvino", "onnxruntime", "mlx", "tensorflow"),
    "qwix",
}

FORMAT_NAME = re.compile(
    r"(?<![a-z0-9])("
    r"gguf|awq|gptq|compressed_tensors|bitsandbytes|bnb|hqq|modelopt|quark|torchao|auto_?round|"
    r"mxfp\d|nvfp4|nf4|fp[48]|float[48]|u?int[1-7]|e4m3\w*|e5m2\w*|e2m1\w*|"
    r"q[1-8]_[01k]|iq\d_\w+|tq\d_\d"
    r")(?![a-z0-9])",
    re.IGNORECASE,
)

# Code that runs under jit or between two steps: reading a value there stalls the device.
TRACED = ("qjax.layers", "qjax.sampler", "qjax.engine.step")
HOST_SYNCS = {"item", "tolist", "device_get", "block_until_ready"}


@dataclass(frozen=True)
class Module:
    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def floor(self) -> str | None:
        return floor_of(self.name)

    @cached_property
    def docstrings(self) -> set[ast.AST]:
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        return {
            node.body[0].value
            for node in self.nodes
            if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
        }


def floor_of(name: str) -> str | None:
    homes = [
        (prefix, floor)
        for floor, prefixes in FLOORS.items()
        for prefix in prefixes
        if within(name, prefix)
    ]
    prefix, floor = max(homes, key=lambda home: len(home[0]))
    # A new module right under qjax must be given its floor; only the package itself is the facade.
    return None if floor == "facade" and name != prefix else floor


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def package_modules() -> dict[str, Module]:
    modules = {}
    for package in ("qjax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            name = name.removesuffix(".__init__")
            modules[name] = Module(name, path.read_text("utf-8"))
    return modules


MODULES = package_modules()


def home(module: str, name: str) -> str:
    """The module that `from module import name` comes from, through re-exports."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    for node in MODULES[module].tree.body if module in MODULES else ():
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return home(str(node.module), name)
    return module


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    at_import: bool  # when the module is imported, rather than when a function is called


def imports(module: Module) -> Iterator[Import]:
    """What a module imports, but for names that only type checkers see."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}:{node.lineno}: relative import"
            for target in {home(str(node.module), alias.name) for alias in node.names}:
                yield Import(target, node.lineno, at_import)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child, at_import)
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import and not function)

    yield from visit(module.tree, True)


def declared_libraries() -> tuple[set[str], dict[str, set[str]]]:
    """Import names of the dependencies: those always installed, and those of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        found = (re.match(r"[\w-]+", requirement) for requirement in requirements)
        plain = {match.group().replace("-", "_") for match in found if match}
        return {IMPORTED_AS.get(name, name) for name in plain}

    extras = project["optional-dependencies"]
    return names(project["dependencies"]), {name: names(extras[name]) for name in extras}


ALWAYS, EXTRAS = declared_libraries()
OPTIONAL = set().union(*(found for extra, found in EXTRAS.items() if extra != "dev")) - ALWAYS


def at_once(module: Module) -> set[str]:
    """The optional libraries that a module may import when it is imported."""
    needed = [EXTRAS[x] for package, x in NEEDS_ITS_EXTRA.items() if within(module.name, package)]
    return set().union(*needed)


def has_a_floor(module: Module) -> Iterator[str]:
    if module.floor is None:
        yield "is on no floor: place it in FLOORS"


def imports_its_floors(module: Module) -> Iterator[str]:
    for found in imports(module):
        root = found.target.partition(".")[0]
        if root not in ("qjax", "pallas_kernels") or module.floor is None:
            continue
        floor = floor_of(found.target)
        allowed = floor == module.floor or floor in MAY_IMPORT[module.floor]
        also = any(within(found.target, name) for name in ALSO.get(module.floor, ()))
        if not (allowed or also):
            yield f"line {found.line}: {module.floor} may not import {found.target} ({floor})"


def imports_declared_libraries(module: Module) -> Iterator[str]:
    for found in imports(module):
        root = found.target.partition(".")[0]
        if root in sys.stdlib_module_names or root in ("qjax", "pallas_kernels"):
            continue
        if root in ENGINES:
            yield f"line {found.line}: imports {root}, which package code never does"
        elif root in OPTIONAL - at_once(module) and found.at_import:
            yield f"line {found.line}: {root} is optional: import it inside a function"
        elif root not in ALWAYS | OPTIONAL:
            yield f"line {found.line}: {root} is no dependency in pyproject.toml"
        elif root not in LIBRARIES.get(module.floor or "", ALWAYS | OPTIONAL):
            yield f"line {found.line}: {module.floor} works on plain arrays, not with {root}"


def has_one_idea(module: Module) -> Iterator[str]:
    if re.search(r"(^|\.|_)(utils?|helpers?|common|misc)$", module.name):
        yield "is named for no idea"
    lines = module.source.count("\n")
    if lines > MAX_LINES:
        yield f"has {lines} lines, more than {MAX_LINES}"


def names_no_format(module: Module) -> Iterator[str]:
    if not any(within(module.name, room) for room in ("qjax.models", "qjax.layers")):
        return
    for node in module.nodes:
        words = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")]
        if isinstance(node, ast.Constant) and node not in module.docstrings:
            words.append(node.value)
        for word in words:
            if isinstance(word, str) and (match := FORMAT_NAME.search(word)):
                line = getattr(node, "lineno", "?")
                yield f"line {line}: names {match.group()!r}; models and layers know no format"


def calls(module: Module, *names: str) -> Iterator[ast.Call]:
    for node in module.nodes:
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in names:
                yield node


def meshes_have_axis_types(module: Module) -> Iterator[str]:
    for call in calls(module, "make_mesh"):
        of_jax = isinstance(call.func, ast.Attribute) or "make_mesh" in {
            alias.name
            for node in module.nodes
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax")
            for alias in node.names
        }
        if of_jax and "axis_types" not in {keyword.arg for keyword in call.keywords}:
            yield f"line {call.lineno}: make_mesh without axis_types"


def casts_to_float8_clamp(module: Module) -> Iterator[str]:
    clamps = {call.lineno for call in calls(module, "clip", "clamp", "minimum")}
    functions = [node for node in module.nodes if isinstance(node, ast.FunctionDef)]
    for call in calls(module, "astype", "convert_element_type"):
        targets = [ast.unparse(node) for node in (*call.args, *(k.value for k in call.keywords))]
        if not any(re.search(r"float8|fp8|e4m3|e5m2", target) for target in targets):
            continue
        around = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
        if not any(f.lineno <= line <= (f.end_lineno or 0) for f in around for line in clamps):
            yield f"line {call.lineno}: cast to float8 without a clamp: overflow becomes NaN"


def never_waits_for_the_device(module: Module) -> Iterator[str]:
    if any(within(module.name, room) for room in TRACED):
        for call in calls(module, *HOST_SYNCS):
            yield f"line {call.lineno}: {ast.unparse(call.func)} reads a value inside a step"


def names_no_machine(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if isinstance(node, ast.Constant) and re.search(
            r"(^|\s)/(work|root|home)/", str(node.value)
        ):
            yield f"line {node.lineno}: a path of one machine"


def uses_its_private_names(module: Module) -> Iterator[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    private = [
        node.name
        for node in module.tree.body
        if isinstance(node, kinds)
        and re.match(r"_(?!_)", node.name)
        and not node.decorator_list  # a decorator may register it
    ]
    used = {getattr(node, "id", getattr(node, "attr", None)) for node in module.nodes}
    yield from (f"{name} is never used" for name in private if name not in used)


RULES: list[Callable[[Module], Iterator[str]]] = [
    has_a_floor,
    imports_its_floors,
    imports_declared_libraries,
    has_one_idea,
    names_no_format,
    meshes_have_axis_types,
    casts_to_float8_clamp,
    never_waits_for_the_device,
    names_no_machine,
    uses_its_private_names,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package(rule: Callable[[Module], Iterator[str]]) -> None:
    problems = [f"{name}: {text}" for name, module in MODULES.items() for text in rule(module)]
    assert not problems, "\n".join(problems)


def lone_subclasses(modules: list[Module]) -> list[str]:
    classes = [n for m in modules for n in m.nodes if isinstance(n, ast.ClassDef)]
    bases = Counter(ast.unparse(base).rpartition(".")[2] for c in classes for base in c.bases)
    return [c.name for c in classes if bases[c.name] == 1]


def test_no_base_class_has_one_subclass() -> None:
    assert not lone_subclasses(list(MODULES.values()))


VIOLATIONS = [
    (has_a_floor, "qjax.stray", ""),
    (imports_its_floors, "pallas_kernels.matmul.api", "from qjax.errors import QjaxError"),
    (imports_its_floors, "qjax.layers.linear", "from pallas_kernels.matmul import matmul"),
    (imports_its_floors, "qjax.models.llama", "def f():\n    import qjax.engine.engine"),
    (imports_its_floors, "qjax.engine.step", "import qjax"),
    (imports_its_floors, "qjax.qarray", "from pallas_kernels import dispatch"),
    (imports_declared_libraries, "qjax.checkpoint.loader", "def f():\n    import torch.nn"),
    (imports_declared_libraries, "qjax.api", "from transformers import AutoTokenizer"),
    (imports_declared_libraries, "qjax.api", "import pandas"),
    (imports_declared_libraries, "qjax.cli.serve", "import starlette"),
    (imports_declared_libraries, "qjax.server.app", "import lm_eval"),
    (imports_declared_libraries, "qjax.qarray", "import flax"),
    (has_one_idea, "qjax.engine.utils", ""),
    (has_one_idea, "qjax.engine.cache_helpers", ""),
    (has_one_idea, "qjax.api", "x = 1\n" * (MAX_LINES + 1)),
    (names_no_format, "qjax.models.llama", "def f(w):\n    return w.qtype == 'q4_k'"),
    (names_no_format, "qjax.models.llama", "def load_gguf(): ..."),
    (names_no_format, "qjax.layers.linear", "from x import gptq"),
    (meshes_have_axis_types, "qjax.sharding", "mesh = jax.make_mesh((2,), ('x',))"),
    (casts_to_float8_clamp, "qjax.numerics", "def f(x):\n    return x.astype(jnp.float8_e4m3fn)"),
    (never_waits_for_the_device, "qjax.engine.step", "def f(x):\n    return x.item()"),
    (names_no_machine, "qjax.api", "PATH = '/home/me/models'"),
    (uses_its_private_names, "qjax.api", "def _left_over(): ..."),
]


@pytest.mark.parametrize(("rule", "name", "source"), VIOLATIONS)
def test_rule_catches(rule: Callable[[Module], Iterator[str]], name: str, source: str) -> None:
    assert list(rule(Module(name, source)))


ALLOWED = [
    (imports_its_floors, "qjax.qarray", "from pallas_kernels.unpack import dequantize"),
    (imports_its_floors, "qjax.ops.linear", "from pallas_kernels.matmul import api"),
    (
        imports_its_floors,
        "qjax.layers.attention",
        "from pallas_kernels.paged_attention import AttentionSpec",
    ),
    (
        imports_its_floors,
        "qjax.layers.linear",
        "if TYPE_CHECKING:\n    from qjax.api import generate",
    ),
    (imports_declared_libraries, "qjax.server.app", "import starlette"),
    (imports_declared_libraries, "qjax.cli.serve", "def f():\n    import starlette"),
    (names_no_format, "qjax.models.llama", '"""Read from GGUF metadata too."""'),
    (names_no_format, "qjax.models.llama", "q_norm = x.astype('float32')"),
    (
        casts_to_float8_clamp,
        "qjax.numerics",
        "def f(x):\n    return x.clip(-448, 448).astype(jnp.float8_e4m3fn)",
    ),
]


@pytest.mark.parametrize(("rule", "name", "source"), ALLOWED)
def test_rule_allows(rule: Callable[[Module], Iterator[str]], name: str, source: str) -> None:
    assert not list(rule(Module(name, source)))


def test_lone_subclass_is_caught() -> None:
    assert lone_subclasses([Module("a", "class A: ...\nclass B(A): ...")]) == ["A"]
    assert not lone_subclasses([Module("a", "class A: ...\nclass B(A): ...\nclass C(A): ...")])


def test_kernels_do_not_import_each_other_in_a_circle() -> None:
    """A circle of packages imports in one order and fails in another."""
    package = "pallas_kernels"
    below: dict[str, set[str]] = {}
    for module in MODULES.values():
        own = module.name.split(".")[1:2]
        for found in imports(module):
            other = found.target.split(".")
            if module.name.startswith(f"{package}.") and other[0] == package:
                below.setdefault(own[0], set()).update(set(other[1:2]) - set(own))

    def reached(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        for other in sorted(below.get(name, ())):
            reached(other, (*path, name))

    for name in sorted(below):
        reached(name, ())
