"""Every command of the README is run: by CI itself, or here."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import load_checkpoint
from simulations.workplace import workplace

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"<!-- run in: (\w+) -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
# What makes a long comparison short; the command is otherwise run as it stands.
SHORT = "num_rounds=1 warmup_rounds=0 ++debias.warmup_rounds=0 local_steps=1 finetune.num_rounds=1 finetune.local_steps=1"


def block(name: str) -> str:
    return "\n".join(text for place, text in BLOCKS if place == name)


def execute(script: str, folder: Path, **variables: str) -> str:
    """Run a block in a folder, with the checkout's virtual environment first on the path and nothing left behind."""
    with workplace({}) as place:
        environment = {**place.environment} | {
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ISOCENTER": str(ROOT),
            "ISOCENTER_CACHE": str(folder / "cache"),
            "FLWR_HOME": str(folder / "flwr"),
            **variables,
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, text=True, capture_output=True, check=False
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_block_of_commands_says_where_it_is_run() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("```bash") == len(BLOCKS)
    assert {place for place, _ in BLOCKS} == {"ci", "tour", "wrapped", "tables", "flower", "loopback", "measured"}


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
def test_measurements_run_when_shortened(tmp_path: Path) -> None:
    execute("isocenter phantom small --scale 0.2", tmp_path)
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
    printed = execute(f"{commands[2]} {shorter} --seeds 1 --method erasure", tmp_path, ABIDE=str(table))
    assert "erasure from sums" in printed
    assert list((tmp_path / "runs").rglob("figure.png"))


@pytest.mark.slow
def test_separate_sites_give_what_the_simulation_gives(tmp_path: Path) -> None:
    """The README's deployment, TLS and node authentication on loopback; then the same run as a simulation: the same weights."""
    execute(block("loopback"), tmp_path)
    deployed = tmp_path / "runs" / "hospitals"
    assert (deployed / "report.html").is_file()
    for site in ("north", "east", "west", "harbor"):
        shutil.rmtree(tmp_path / "phantom" / site)
    (tmp_path / "phantom" / "cohort.json").unlink()
    execute(
        "isocenter run experiment=tiny data.root=phantom data.pretrain_sites=[south,hill] data.target_sites=[hill] "
        "output=simulated name=hospitals policy.min_group=10",
        tmp_path,
    )
    simulated = tmp_path / "simulated" / "hospitals"
    for name in ("pretrain-0002", "full_finetuning-0001"):
        theirs, ours = (folder / "checkpoints" / f"{name}.safetensors" for folder in (deployed, simulated))
        state = load_checkpoint(ours).state
        assert all(torch.equal(value, state[key]) for key, value in load_checkpoint(theirs).state.items())
    assert (deployed / "metrics.json").read_text() == (simulated / "metrics.json").read_text()
