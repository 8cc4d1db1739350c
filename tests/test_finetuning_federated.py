"""Fine-tuning through the real apps: the same as on one machine, early stopping, models of single sites, privacy."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.checkpoint import load_checkpoint
from core.config import quoted
from core.finetune_command import open_job, prepared, tune
from server.sites import RunError

Federate = Callable[..., Path]
SHARED = "policy.share_per_scan=true evaluation=per_scan finetune.local_steps=3 finetune.batch_size=8"


@pytest.fixture
def targets(consortium: Path, write_site: Callable[..., None]) -> Path:
    """The small consortium with a second hospital that has patients, and scores for every subject."""
    write_site(consortium / "d", seed=9, healthy=8, patients=8)
    for folder in consortium.iterdir():
        lines = (folder / "participants.tsv").read_text().splitlines()
        scores = ["score", *(f"{90 + 3 * number}" for number in range(len(lines) - 1))]
        (folder / "participants.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in zip(lines, scores, strict=True)))
    return consortium


@pytest.fixture(autouse=True)
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probes of site and age: they take most of the time."""
    monkeypatch.setattr("server.app.evaluate_scans", lambda *_: ({}, ([], [])))


def test_through_flower_and_on_one_machine_it_is_the_same(federate: Federate, targets: Path, tmp_path: Path) -> None:
    stages = (
        "finetune.stages=[linear_probe,full_finetuning] finetune.num_rounds=2 finetune.test_time_views=2 "
        "data.target_sites=[c,d] debias=none"
    )
    run = federate(targets, f"finetune=both num_rounds=1 warmup_rounds=0 {stages} {SHARED}", name="whole")
    overrides = ["experiment=tiny", "data=folder", f"data.root={quoted(str(targets))}", *stages.split(), *SHARED.split()]
    config, start = prepared(run, overrides)
    tuned = tune(open_job(config, start, tmp_path / "alone", torch.device("cpu"), lambda _line: None))
    for name in ("linear_probe-0002", "full_finetuning-0002"):
        theirs, ours = (load_checkpoint(f / "checkpoints" / f"{name}.safetensors").state for f in (run, tmp_path / "alone"))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours), name
    figures = {(e["stage"], e["metric"], e["site"]): e["value"] for e in json.loads((run / "metrics.json").read_text())}
    assert figures == pytest.approx({(e.stage, e.metric, e.site): e.value for e in tuned.evaluations}, abs=1e-4)
    with (run / "predictions-full_finetuning.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["site"] for row in rows} == {"c", "d"}
    assert {row["split"] for row in rows} == {"val", "test"}


def test_without_pretraining_each_site_its_own_model_and_the_best_round(federate: Federate, targets: Path) -> None:
    first = federate(targets, "num_rounds=1 warmup_rounds=0 debias=none evaluation=none", name="first")
    stages = "finetune.stages=[full_finetuning] finetune.num_rounds=6 finetune.learning_rate=0.1 finetune.patience=1"
    own = "finetune.where=local data.target_sites=[c,d] debias=none"
    run = federate(targets, f"finetune=both start={quoted(str(first))} num_rounds=0 {stages} {own} {SHARED}", name="own")
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"full_finetuning-c", "full_finetuning-d"}
    for site in "cd":
        losses = [line["validation_loss"] for line in lines if line["stage"] == f"full_finetuning-{site}"]
        best = losses.index(min(losses)) + 1
        assert len(losses) in (6, best + 1)  # one round without a smaller loss and it stops
        kept = [path.name for path in (run / "checkpoints").glob(f"full_finetuning-{site}-*")]
        assert kept == [f"full_finetuning-{site}-{best:04d}.safetensors"]
    assert {e["regime"] for e in json.loads((run / "metrics.json").read_text())} == {"local-only"}
    begun = load_checkpoint(run / "checkpoints" / "untrained-0000.safetensors").state
    assert all(
        torch.equal(value, begun[name])
        for name, value in load_checkpoint(first / "checkpoints" / "pretrain-0001.safetensors").state.items()
        if name.startswith("encoder.")
    )


def test_a_score_is_learnt_at_the_sites_that_have_it_and_elsewhere_it_need_not_be(federate: Federate, targets: Path) -> None:
    table = targets / "a" / "participants.tsv"
    table.write_text("".join("\t".join(line.split("\t")[:-1]) + "\n" for line in table.read_text().splitlines()))
    target = "finetune.target.kind=regression finetune.target.labels=[score] finetune.target.offset=120 finetune.target.scale=20"
    stages = "finetune.stages=[linear_probe] data.columns.targets=[score] data.target_sites=[c] debias=none"
    unseen = "data.unseen_sites=[b]"
    run = federate(targets, f"finetune=both num_rounds=1 warmup_rounds=0 {target} {stages} {unseen} {SHARED}", name="score")
    figures = {(e["task"], e["metric"], e["site"]): e["value"] for e in json.loads((run / "metrics.json").read_text())}
    assert 0 < figures["score", "mae", "all"] < 100
    # Sites that take no part in it are scored where they have the column.
    assert {site for task, metric, site in figures if (task, metric) == ("score", "mae_unseen")} >= {"b", "d"}
    assert not any(task == "score" and site == "a" for task, _, site in figures)
    sums = f"finetune=both num_rounds=1 warmup_rounds=0 {target} {stages} evaluation=sums"
    report = federate(targets, sums, name="sums") / "report.html"
    assert "score is regression" in report.read_text()


def test_privacy_is_per_site_and_told(federate: Federate, targets: Path) -> None:
    first = federate(targets, "num_rounds=1 warmup_rounds=0 debias=none evaluation=none", name="first")
    private = "privacy=dp_sgd privacy.delta=0.01 finetune.class_weights=none finetune.stages=[linear_probe] finetune.num_rounds=2"
    private += " finetune.head_learning_rate=1e-9"
    options = f"finetune=both start={quoted(str(first))} num_rounds=0 debias=none data.target_sites=[c,d] {private} {SHARED}"
    run = federate(targets, options, name="private")
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    told = lines[-1]["privacy"]
    assert all(7.6 < told[site]["epsilon"] <= 8 and told[site]["steps"] == 6 for site in "cd")
    assert all(values == {} for line in lines for values in line["sites"].values())
    # What a random head tells of few subjects is never unlearned: it begins with zeros.
    head = load_checkpoint(run / "checkpoints" / "linear_probe-0002.safetensors").state["head.1.weight"]
    assert 0 < head.abs().max() < 1e-6
    report = (run / "report.html").read_text()
    assert "differentially private for a subject" in report
    assert "Not covered by it" in report


def test_what_cannot_be_is_told_before_a_folder_is_made(federate: Federate, targets: Path, tmp_path: Path) -> None:
    first = federate(targets, "num_rounds=1 warmup_rounds=0 debias=none evaluation=none", name="first")
    for options, message in (
        (f"start={quoted(str(first))} num_rounds=0 encoder.width=2", "must be an encoder of the run's architecture"),
        ("start=/nowhere num_rounds=0", "there is none"),
        ("finetune.label_maps={suffix: _seg} finetune.stages=[linear_probe]", "segmentation is for `isocenter finetune`"),
        ("finetune.stages=[linear_probe] finetune.label_fraction=0.01 data.target_sites=[c]", "leaves none of the"),
    ):
        chosen = [options.replace("{suffix: _seg}", "'{suffix: _seg}'"), "finetune.num_rounds=1", "debias=none"]
        with pytest.raises((RunError, ValueError), match=message):
            federate(targets, *chosen, name="wrong")
        assert not (tmp_path / "runs" / "wrong" / "report.html").exists()
