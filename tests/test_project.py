"""The project holds together: packages, layers, notebooks, folders."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lib import paths

ROOT = paths.root()
PACKAGES = (
    "torch triton transformers peft trl transformer-lens sae-lens nnsight jupyterlab papermill "
    "ipywidgets plotly circuitsvis datasets safetensors openai nbmake"
).split()
PYTHONS = ("3.11", "3.12", "3.13")
LAYERS = (
    "paths runtime sparse", "world runs", "data", "models", "activations", "training",
    "dictionaries", "spalf latents", "adapters", "analysis", "display",
)  # fmt: skip
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer.split()}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def requirements(lines) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return requirements(line for line in lines if line and not line.startswith("#"))


def test_packages_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = requirements(project["dependencies"])
    assert set(PACKAGES) <= set(needed)
    pinned = constraints()
    extras = requirements(project["optional-dependencies"]["dev"])
    for name, requirement in {**needed, **extras}.items():
        assert re.fullmatch(r">=[\d.]+", str(requirement.specifier)), name
        version = str(pinned[name].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{name}: {requirement} but {version}"
    assert set(project["optional-dependencies"]) == {"dev", "tracking", "cluster", "bench", "gpu"}


def test_versions_of_python_are_stated_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = [line.rpartition(" ")[2] for line in project["classifiers"]]
    assert supported == list(PYTHONS)
    assert project["requires-python"] == f">={PYTHONS[0]}"
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda[0] == f"python={PYTHONS[1]}"


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_fit_the_published_torch(python):
    """A local build of torch may require less, and hide a conflict."""
    published = (ROOT / "tests" / "torch_requires.txt").read_text().splitlines()
    pinned, linux = constraints(), {"platform_system": "Linux", "python_version": python}
    assert published[0] == f"# torch{pinned['torch'].specifier}"
    assert Version(torch.__version__).public == Version(published[0].rpartition("=")[2]).public
    needed = requirements(published[1:])
    assert needed["triton"].specifier  # else this checks nothing
    for name, requirement in needed.items():
        if requirement.marker and not requirement.marker.evaluate(linux):
            continue
        if name in pinned:
            version = str(pinned[name].specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{requirement} but {version}"


def test_conda_environment_agrees():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert conda == [f"python={PYTHONS[1]}", "pip"]
    assert pip["pip"] == ["--constraint constraints.txt", *PACKAGES, "--editable .[dev]"]


LIB = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / "lib").rglob("*.py"))
}


def imported(name: str) -> set[str]:
    """Modules of `lib` that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(LIB[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lib":
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & LIB.keys()
            found |= inner or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "lib"}
    return found


def test_layers_look_downward():
    """A room may import its own layer's rooms and lower ones."""
    upward = {
        (name, other)
        for name in LIB.keys() - {"lib"}
        for other in imported(name)
        if RANK[other.split(".")[1]] > RANK[name.split(".")[1]]
    }
    assert not upward and not imported("lib")


def test_no_module_imports_itself_in_a_circle():
    """A package's `__init__` counts for the modules that it offers, not for those that need it."""
    graph = {name: imported(name) for name in LIB}
    for name, others in graph.items():
        graph[name] = {other for other in others if not name.startswith(f"{other}.")}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(LIB)


def test_imports_stand_at_the_top():
    """Inside a function or behind TYPE_CHECKING they would hide a circle."""
    for name, file in LIB.items():
        text = file.read_text()
        assert "TYPE_CHECKING" not in text, name
        assert not re.search(r"^[ \t]+(from|import) lib\b", text, re.M), name


def test_importing_lib_has_no_effects():
    modules = sorted(LIB)
    code = f"""
import importlib, random, torch
state = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
for name in {modules}: importlib.import_module(name)
assert torch.equal(state[0], torch.get_rng_state())
assert state[1:] == (random.getstate(), torch.get_num_threads())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda f: f.stem)
def test_notebook_form(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert tagged == code[:1]
    names = set()
    for line in "".join(tagged[0]["source"]).splitlines():
        assert re.match(r"\w+: \w+ = .+  # .+", line), line
        names.add(line.split(":")[0])
    assert {"seed", "run_name"} <= names
    heading = "".join(cells[0]["source"])
    assert all(f"**{word}" in heading for word in ("Question.", "Answer.", "Costs", "Writes"))
    assert "run.finish()" in "".join(code[-1]["source"])
    for example in (ROOT / "papermill_runs" / "examples").glob(f"{notebook.stem[:2]}_*.yaml"):
        assert set(yaml.safe_load(example.read_text())) <= names, example.name


@pytest.mark.parametrize("folder", "notebooks lib data loras figures papermill_runs tests".split())
def test_folders_exist_in_a_clone(folder):
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files", folder], capture_output=True, text=True, check=True
    )
    assert tracked.stdout
