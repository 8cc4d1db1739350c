"""Sites that connect after the start of a run, and sites too small to tell anything."""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file

from simulations.in_process import InProcessGrid

pytestmark = pytest.mark.usefixtures("unpainted")

NodeConfig = dict[str, str | int | bool | float]
RunGrowing = Callable[..., tuple[list[dict[str, dict[str, object]]], Path]]
TINY = (
    "experiment=tiny finetune=none data=folder data.root=null num_rounds=3 debias.erase=none policy.share_per_scan=true name=late"
)


class GrowingGrid(InProcessGrid):
    """Some nodes connect when so many rounds of training have been asked for."""

    rounds = 0
    late: dict[int, int]

    def get_node_ids(self) -> Iterable[int]:
        """The nodes connected by now."""
        return [node for node in self.order if self.late.get(node, 0) <= self.rounds]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As ever; rounds are counted."""
        messages = list(messages)
        self.rounds += any(message.metadata.message_type == "train.pretrain" for message in messages)
        return super().push_messages(messages)


@pytest.fixture
def run_growing(tmp_path: Path) -> RunGrowing:
    """Run the apps with nodes that come late; the rounds as told, and the run's folder."""

    def run(
        nodes: dict[int, NodeConfig], late: dict[int, int], *overrides: str
    ) -> tuple[list[dict[str, dict[str, object]]], Path]:
        from client.app import app as client_app
        from server.app import app as server_app

        run_config = {"overrides": " ".join([TINY, f"output={tmp_path / 'runs'}", *overrides])}
        grid = GrowingGrid(client_app, nodes, run_config)
        grid.late = late
        server_app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config)))
        folder = tmp_path / "runs" / "late"
        return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()], folder

    return run


def hospitals(root: Path, *names: str) -> dict[int, NodeConfig]:
    """A node for each folder, with a policy that lets small groups out."""
    return {
        number: {"site": name, "data-root": str(root / name), "min-group": 2, "share-per-scan": True}
        for number, name in enumerate(names, 1)
    }


def test_a_site_that_connects_late_takes_part_from_the_next_round(
    consortium: Path, run_growing: RunGrowing, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds, folder = run_growing(hospitals(consortium, "a", "b", "c"), {3: 1}, "strategy.min_sites=2")
    assert [sorted(entry["sites"]) for entry in rounds] == [["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]
    assert [sorted(entry["exchange"]["h"]) for entry in rounds] == [["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]
    assert [entry.get("late") for entry in rounds] == [None, {"c": "takes part from now on"}, None]
    assert "round 2: c connected late and takes part from now on" in capsys.readouterr().out
    evaluated = {row["site"] for row in json.loads((folder / "metrics.json").read_text())}
    assert evaluated >= {"a", "b", "c"}
    assert all(value.isfinite().all() for value in load_file(folder / "checkpoints" / "pretrain-0003.safetensors").values())


def test_the_quorum_counts_a_late_site(consortium: Path, run_growing: RunGrowing, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.sites import RunError

    original = GrowingGrid.pull_messages

    def c_fails(self: GrowingGrid, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = original(self, message_ids)
        return [reply for reply in replies if self.rounds < 2 or reply.metadata.src_node_id != 3]

    monkeypatch.setattr(GrowingGrid, "pull_messages", c_fails)
    with pytest.raises(RunError, match=r"(?s)round 2: at least 3 of 3 sites must answer .* 2 did.*c: no answer"):
        run_growing(hospitals(consortium, "a", "b", "c"), {3: 1}, "data.pretrain_sites=null", "strategy.round_timeout_s=1")


@pytest.mark.parametrize(
    ("override", "change", "reason"),
    [
        ("", {"site": "a"}, "a node must have a name of its own"),
        ("data.pretrain_sites=[a,b]", {}, "one that may pretrain, data.pretrain_sites names others"),
        ("", {"data-root": "/nowhere"}, "BIDS|exist|incident"),
        ("", {"site": "few"}, "healthy training subjects must be at least 4 to contrast, got"),
        ("strategy.admit_late=false", {}, None),
    ],
    ids=["name", "not_chosen", "no_data", "too_few", "not_wanted"],
)
def test_a_late_site_that_may_not_take_part_is_named_once_and_left_alone(
    consortium: Path,
    write_site: Callable[..., None],
    run_growing: RunGrowing,
    capsys: pytest.CaptureFixture[str],
    override: str,
    change: NodeConfig,
    reason: str | None,
) -> None:
    nodes = hospitals(consortium, "a", "b", "c")
    nodes[3] |= change
    if change.get("site") == "few":
        write_site(consortium / "few", seed=5, healthy=3)
        nodes[3]["data-root"] = str(consortium / "few")
    rounds, _ = run_growing(nodes, {3: 1}, "strategy.min_sites=2", override)
    assert [sorted(entry["sites"]) for entry in rounds] == [["a", "b"]] * 3
    assert "late" not in rounds[0]
    assert "late" not in rounds[2]
    said = capsys.readouterr().out
    if reason is None:
        assert "late" not in rounds[1]
        assert "connected late" not in said
    else:
        (told,) = rounds[1]["late"].values()
        assert re.search(reason, str(told))
        assert said.count("node 3 connected late and is not taken in") == 1
        assert str(consortium) not in json.dumps(rounds)


def test_a_late_site_with_other_features_is_left_alone(tmp_path: Path) -> None:
    """Tables: a late site gets the constants that the encoder begins with, if it has the features they are about."""
    from client.app import app as client_app
    from server.app import app as server_app

    for name, features in (("a", "fg"), ("b", "fg"), ("c", "fg"), ("d", "fx")):
        rows = [["participant_id", "age", "sex", *features]]
        rows += [[f"{name}{i}", str(20 + 2 * i), "FM"[i % 2], str(i % 7 + 0.5), str(i % 5 + 0.25 * i)] for i in range(20)]
        (tmp_path / f"{name}.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")
    nodes: dict[int, NodeConfig] = {
        number: {"site": name, "data-root": str(tmp_path / f"{name}.csv"), "min-group": 4, "diagonal-subjects": 8}
        for number, name in enumerate("abcd", 1)
    }
    overrides = (
        "experiment=roi debias=fairkl_only num_rounds=3 local_steps=1 batch_size=8 warmup_rounds=0 encoder.width=8 "
        "embedding_size=4 debias.warmup_rounds=0 debias.exchange_every=1 strategy.min_sites=2 data.table=null "
        f"policy.diagonal_subjects=8 name=late output={tmp_path / 'runs'}"
    )
    grid = GrowingGrid(client_app, nodes, {"overrides": overrides})
    grid.late = {3: 1, 4: 1}
    server_app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={"overrides": overrides}))
    rounds = [json.loads(line) for line in (tmp_path / "runs" / "late" / "rounds.jsonl").read_text().splitlines()]
    assert [sorted(entry["sites"]) for entry in rounds] == [["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]
    assert rounds[1]["late"]["c"] == "takes part from now on"
    assert "its inputs must be those of the other sites" in rounds[1]["late"]["node 4"]


def test_a_site_under_the_floor_tells_nothing_and_still_learns(
    consortium: Path, write_site: Callable[..., None], federate: Callable[..., Path]
) -> None:
    """Four healthy training subjects beside three larger sites: nothing of the small one enters what the others receive."""
    write_site(consortium / "small", seed=9, healthy=4, gain=3.0)
    shared = "policy.min_group=5 data.fractions=[1,0,0] debias.erase=none debias.kernel.bandwidths.age_years=40 num_rounds=1"
    told: dict[str, dict[int, list[bytes]]] = {}

    def listen(run: str) -> Callable[[Message, str], Message | None]:
        def keep(reply: Message, message_type: str) -> Message | None:
            if message_type in ("query.sums", "query.moments") and reply.has_content():
                arrays = [array.data for record in reply.content.array_records.values() for array in record.values()]
                told.setdefault(run, {}).setdefault(reply.metadata.src_node_id, []).extend(arrays)
            return reply

        return keep

    folder = federate(consortium, shared, name="four", tamper=listen("four"))
    (first,) = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert first["exchange"]["h"]["small"] == {"groups": 0, "withheld_scans": 4}
    assert all(entry["groups"] >= 1 for site, entry in first["exchange"]["h"].items() if site != "small")
    assert all(math.isfinite(value) for entry in first["sites"].values() for value in entry.values())
    assert first["sites"]["small"]["fairkl"] > 0  # it hears of the others
    without = federate(consortium, shared, "data.unseen_sites=[small]", name="three", tamper=listen("three"))
    (alone,) = [json.loads(line) for line in (without / "rounds.jsonl").read_text().splitlines()]
    for site in "abc":
        assert first["sites"][site] == alone["sites"][site]  # to the last bit
    assert {node: told["four"][node] for node in told["three"]} == told["three"]


def test_both_spaces_are_told_in_the_round(consortium: Path, federate: Callable[..., Path]) -> None:
    folder = federate(consortium, "debias.space=both num_rounds=1", name="both")
    (only,) = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert set(only["exchange"]) == {"h", "z"}
    assert all(entry["groups"] >= 1 for space in only["exchange"].values() for entry in space.values())


def test_age_by_sex_groups_cross_the_wire(consortium: Path, federate: Callable[..., Path]) -> None:
    options = "num_rounds=1 debias.kernel.bandwidths.age_years=40"
    ages, both = (
        json.loads((federate(consortium, options, sex, name=name) / "rounds.jsonl").read_text())
        for name, sex in (("ages", ""), ("both", "debias.kernel.bandwidths.sex=0"))
    )
    assert both["sites"]["a"]["fairkl"] > 0
    assert both["sites"]["a"]["fairkl"] != ages["sites"]["a"]["fairkl"]
    assert both["exchange"]["h"]["a"]["groups"] >= 2


def test_a_late_site_with_patients_and_controls_is_fine_tuned_at(consortium: Path, run_growing: RunGrowing) -> None:
    finetuning = ("finetune=both", "finetune.stages=[linear_probe]", "finetune.num_rounds=1")
    rounds, folder = run_growing(hospitals(consortium, "a", "b", "c"), {3: 1}, "strategy.min_sites=2", *finetuning)
    assert [(entry["stage"], sorted(entry["sites"])) for entry in rounds][3:] == [("linear_probe", ["c"])]
    assert json.loads((folder / "roles.json").read_text())["target"] == ["c"]
