"""House rules of the package's imports: their order, and that importing does nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torch_pd

PACKAGE = Path(torch_pd.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A part imports itself and the parts of earlier rows; parts of one row do not know each other.
ORDER = [
    ["config"],
    ["request"],
    ["ops"],
    ["board", "peer"],
    ["record"],
    ["roll"],
    ["dist", "child"],
    ["launch"],
    ["sizing"],
    ["costs"],
    ["context"],
    ["kv", "weights"],
    ["nn"],
    ["engine"],
    ["llm"],
    ["cli"],
    ["__init__", "__main__"],
]
ROW = {part: row for row, parts in enumerate(ORDER) for part in parts}


def imported(path: Path) -> set[str]:
    """Absolute names of all that a file imports, in functions as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(module: str) -> set[str]:
    """The modules of torch_pd that a module imports, without the package's prefix."""
    names = {n.removeprefix("torch_pd.") for n in imported(MODULES[module]) if "torch_pd." in n}
    return names & set(MODULES)


def test_every_module_has_a_place_in_the_order():
    assert {module.split(".")[0] for module in MODULES} <= set(ROW)


@pytest.mark.parametrize("module", MODULES)
def test_import_order(module):
    part = module.split(".")[0]
    for other in imported_modules(module):
        other_part = other.split(".")[0]
        allowed = other_part == part or ROW[other_part] < ROW[part]
        assert allowed, f"torch_pd.{module} must not import torch_pd.{other}"


def test_the_scheduler_imports_no_torch():
    """Nor does anything that it imports: it decides on integers."""
    todo, seen = ["engine.scheduler"], set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        todo += imported_modules(module)
        roots = {name.split(".")[0] for name in imported(MODULES[module])}
        assert not roots & {"torch", "transformers"}, f"torch_pd.{module} imports {roots}"


IMPORT_ALL = """
import importlib, os, sys
import torch, transformers  # theirs may do as they like

package, modules = sys.argv[1], sys.argv[2:]
deeds = []

def audit(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "subprocess.Popen"):
        deeds.append((event, args[1:]))

# Only reads by our own code count: other libraries have settings of their own.
def watched(read):
    def wrapper(self, key, *rest):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith("<frozen") or frame.f_globals["__name__"] in (
            "os", "_collections_abc"
        ):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(package):
            deeds.append(("environment", key))
        return read(self, key, *rest)
    return wrapper

environ = type(os.environ)
environ.__getitem__ = watched(environ.__getitem__)
environ.__setitem__ = watched(environ.__setitem__)
sys.addaudithook(audit)
threads = torch.get_num_threads()
for module in modules:
    importlib.import_module(module)
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert torch.get_num_threads() == threads
assert torch.get_default_dtype() == torch.float32
assert not deeds, deeds
"""


def test_importing_touches_no_device_network_or_environment():
    modules = ["torch_pd"] + [f"torch_pd.{m}" for m in MODULES if not m.startswith("__")]
    command = [sys.executable, "-c", IMPORT_ALL, str(PACKAGE), *modules]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
