"""A consortium from kits, with real processes: a server, sites behind their gates, their workers, policies and logs."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from client.audit import AuditLog
from core.flower_env import processes
from simulations.consortium import local_consortium

RUN = "experiment=tiny data=sites name=run num_rounds=3 debias=none finetune=none evaluation=none policy.min_group=2"


@pytest.mark.slow
def test_a_run_at_separate_sites_outlives_a_killed_worker_and_is_written_down_at_each(
    tmp_path: Path, write_site: Callable[..., None]
) -> None:
    """The worker of one site is killed in the second round; the run ends as if it had not been, and every answer is on record."""
    policies = {}
    for seed, site in enumerate(("hill", "south")):
        write_site(tmp_path / "data" / site, seed=seed)
        root = str(tmp_path / "data" / site)
        policies[site] = {"data": {"root": root}, "cache_root": str(tmp_path / "cache"), "groups": {"min_group": 2}, "threads": 1}
    killed: list[int] = []
    with local_consortium(tmp_path / "consortium", policies, start_s=300) as consortium:

        def on_line(line: str) -> None:
            if line.startswith("pretrain  round 1/"):
                worker = json.loads((consortium.sites["hill"].state / "status.json").read_text())["pid"]
                os.kill(worker, signal.SIGKILL)
                killed.append(worker)

        outcome = consortium.run(f"{RUN} output={tmp_path}", log_path=tmp_path / "log", deadline_s=600, on_line=on_line)
        assert outcome.ok, (outcome, (tmp_path / "log").read_text()[-3000:])
        assert len(killed) == 1
        assert json.loads((consortium.sites["hill"].state / "status.json").read_text())["pid"] != killed[0]
        for site in consortium.sites.values():
            told = [(entry["message"], entry["round"]) for entry in AuditLog(site.state / "audit.jsonl").read()]
            assert told == [("query.describe", None), *(("train.pretrain", number) for number in (1, 2, 3))]
    rounds = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [(line["round"], sorted(line["sites"]), line.get("failures")) for line in rounds] == [
        (number, ["hill", "south"], None) for number in (1, 2, 3)
    ]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert [pid for folder in consortium.folders for pid in processes(folder)] == []
