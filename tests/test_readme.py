"""Every command of the README is run: by CI itself, or here."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import load_checkpoint
from core.flower_env import free_port
from core.service import Service
from simulations.workplace import Workplace, workplace

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"<!-- run in: (\w+) -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
# What makes a long comparison short; the command is otherwise run as it stands.
SHORT = "num_rounds=1 warmup_rounds=0 ++debias.warmup_rounds=0 local_steps=1 finetune.num_rounds=1 finetune.local_steps=1"


def blocks(name: str) -> list[str]:
    return [text for place, text in BLOCKS if place == name]


def block(name: str) -> str:
    return "\n".join(blocks(name))


def execute(script: str, folder: Path, **variables: str) -> str:
    """Run a block in a folder, with the checkout's virtual environment first on the path and nothing left behind."""
    with workplace({}) as place:
        return execute_at(place, script, folder, **variables)


def execute_at(place: Workplace, script: str, folder: Path, *, code: int = 0, typed: str = "", **variables: str) -> str:
    """Run a block in a folder that stands for a machine; what it starts in the background goes on.

    Args:
        place: whose leaving ends it all.
        script: the block.
        folder: where it is run.
        code: how it must end.
        typed: what the user types.
        variables: of the environment.
    """
    environment = {**place.environment} | {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ISOCENTER": str(ROOT),
        "ISOCENTER_CACHE": str(folder / "cache"),
        "FLWR_HOME": str(folder / "flwr"),
        **variables,
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, input=typed, capture_output=True, check=False)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_every_block_of_commands_says_where_it_is_run() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("```bash") == len(BLOCKS)
    assert {place for place, _ in BLOCKS} == {
        "ci",
        "tour",
        "wrapped",
        "tables",
        "flower",
        "coordinator",
        "site",
        "loopback",
        "measured",
    }


def test_ci_runs_the_two_commands() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for command in block("ci").split("\n"):
        target = command.removeprefix("make ").strip()
        assert not target or re.search(rf"\b{target}\b", ci), f".ci/run must run {command}"


def test_the_lines_of_python_run() -> None:
    [lines] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    code = compile(lines, "README.md", "exec")
    exec(code, names)
    z1, loss = names["z1"], names["loss"]
    assert isinstance(z1, torch.Tensor)
    assert isinstance(loss, torch.Tensor)
    assert loss.isfinite()
    assert z1.grad is not None
    assert z1.grad.isfinite().all()


MEASURED: list[tuple[str, str, tuple[str, ...]]] = [
    ("simulations.speed data", "few --turns 1 --first-turns 1 --no-memory", ()),
    ("simulations.speed losses", "--sizes 16 --repeats 1 --seconds 0", ()),
    (
        "simulations.coloured_digits",
        "--seeds 1 --correlations .95 --epochs 2 --workers 1",
        ("coloured_digits.png", "coloured_digits.json"),
    ),
    ("simulations.age_maps", "experiment=tiny data=phantom data.root=small", ("age_maps.png", "age_maps.json")),
]


@pytest.mark.slow
@pytest.mark.long
def test_measurements_run_when_shortened(tmp_path: Path) -> None:
    execute("isocenter phantom small --scale 0.1", tmp_path)
    (tmp_path / "few").mkdir()
    for image in sorted((tmp_path / "small" / "north").rglob("*_T1w.nii.gz"))[:3]:
        shutil.copy(image, tmp_path / "few")
    commands = [line for line in block("measured").splitlines() if line]
    assert len(commands) == len(MEASURED)
    for command, (name, shorter, files) in zip(commands, MEASURED, strict=True):
        assert command.startswith(f"python -m {name}")
        execute(f"{command} {shorter}", tmp_path)
        assert all(list((tmp_path / "runs").rglob(name)) for name in files)


@pytest.mark.slow
def test_the_tour_and_plain_flower(tmp_path: Path) -> None:
    printed = execute(block("tour"), tmp_path)
    assert "finished in" in printed
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
    assert (tmp_path / "runs" / "tiny-finetuned" / "report.html").is_file()
    assert (tmp_path / "runs" / "tiny" / "export" / "encoder.safetensors").is_file()
    # On a busy machine the SuperLink that Flower's first command starts may not answer it in time.
    execute(block("flower").replace("flwr run", "flwr ls > /dev/null 2>&1 || flwr ls > /dev/null\nflwr run", 1), tmp_path)
    assert (tmp_path / "runs" / "plain" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_long_comparisons_run_when_shortened(tmp_path: Path, write_site: Callable[..., None]) -> None:
    """`isocenter` is wrapped: a few steps only, on a small phantom and on a folder laid out as the real one."""
    for site in ("A", "B"):
        write_site(tmp_path / "bids" / site, seed=len(site) + ord(site), healthy=14, patients=10, gain=ord(site) / 65)
    rows = ["participant_id\tsite\tage\tsex\tdiagnosis"]
    for site in ("A", "B"):
        (tmp_path / "mcic" / site).mkdir(parents=True)
        for line in (tmp_path / "bids" / site / "participants.tsv").read_text().splitlines()[1:]:
            subject, age, sex, diagnosis, _ = line.split("\t")
            rows.append(f"{subject}{site}\t{site}\t{age}\t{sex}\t{diagnosis}")
            source = tmp_path / "bids" / site / subject / "ses-01" / "anat" / f"{subject}_ses-01_T1w.nii.gz"
            shutil.copy(source, tmp_path / "mcic" / site / f"{subject}{site}_space-MNI_T1w.nii.gz")
    (tmp_path / "mcic" / "participants.tsv").write_text("\n".join(rows) + "\n")
    execute("isocenter phantom phantom --scale 0.1", tmp_path)
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "isocenter"
    real = Path(sys.executable).parent / "isocenter"
    wrapper.write_text(
        f'#!/bin/bash\ncase "$*" in *mcic*) more="";; *) more="data.root={tmp_path}/phantom";; esac\n'
        f'exec {real} "$@" {SHORT} $more\n'
    )
    wrapper.chmod(0o755)
    script = block("wrapped").replace("--seeds 3", "--seeds 1")
    printed = execute(script, tmp_path, MCIC=str(tmp_path / "mcic"))
    assert printed.count("finished in") == 3
    assert (tmp_path / "runs" / "phantom-compare.json").is_file()
    assert "site balanced_accuracy: debias=none" in printed


@pytest.mark.slow
@pytest.mark.long
def test_tables_of_features_run_when_shortened(tmp_path: Path) -> None:
    """On a table laid out as ABIDE's, with its sites' names."""
    random = np.random.default_rng(0)
    small = ("UCLA_2", "CMU_a", "CMU_b", "MaxMun_a", "MaxMun_b", "MaxMun_d")
    lines = [";".join(["FILE_ID", "AGE_AT_SCAN", "SEX", "FIQ", "DX_GROUP", *(f"area{i}" for i in range(8))])]
    for number, site in enumerate(("NYU", "USM", "KKI", *small)):
        offset = random.normal(0, 2, 8)
        for subject in range(110 if site not in small else 6):
            age = 6 + 20 * random.random()
            x = age / 5 * np.arange(8) % 3 + offset + random.normal(0, 0.5, 8)
            cells = [f"{site}_{50000 + 100 * number + subject}", f"{age:.2f}", "1", "-9999", "-1" if subject % 3 else "1"]
            lines.append(";".join([*cells, *(f"{value:.3f}" for value in x)]))
    table = tmp_path / "abide.csv"
    table.write_text("\n".join(lines) + "\n")
    shorter = "num_rounds=11 warmup_rounds=0 local_steps=1 encoder.width=16"
    commands = block("tables").strip().splitlines()
    assert [command.split()[:3] for command in commands] == [
        ["isocenter", "run", "experiment=abide"],
        ["isocenter", "evaluate", "runs/abide"],
        ["python", "-m", "simulations.site_removal"],
    ]
    printed = execute(f"{commands[0]} {shorter}", tmp_path, ABIDE=str(table))
    assert "erased" in printed
    assert "held-out" in execute(commands[1], tmp_path)
    printed = execute(f"{commands[2]} {shorter} --seeds 1 --workers 1 --method erasure", tmp_path, ABIDE=str(table))
    assert "erasure from sums" in printed
    assert list((tmp_path / "runs").rglob("figure.png"))


@pytest.mark.slow
@pytest.mark.long
def test_flowers_own_commands_run_the_app_at_separate_sites(tmp_path: Path) -> None:
    execute(block("loopback"), tmp_path)


@pytest.mark.slow
def test_the_two_pages_alone_make_a_consortium_that_gives_what_a_simulation_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federate: Callable[..., Path]
) -> None:
    """A coordinator and two sites, each in a folder that stands for its machine, type what their pages say and nothing else."""
    execute("isocenter phantom scans --scale 0.3", tmp_path)
    for path in (tmp_path / "scans").iterdir():
        if path.name not in ("south", "harbor"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    machines = {name: tmp_path / f"at-{name}" for name in ("hills", "south", "harbor")}
    for folder in machines.values():
        folder.mkdir(mode=0o700)
    hills = machines.pop("hills")
    port = free_port()

    def page(name: str, site: str = "south") -> list[str]:
        """The blocks of a page, with the addresses and paths of this consortium."""
        there = {
            "fl.example.org:9443": f"127.0.0.1:{port}\ncontrol_port: {port}",
            "south": site,
            f"/data/{site}": str(tmp_path / "scans" / site),
        }
        return [functools.reduce(lambda text, pair: text.replace(*pair), there.items(), text) for text in blocks(name)]

    written, started, sent, again, after = page("coordinator")
    pages = {site: page("site", site) for site in machines}
    with workplace({}) as place, ExitStack() as stack:
        execute_at(place, written, hills)
        for site, machine in machines.items():
            unpacked, *_ = pages[site]
            shutil.copy(hills / "hills" / "sites" / f"{site}.zip", machine)
            told = execute_at(place, unpacked, machine)
            assert "read the fingerprint to them" in told
            shutil.copy(machine / site / f"{site}.csr", hills)
        stack.callback(Service("server", hills / "hills" / "server" / "state").stop)
        execute_at(place, started, hills)
        for site, machine in machines.items():
            stack.callback(Service("site", machine / site / "state").stop)
            assert "is connected to" in execute_at(place, pages[site][1], machine)
        refused = execute_at(place, sent, hills, code=1)
        for site, machine in machines.items():
            assert re.search(rf"{site}.*must approve the app", refused)
            assert "approved" in execute_at(place, pages[site][2], machine, typed="y\n")
        assert "finished in" in execute_at(place, again, hills)
        for site, machine in machines.items():
            assert "the log is whole" in execute_at(place, pages[site][3], machine)
        assert "finished" in execute_at(place, after, hills)
    deployed = hills / "hills" / "server" / "state" / "runs" / "trial"
    assert (deployed / "report.html").is_file()
    monkeypatch.setenv("ISOCENTER_CACHE", str(tmp_path / "cache"))
    simulated = federate(tmp_path / "scans", "finetune=both policy.min_group=10", name="simulated")
    for name in ("pretrain-0002", "full_finetuning-0001"):
        theirs, ours = (load_checkpoint(folder / "checkpoints" / f"{name}.safetensors").state for folder in (deployed, simulated))
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
