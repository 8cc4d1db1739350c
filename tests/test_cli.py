"""The console script: help that teaches, mistakes in one line, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from core.cli import app
from server.consortium import read_consortium
from server.provision import provision
from simulations import cli
from simulations.cli import free_name, mean_of, read_figures, register

register(app)
RUNNER = CliRunner()


def test_help_names_every_command_and_option() -> None:
    text = RUNNER.invoke(app, ["--help"]).output
    assert all(command in text for command in ("run", "compare", "phantom", "config", "evaluate"))
    assert "deadline" in RUNNER.invoke(app, ["run", "--help"]).output


HEAVY = ("torch", "monai", "flwr", "hydra", "numpy", "sklearn", "matplotlib", "pandas")
"""What takes seconds to import, and no command that only looks, starts or stops needs."""
WATCHED = f"""
import sys
from core.cli import main
sys.argv[0] = "isocenter"
try:
    main()
finally:
    print("imported:", *sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits of a consortium, and a run that has ended."""
    folder = tmp_path_factory.mktemp("kits")
    plan = folder / "hills.yaml"
    plan.write_text("consortium: hills\nserver: 127.0.0.1:443\nsites: [hill]\n")
    provision(read_consortium(plan), folder / "hills")
    (folder / "hills" / "sites" / "hill" / "site.yaml").write_text("site: hill\ndata: {root: /data}\n")
    (folder / "run").mkdir()
    about = {"state": "finished", "words": "", "stage": "", "round": None, "told": "2026-03-01T09:00:00+00:00", "sites": {}}
    (folder / "run" / "status.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--help", 0),
        ("provision hills.yaml", 0),
        ("status run", 0),
        ("watch run", 0),
        ("server status hills/server", 1),
        ("server stop hills/server", 0),
        ("server start hills/none --background", 1),
        ("site init hills/sites/hill", 0),
        ("site policy hills/sites/hill", 0),
        ("site status hills/sites/hill", 3),
        ("site audit hills/sites/hill", 0),
        ("site approve hills/sites/hill", 0),
        ("site stop hills/sites/hill", 0),
        ("site start hills/sites --background", 1),
    ],
)
def test_commands_of_operators_import_nothing_that_takes_seconds(kits: Path, command: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *command.split()], cwd=kits, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (code, "imported:"), done.stdout + done.stderr


def test_config_prints_what_a_run_would_have() -> None:
    done = RUNNER.invoke(app, ["config", "objective=ntxent", "num_rounds=30"])
    assert done.exit_code == 0
    printed = json.loads(done.output)
    assert (printed["objective"]["name"], printed["num_rounds"]) == ("ntxent", 30)


@pytest.mark.parametrize("command", ["config", "run", "compare"])
def test_a_mistaken_override_is_one_line_and_exit_code_2(command: str) -> None:
    done = RUNNER.invoke(app, [command, "num_round=7"])
    assert done.exit_code == 2
    assert done.output.strip().startswith("config: an override must name a known key, got 'num_round'; nearest: num_rounds")


def test_a_missing_folder_is_one_line_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = RUNNER.invoke(app, ["run", "experiment=mcic", f"data.root={tmp_path}/absent"])
    assert done.exit_code == 1
    assert done.output.strip().startswith("data.root: it must be an existing folder")
    assert len(done.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_data_the_phantom_is_written_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "write_phantom", lambda *args, **kwargs: told.append((args, kwargs)))
    monkeypatch.setattr(cli, "simulate_in", lambda folder, overrides, _: told.append(overrides) or folder)
    done = RUNNER.invoke(app, ["run", "experiment=tiny"])
    assert done.exit_code == 0
    phantom = tmp_path / "data" / "phantom"
    assert told[0] == ((phantom,), {"seed": 0, "scale": 1.0})
    assert f'data.root="{phantom}"' in told[1]
    assert done.output.strip() == f"open {tmp_path / 'runs' / 'tiny' / 'report.html'}"


def test_a_copy_that_has_no_app_to_send_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "APP", tmp_path)
    done = RUNNER.invoke(app, ["run", "experiment=tiny", f"data.root={tmp_path}"])
    assert (done.exit_code, "must be installed from its checkout" in done.output) == (1, True)


def test_phantom_refuses_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    done = RUNNER.invoke(app, ["phantom", str(tmp_path), "--scale", "0.05"])
    assert done.exit_code == 1
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    assert free_name(tmp_path / "none", "run") == "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert free_name(tmp_path, "run") == "run-3"


def test_the_final_representation_is_the_erased_one_where_there_is_one(tmp_path: Path) -> None:
    def row(stage: str, value: float, site: str = "all") -> dict[str, object]:
        return {"stage": stage, "task": "site", "metric": "balanced_accuracy", "value": value, "site": site}

    path = tmp_path / "metrics.json"
    path.write_text(json.dumps([row("pretrained", 0.8), row("erased", 0.4), row("erased", 0.1, "north")]))
    key = ("final", "site", "balanced_accuracy")
    assert read_figures(path)[key] == 0.4
    path.write_text(json.dumps([row("pretrained", 0.8)]))
    assert read_figures(path)[key] == 0.8
    assert mean_of([{key: 0.2}, {key: 0.4}, {}], key) == pytest.approx(0.3)
    assert mean_of([{}], key) is None
