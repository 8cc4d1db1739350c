"""The rules of the house, read from the source: who may import whom, and what never appears."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "client", "server", "simulations")
MODULES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

MAY_IMPORT = {
    "core": {"core"},
    "client": {"client", "core"},
    "server": {"server", "core"},
    "simulations": {"simulations", "client", "server", "core"},
}
# One framework, one home: an upgrade touches the files of one concept.
HOMES = {
    "flwr": (
        "core/exchange.py",
        "client/app.py",
        "client/jobs.py",
        "client/tasks.py",
        "client/w",
        "client/supernode.py",
        "server/",
        "simulations/",
    ),
    "ray": (),
    "hydra": ("core/config.py",),
    "omegaconf": ("core/config.py",),
    "nibabel": ("core/data/", "simulations/"),
    "monai": ("core/data/", "core/models.py", "simulations/speed_data.py", "simulations/peers/"),
    "nvflare": ("simulations/peers/",),
    "opacus": ("core/privacy.py",),
    "sklearn": ("core/evaluation/", "core/report_figures.py", "simulations/"),
    "pandas": ("core/data/labels.py",),
    "pandera": ("core/data/labels.py",),
    "matplotlib": ("core/report", "simulations/"),
    "mpl_toolkits": ("core/report", "simulations/"),
    "jinja2": ("core/report", "server/provision.py", "simulations/"),
}
PUBLIC_FLOWER = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
# Flower gives a message no identity outside its own processes; the in-process federation has to.
# The site's gate replaces parts of Flower's SuperNode, our SuperLink one of Flower's; both refuse any other Flower than the one
# that they were written for.
PRIVATE_FLOWER = {
    "simulations/in_process.py": {"flwr.supercore.task_identity"},
    "client/supernode.py": {
        "flwr.common.config",
        "flwr.common.constant",
        "flwr.supercore.inflatable.inflatable_object",
        "flwr.supercore.inflatable.inflatable_utils",
        "flwr.supercore.run",
        "flwr.supernode",
        "flwr.supernode.cli.flower_supernode",
    },
    "server/grid.py": {"flwr.supercore.inflatable.inflatable_utils"},
    "server/flower_superlink.py": {"flwr.supercore.sql_mixin", "flwr.superlink", "flwr.superlink.cli.flower_superlink"},
}
RUN_CODE = {"pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve"}


def imported(tree: ast.Module) -> list[str]:
    """Full names of the modules that are imported, wherever in the file; relative ones begin with a dot."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return names


def import_problems(path: str, source: str) -> list[str]:
    problems = []
    for name in imported(ast.parse(source)):
        top = name.split(".")[0]
        if name.startswith("."):
            problems.append(f"{path} imports {name} relatively")
        if top in PACKAGES and top not in MAY_IMPORT[path.split("/")[0]]:
            problems.append(f"{path} imports {name}")
        if top in HOMES and not path.startswith(HOMES[top]):
            problems.append(f"{path} imports {name}, at home in {HOMES[top] or 'no file'}")
        if top == "flwr" and name not in PUBLIC_FLOWER | PRIVATE_FLOWER.get(path, set()):
            problems.append(f"{path} imports {name}, which Flower does not keep stable")
        if top in RUN_CODE:
            problems.append(f"{path} imports {name}, which runs what it reads")
    return problems


def danger_problems(path: str, source: str) -> list[str]:
    """Ways in which what is read, or what the server sends, could choose the code that runs."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                problems.append(f"{path}:{node.lineno} calls {name}")
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                problems.append(f"{path}:{node.lineno} uses torch.load")
            case ast.ImportFrom(module="torch", names=names) if "load" in {alias.name for alias in names}:
                problems.append(f"{path}:{node.lineno} uses torch.load")
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                problems.append(f"{path}:{node.lineno} allows pickle")
            case ast.Constant(value=str(text)) if "_target_" in text:
                problems.append(f"{path}:{node.lineno} mentions _target_")
    return problems


def name_problems(path: str, source: str) -> list[str]:
    problems = [] if ast.get_docstring(ast.parse(source)) else [f"{path} has no docstring"]
    if re.search(r"(^|/)(test_[^/]*|[^/]*_test)\.py$", path):
        problems.append(f"{path} is called like a test: Flower leaves it out of its bundle")
    return problems


def gitignore_problems(text: str) -> list[str]:
    """Folder patterns that match at any depth; Flower applies them to its bundle, where `data/` would drop core/data."""
    harmless = {"__pycache__/", "*.egg-info/"}
    return [
        f".gitignore: {line} is not anchored"
        for line in text.splitlines()
        if line and not line.startswith(("#", "/")) and line not in harmless and ("." not in line or line.endswith("/"))
    ]


def bundle_problems(pyproject: dict, root: Path) -> list[str]:
    flower = pyproject["tool"]["flwr"]
    problems = ["pyproject: [tool.flwr.federations] makes flwr rewrite the file"] if "federations" in flower else []
    empty = [pattern for pattern in flower["app"]["fab-include"] if not any(root.glob(pattern))]
    problems += [f"pyproject: fab-include {pattern} matches nothing" for pattern in empty]
    if not isinstance(pyproject["project"].get("version"), str):
        problems.append("pyproject: [project].version must be written out, flwr reads it there")
    return problems


@pytest.mark.parametrize("path", MODULES)
def test_a_module_keeps_the_rules(path: str):
    source = (ROOT / path).read_text()
    assert import_problems(path, source) + danger_problems(path, source) + name_problems(path, source) == []


def test_no_config_names_code():
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    assert configs
    assert [path for path in configs if "_target_" in path.read_text()] == []


def test_flower_bundles_what_it_should():
    assert bundle_problems(PYPROJECT, ROOT) == []
    assert gitignore_problems((ROOT / ".gitignore").read_text()) == []


def test_no_folder_shadows_another_package():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages & {"tests", "examples", "benchmarks", "utils", "data"} == set()
    assert [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/models.py", "import server"),
        ("core/models.py", "def late():\n    from client.app import app"),
        ("core/models.py", "import torch, simulations.cohort"),
        ("core/data/bids.py", "from . import volumes"),
        ("client/app.py", "import server.strategy as s"),
        ("server/app.py", "from client import site"),
        ("core/training.py", "from flwr.app import Message"),
        ("client/site.py", "import flwr.clientapp"),
        ("server/app.py", "from flwr.common.logger import log"),
        ("server/app.py", "from flwr.supercore.task_identity import TaskIdentity"),
        ("simulations/launch.py", "import ray"),
        ("server/strategy.py", "from omegaconf import OmegaConf"),
        ("core/losses/weak.py", "import hydra.utils"),
        ("core/models.py", "import nibabel as nib"),
        ("core/training.py", "from monai.networks.nets import DenseNet121"),
        ("core/moments.py", "from sklearn.decomposition import PCA"),
        ("core/training.py", "import matplotlib.pyplot as plt"),
        ("client/app.py", "import jinja2"),
        ("core/data/manifest.py", "import pandas as pd"),
        ("core/checkpoint.py", "import pickle"),
        ("core/checkpoint.py", "from joblib import load"),
    ],
)
def test_forbidden_imports_are_found(path: str, source: str):
    assert len(import_problems(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("simulations/launch.py", "import client.app, server.app, core.config"),
        ("server/app.py", "from flwr.serverapp.strategy import FedAvg"),
        ("simulations/in_process.py", "from flwr.supercore.task_identity import TaskIdentity"),
        ("core/report_page.py", "import jinja2"),
        ("core/data/volumes.py", "import monai.data"),
        ("core/models.py", "import clientele"),
    ],
)
def test_allowed_imports_are_not_found(path: str, source: str):
    assert import_problems(path, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "state = torch.load(path)",
        "load = torch.load",
        "from torch import nn, load",
        "np.load(path, allow_pickle=True)",
        "cls = config['_target_']",
    ],
)
def test_dangerous_code_is_found(source: str):
    assert len(danger_problems("core/x.py", source)) == 1


@pytest.mark.parametrize("source", ["model.eval()", "from torch import nn", "np.load(path, allow_pickle=False)"])
def test_harmless_code_is_not_found(source: str):
    assert danger_problems("core/x.py", source) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/test_set.py", '"""A."""'),
        ("core/data/split_test.py", '"""A."""'),
        ("core/a.py", "import os\n"),
        ("core/__init__.py", ""),
    ],
)
def test_names_and_missing_docstrings_are_found(path: str, source: str):
    assert len(name_problems(path, source)) == 1


def test_harmless_names_are_not_found():
    assert name_problems("core/latest.py", '"""The newest checkpoint."""') == []


def test_unanchored_folders_are_found():
    assert len(gitignore_problems("data/\nruns\n**/out/")) == 3
    assert gitignore_problems("# data/\n\n/data/\n__pycache__/\n*.egg-info/\n*.fab\n") == []


def test_a_bundle_that_flower_would_spoil_is_found(tmp_path: Path):
    app = {"fab-include": ["core/**/*.py"]}
    (tmp_path / "core").mkdir()
    (tmp_path / "core/a.py").touch()
    good = {"project": {"version": "1.0"}, "tool": {"flwr": {"app": app}}}
    assert bundle_problems(good, tmp_path) == []
    assert bundle_problems({**good, "tool": {"flwr": {"app": app, "federations": {}}}}, tmp_path) != []
    assert bundle_problems({**good, "tool": {"flwr": {"app": {"fab-include": ["server/*.py"]}}}}, tmp_path) != []
    assert bundle_problems({**good, "project": {"dynamic": ["version"]}}, tmp_path) != []
