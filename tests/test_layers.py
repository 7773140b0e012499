"""Imports point one way, as the table below says, also where an import hides inside a function."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_fast"

# What may import what, from the top down; a part may also import its own layer, and everything below it.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"cai_jobs"},
    {"cai_checks"},
    {"jobs", "cai_keys", "keys", "bench", "commands"},
    {"quickstart"},
    {"trainers"},
    {
        "rollout",
        "rollout_server",
        "generation",
        "decoder",
        "decoder_layers",
        "trunk",
        "advantages",
        "rewards",
        "judges",
        "data",
        "models",
        "packing",
        "parallel",
        "sharding",
        "preferences",
        "report",
        "monitors",
        "info",
    },
    {"disk", "charts", "page"},
    {"ops"},
    {"kernels", "errors", "terminal", "_C", "_version"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
WITHOUT_TRANSFORMERS = {
    "compat", "advantages", "errors", "terminal", "disk", "ops", "kernels", "report", "monitors", "charts", "page",
    "info", "",
}  # fmt: skip


def part_of(path):
    """rlhf_fast/ops/gae.py -> "ops"; rlhf_fast/cli.py -> "cli"; rlhf_fast/__init__.py -> ""."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imports(path):
    """(line, dotted module, name taken from it or "") of every import in the file, relative ones made absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*up, *filter(None, [node.module])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def imported_part(module, name):
    """Which part of the package an import reaches; None outside the package, "ops" for a public function."""
    if module.split(".")[0] != "rlhf_fast":
        return None
    dotted = [*module.split(".")[1:], name]
    return dotted[0] if dotted[0] in RANK or dotted[0] == "compat" else "ops"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path):
    part = part_of(path)
    for line, module, name in imports(path):
        reached = imported_part(module, name)
        where = f"{path.relative_to(ROOT)}:{line} imports {module} {name}"
        if module.split(".")[0] == "transformers":
            assert part not in WITHOUT_TRANSFORMERS, f"{where}: transformers belongs to models, data and above"
        if reached is None or reached == part or part == "":  # __init__ names everything, and imports it on use
            continue
        if part == "compat":
            assert reached == "ops", f"{where}: compat stands on the ops"
        else:
            assert part in RANK, f"rlhf_fast/{part} is not in the table of layers; give it a place"
            assert reached in RANK and RANK[reached] >= RANK[part], f"{where}: points up"


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.[ch]*")), ids=lambda path: str(path.relative_to(ROOT)))
def test_native_code_knows_no_torch_and_common_knows_no_device(path):
    included = re.findall(r'^\s*#include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
    assert not [name for name in included if re.match(r"(torch|ATen|c10)/", name)]
    if "common" in path.parts:
        assert not [name for name in included if name.startswith(("../cpu", "../cuda", "cpu/", "cuda/"))]
