"""Slow, lost and failing sites in whole runs, by a clock that nobody waits for."""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from safetensors.torch import load_file

import server.app
from client.app import app as client_app
from server.app import app as server_app
from server.grid import UNAVAILABLE, PatientGrid
from server.sites import RunError
from server.strategy import EARLIER, SiteRounds
from simulations.in_process import InProcessGrid

pytestmark = pytest.mark.usefixtures("unpainted")

NODES = {"a": 1, "b": 2, "c": 3}
TRAINING_S = 40.0  # so long a site trains where nothing else is said; a deadline then is 120 s
PLAIN = "experiment=tiny data=folder finetune=none evaluation=none debias=none name=slow"
Delays = dict[tuple[str, int], float | None]
Fault = Callable[[str, int, int], str | None]


class SlowGrid(InProcessGrid):
    """Sites answer when it is time by the grid's own clock; its log is who was asked for what, and when.

    Attributes:
        delays: seconds a site trains in a round (site, round), where not `TRAINING_S`; None: for ever.
        fault: the error in place of an answer to a training task: of site, round and how often it was asked.
        away: from when to when a site is not connected.
        lost: (site, round) whose SuperNode ends when it is asked, and is back after so many seconds.
    """

    def __init__(self, root: Path, overrides: str) -> None:
        super().__init__(
            client_app,
            {node: {"site": site, "data-root": str(root / site), "min-group": 2} for site, node in NODES.items()},
            {"overrides": overrides},
        )
        self.now = 0.0
        self.delays: Delays = {}
        self.fault: Fault = lambda *_: None
        self.lost: dict[tuple[str, int], float] = {}
        self.away: dict[int, tuple[float, float]] = {}
        self.asked: list[tuple[str, str, int, float]] = []
        self.messages: list[Message] = []
        self.answers: dict[tuple[str, int], Message] = {}
        self.due: list[tuple[float, Message]] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def get_node_ids(self) -> Iterable[int]:
        """Those connected now."""
        return [node for node in self.order if not self.is_away(node)]

    def is_away(self, node: int) -> bool:
        start, end = self.away.get(node, (0.0, 0.0))
        return start <= self.now < end

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Every site answers at once, and its answer is held back."""
        messages = list(messages)
        numbers = super().push_messages(messages)
        answers = {reply.metadata.reply_to_message_id: reply for reply in self.replies}
        self.replies = []
        for message, number in zip(messages, numbers, strict=True):
            site = {node: site for site, node in NODES.items()}[message.metadata.dst_node_id]
            what, about = message.metadata.message_type, message.content.config_records["config"]
            round_number = int(about["round"]) if "round" in about else 0  # type: ignore[call-overload]
            self.asked.append((site, what, round_number, self.now))
            self.messages.append(message)
            delay: float | None = 0.0
            reply = answers[number]
            if what.startswith("train."):
                delay = self.delays.pop((site, round_number), TRAINING_S)
                times = sum(entry[:3] == (site, what, round_number) for entry in self.asked)
                if text := self.fault(site, round_number, times):
                    reply = Message(Error(2, text), reply_to=message)
                if (back := self.lost.pop((site, round_number), None)) is not None:
                    reply, delay = Message(Error(UNAVAILABLE, "Node Unavailable"), reply_to=message), 1.0
                    reply.metadata.__dict__["_src_node_id"] = 1
                    self.away[NODES[site]] = (self.now + 0.01, self.now + back)
                self.answers[site, round_number] = reply
            if delay is not None:
                self.due.append((self.now + delay, reply))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answers whose time has come."""
        self.replies += [reply for when, reply in self.due if when <= self.now]
        self.due = [pair for pair in self.due if pair[0] > self.now]
        return super().pull_messages(message_ids)

    def rounds_of(self, site: str, what: str = "train.pretrain") -> list[int]:
        """The rounds that a site was asked for, in order."""
        return [round_number for asked, kind, round_number, _ in self.asked if (asked, kind) == (site, what)]

    def told(self, round_number: int) -> np.ndarray:
        """The weights that sites were sent for a round."""
        return next(
            message.content.array_records["arrays"]["float32"].numpy()
            for message in self.messages
            if message.metadata.message_type.startswith("train.")
            and message.content.config_records["config"]["round"] == round_number
        )

    def update(self, site: str, round_number: int) -> tuple[np.ndarray, int]:
        """The weights that a site answered, as they were, and its number of scans."""
        content = self.answers[site, round_number].content
        return content.array_records["arrays"]["float32"].numpy(), int(content.metric_records["metrics"]["num-examples"])  # type: ignore[arg-type]


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def slow(consortium: Path, tmp_path: Path) -> Callable[..., SlowGrid]:
    """A federation of the three sites, to be made slow and then `run`."""

    def build(*overrides: str) -> SlowGrid:
        return SlowGrid(consortium, " ".join([PLAIN, f"data.root={consortium} output={tmp_path / 'runs'}", *overrides]))

    return build


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the real apps over such a federation; the rounds as told."""

    def run_it(grid: SlowGrid) -> list[dict[str, Any]]:
        patient = functools.partial(PatientGrid, clock=grid.clock, sleep=grid.sleep)
        monkeypatch.setattr(server.app, "PatientGrid", patient)
        config = dict(grid.contexts[1].run_config)
        server_app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
        return [json.loads(line) for line in (tmp_path / "runs" / "slow" / "rounds.jsonl").read_text().splitlines()]

    return run_it


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many earlier rounds' weights are kept after each round."""
    kept: list[int] = []
    original = SiteRounds.tell

    def tell(self: SiteRounds, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **more)
        assert set(self.bases) <= {debt.round_number for debt in self.sites.grid.debts.values()}
        kept.append(len(self.bases))

    monkeypatch.setattr(SiteRounds, "tell", tell)
    return kept


def weighted(updates: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
    """The mean by numbers of scans, in float64."""
    whole = sum(count for _, count in updates)
    return np.sum([values.astype(np.float64) * count for values, count in updates], axis=0) / whole


def test_a_slow_site_is_left_behind_and_its_late_update_is_added_to_a_later_round(
    slow: Callable[..., SlowGrid], run: Run, bases: list[int]
) -> None:
    grid = slow("strategy.min_sites=2 num_rounds=5")
    grid.delays = {("c", 2): 190.0}
    rounds = run(grid)
    # Round 2 ends 120 s after its start at 40; c is done at 230, in the midst of round 4, as round 3 takes 40 s.
    assert [sorted(line["sites"]) for line in rounds] == [
        ["a", "b", "c"],
        ["a", "b"],
        ["a", "b"],
        ["a", "b", "c"],
        ["a", "b", "c"],
    ]
    assert grid.rounds_of("c") == [1, 2, 5]
    assert grid.rounds_of("a") == [1, 2, 3, 4, 5]
    begun = {number: when for site, _, number, when in grid.asked if site == "a" and number}
    assert [begun[number + 1] - begun[number] for number in (1, 2, 3, 4)] == pytest.approx([40, 120, 40, 40], abs=3)
    assert [line.get("late_updates") for line in rounds] == [None, None, None, {"c": "pretrain round 2: taken"}, None]
    assert rounds[1]["failures"]["c"].startswith("no answer within 12")
    assert rounds[2]["failures"]["c"].startswith("still works on pretrain round 2, for ")
    assert "failures" not in rounds[3]
    late, count = grid.update("c", 2)
    # The answer was put in place on the way: its update is what it differs by from what c was told in round 2.
    expected = weighted([grid.update("a", 4), grid.update("b", 4), (late, count)])
    np.testing.assert_allclose(grid.told(5), expected, rtol=1e-6, atol=1e-8)
    assert bases == [0, 1, 1, 0, 0]


def test_a_late_update_is_moved_to_the_weights_of_its_round(
    slow: Callable[..., SlowGrid], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formula from what was recorded before the server saw it."""
    grid = slow("strategy.min_sites=2 num_rounds=4")
    grid.delays = {("c", 2): 150.0}
    original, came = SlowGrid.push_messages, dict[tuple[str, int], np.ndarray]()

    def record(self: SlowGrid, messages: Iterable[Message]) -> Iterable[str]:
        numbers = original(self, messages)
        for key, reply in self.answers.items():
            came.setdefault(key, reply.content.array_records["arrays"]["float32"].numpy().copy())
        return numbers

    monkeypatch.setattr(SlowGrid, "push_messages", record)
    rounds = run(grid)
    assert rounds[2]["late_updates"] == {"c": "pretrain round 2: taken"}
    counts = {site: grid.update(site, 2)[1] for site in "abc"}
    moved = grid.told(3).astype(np.float64) + (came["c", 2].astype(np.float64) - grid.told(2).astype(np.float64))
    expected = weighted([(came["a", 3], counts["a"]), (came["b", 3], counts["b"]), (moved, counts["c"])])
    assert np.abs(expected - weighted([(came["a", 3], counts["a"]), (came["b", 3], counts["b"])])).max() > 1e-4
    np.testing.assert_allclose(grid.told(4), expected, rtol=1e-6, atol=1e-7)


def test_late_updates_can_be_dropped(slow: Callable[..., SlowGrid], run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    grid = slow("strategy.min_sites=2 strategy.late_updates=drop num_rounds=4")
    grid.delays = {("c", 2): 150.0}
    rounds = run(grid)
    assert [sorted(line["sites"]) for line in rounds] == [["a", "b", "c"], ["a", "b"], ["a", "b"], ["a", "b", "c"]]
    assert [line.get("late_updates") for line in rounds] == [None, None, {"c": "pretrain round 2: dropped"}, None]
    assert "c had answered late, its answer to pretrain round 2: dropped" in capsys.readouterr().out
    expected = weighted([grid.update("a", 3), grid.update("b", 3)])
    np.testing.assert_allclose(grid.told(4), expected, rtol=1e-6, atol=1e-8)


def test_a_round_of_late_updates_alone(slow: Callable[..., SlowGrid], run: Run, bases: list[int]) -> None:
    grid = slow("strategy.min_sites=1 num_rounds=4")
    grid.delays = {("b", 2): 130.0, ("c", 2): 140.0, ("a", 3): 300.0}
    rounds = run(grid)
    assert [sorted(line["sites"]) for line in rounds] == [["a", "b", "c"], ["a"], ["b", "c"], ["b", "c"]]
    assert rounds[2]["late_updates"] == {"b": "pretrain round 2: taken", "c": "pretrain round 2: taken"}
    assert grid.rounds_of("a") == [1, 2, 3]
    assert bases == [0, 1, 1, 1]


def test_a_run_waits_for_who_is_busy_where_the_others_are_too_few(slow: Callable[..., SlowGrid], run: Run) -> None:
    """In round 3 a fails for good and c still works: with b and c's late update, two have answered."""
    grid = slow("strategy.min_sites=2 num_rounds=3")
    grid.delays = {("c", 2): 900.0}
    grid.fault = lambda site, number, _: "[isocenter:data] no scans." if (site, number) == ("a", 3) else None
    rounds = run(grid)
    assert sorted(rounds[2]["sites"]) == ["b", "c"]
    assert rounds[2]["late_updates"] == {"c": "pretrain round 2: taken"}
    assert rounds[2]["failures"] == {"a": "no scans."}
    assert grid.rounds_of("c") == [1, 2]
    assert 940 <= grid.now <= 945


def test_with_late_updates_dropped_who_is_busy_is_waited_for_and_asked_anew(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("strategy.min_sites=2 strategy.late_updates=drop num_rounds=3")
    grid.delays = {("c", 2): 900.0}
    grid.fault = lambda site, number, _: "[isocenter:data] no scans." if (site, number) == ("a", 3) else None
    rounds = run(grid)
    assert sorted(rounds[2]["sites"]) == ["b", "c"]
    assert rounds[2]["late_updates"] == {"c": "pretrain round 2: dropped"}
    assert grid.rounds_of("c") == [1, 2, 3]


def test_the_evaluation_waits_for_a_slow_site_and_the_report_finishes(
    slow: Callable[..., SlowGrid], run: Run, tmp_path: Path
) -> None:
    grid = slow("strategy.min_sites=2 evaluation=per_scan num_rounds=2")
    grid.delays = {("c", 2): 500.0}
    rounds = run(grid)
    assert sorted(rounds[1]["sites"]) == ["a", "b"]
    embedded = {site: when for site, what, _, when in grid.asked if what == "query.embed"}
    assert set(embedded) == {"a", "b", "c"}
    assert min(embedded.values()) >= 540
    assert "<html" in (tmp_path / "runs" / "slow" / "report.html").read_text()


def test_a_lost_site_is_waited_for_before_the_evaluation(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("strategy.min_sites=2 evaluation=per_scan num_rounds=2")
    grid.lost = {("c", 2): 400.0}
    run(grid)
    assert {site: when for site, what, _, when in grid.asked if what == "query.embed"}["c"] >= 440


def test_a_pretraining_debt_is_waited_for_by_fine_tuning_and_its_answer_dropped(
    slow: Callable[..., SlowGrid], run: Run, bases: list[int]
) -> None:
    grid = slow("strategy.min_sites=2 num_rounds=2", "finetune=both finetune.stages=[linear_probe] finetune.num_rounds=2")
    grid.delays = {("c", 2): 700.0}
    rounds = run(grid)
    assert [(line["stage"], sorted(line["sites"])) for line in rounds] == [
        ("pretrain", ["a", "b", "c"]),
        ("pretrain", ["a", "b"]),
        ("linear_probe", ["c"]),
        ("linear_probe", ["c"]),
    ]
    assert [line.get("late_updates") for line in rounds] == [None, None, {"c": "pretrain round 2: dropped"}, None]
    assert 740 <= next(when for _, what, _, when in grid.asked if what == "train.finetune") <= 745
    assert bases[2:] == [0, 0]


def test_a_late_update_of_other_weights_than_the_round_trains_is_dropped(
    slow: Callable[..., SlowGrid], run: Run, consortium: Path, write_site: Callable[..., None]
) -> None:
    """In rounds 1 and 2 the head alone is trained, in round 3 the encoder too."""
    shutil.rmtree(consortium / "b")
    write_site(consortium / "b", seed=4, healthy=10, patients=10)
    stages = "finetune=both finetune.stages=[frozen_then_unfrozen] finetune.num_rounds=4 finetune.frozen_rounds=2"
    grid = slow("strategy.min_sites=1 num_rounds=1", stages)
    grid.delays = {("c", 2): 150.0}
    rounds = run(grid)[1:]
    assert ["".join(sorted(line["sites"])) for line in rounds] == ["bc", "b", "b", "bc"]
    assert [line.get("late_updates") for line in rounds] == [None, None, {"c": "frozen_then_unfrozen round 2: dropped"}, None]


def test_a_site_that_fails_in_a_row_is_excluded_with_notice(
    slow: Callable[..., SlowGrid], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = slow("strategy.min_sites=2 strategy.exclude_after=2 evaluation=per_scan num_rounds=4")
    grid.fault = lambda site, number, _: "[isocenter:data] no scans." if site == "c" and number > 1 else None
    rounds = run(grid)
    told = "failed in 2 rounds in a row, last in pretrain round 3: no scans."
    assert [line.get("excluded") for line in rounds] == [None, None, {"c": told}, None]
    assert grid.rounds_of("c") == [1, 2, 3]
    assert f"c takes no part any more: it {told}" in capsys.readouterr().out
    assert "c" not in {site for site, what, _, _ in grid.asked if what == "query.embed"}
    folder = tmp_path / "runs" / "slow"
    assert f"c takes no part any more: it {told}" in (folder / "report.html").read_text()
    assert json.loads((folder / "roles.json").read_text()) == {"pretraining": ["a", "b"], "target": [], "unseen": []}
    assert {row["name"]: row["role"] for row in json.loads((folder / "sites.json").read_text())}["c"] == "excluded"


def test_a_site_that_recovers_is_not_excluded(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("strategy.min_sites=2 strategy.exclude_after=2 num_rounds=4")
    grid.fault = lambda site, number, _: "[isocenter:data] no scans." if site == "c" and number in (1, 3) else None
    rounds = run(grid)
    assert all("excluded" not in line for line in rounds)
    assert grid.rounds_of("c") == [1, 2, 3, 4]


def test_a_site_that_works_through_many_rounds_is_not_excluded(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("strategy.min_sites=2 strategy.exclude_after=2 num_rounds=6")
    grid.delays = {("c", 2): 250.0}
    rounds = run(grid)
    assert ["".join(sorted(line["sites"])) for line in rounds] == ["abc", "ab", "ab", "ab", "ab", "abc"]
    assert all("excluded" not in line for line in rounds)


def test_a_site_that_never_answers_again_is_excluded(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("strategy.min_sites=2 strategy.exclude_after=2 strategy.round_timeout_s=200 num_rounds=5")
    grid.delays = {("c", 2): None}
    rounds = run(grid)
    assert [sorted(line.get("excluded", {})) for line in rounds] == [[], [], [], ["c"], []]


def test_a_failure_that_may_pass_is_asked_about_once_more(
    slow: Callable[..., SlowGrid], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = slow("num_rounds=2")
    text = "[isocenter:incident] incident 1234abcd: see the site's local log."
    grid.fault = lambda site, number, times: text if (site, number, times) == ("b", 1, 1) else None
    rounds = run(grid)
    assert [sorted(line["sites"]) for line in rounds] == [["a", "b", "c"]] * 2
    assert grid.rounds_of("b") == [1, 1, 2]
    assert grid.rounds_of("a") == [1, 2]
    assert "round 1: b failed and is asked again: incident 1234abcd" in capsys.readouterr().out


def test_a_failure_that_stays_is_asked_about_twice_and_stops_the_run(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("num_rounds=2")
    grid.fault = lambda site, *_: "[isocenter:incident] incident 1234abcd: see its log." if site == "b" else None
    with pytest.raises(RunError, match=r"(?s)round 1: at least 3 of 3 sites must answer.*2 did.*b: incident 1234abcd"):
        run(grid)
    assert grid.rounds_of("b") == [1, 1]


def test_a_lost_site_is_waited_for_and_asked_again(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("num_rounds=2")
    grid.lost = {("c", 1): 300.0}
    rounds = run(grid)
    assert [sorted(line["sites"]) for line in rounds] == [["a", "b", "c"]] * 2
    assert [
        when for site, what, number, when in grid.asked if (site, what, number) == ("c", "train.pretrain", 1)
    ] == pytest.approx([0, 300], abs=2)
    assert grid.rounds_of("a") == [1, 2]


class RebootingGrid(InProcessGrid):
    """Node 3 is lost when it is first asked to describe itself, and back a while later."""

    looks = 0

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return [node for node in self.order if node != 3 or not 1 < self.looks < 6]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        numbers = super().push_messages(messages)
        if self.num_messages == 3:
            lost = next(message for message in messages if message.metadata.dst_node_id == 3)
            self.replies = [reply for reply in self.replies if reply.metadata.src_node_id != 3]
            self.replies.append(Message(Error(UNAVAILABLE, "Node Unavailable"), reply_to=lost))
        return numbers


def test_a_site_that_is_lost_before_the_first_round_is_waited_for(
    consortium: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server.app.time, "sleep", lambda _: None)
    nodes = {node: {"site": site, "data-root": str(consortium / site), "min-group": 2} for site, node in NODES.items()}
    config = {"overrides": f"{PLAIN} num_rounds=1 data.root={consortium} output={tmp_path / 'runs'}"}
    grid = RebootingGrid(client_app, nodes, config)
    server_app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config)))
    [line] = (tmp_path / "runs" / "slow" / "rounds.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["sites"]) == ["a", "b", "c"]
    assert "waiting for sites that were lost on the way: node 3" in capsys.readouterr().out


def test_a_lost_site_that_stays_away_stops_the_run(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("num_rounds=2 strategy.wait_for_sites_s=100")
    grid.lost = {("c", 1): 1e6}
    with pytest.raises(RunError, match=r"(?s)round 1: at least 3 of 3 sites must answer.*c: is not connected; nothing was sent"):
        run(grid)
    assert 140 <= grid.now <= 142


def test_with_the_quorum_met_a_lost_site_is_not_waited_for(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("strategy.min_sites=2 num_rounds=3")
    grid.lost = {("c", 1): 60.0}
    rounds = run(grid)
    assert [sorted(line["sites"]) for line in rounds] == [["a", "b"], ["a", "b"], ["a", "b", "c"]]
    assert grid.now == pytest.approx(120, abs=4)
    assert rounds[0]["failures"]["c"].startswith("was lost while it had the task")
    assert rounds[1]["failures"]["c"] == "is not connected; nothing was sent."


def test_a_round_begins_when_enough_are_connected(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("strategy.min_sites=2 num_rounds=2 strategy.wait_for_sites_s=100")
    grid.away = {2: (39.0, 90.0), 3: (39.0, 1e6)}
    assert [sorted(line["sites"]) for line in run(grid)] == [["a", "b", "c"], ["a", "b"]]
    assert grid.now == pytest.approx(130, abs=4)


def test_a_round_for_which_too_few_come_back_stops_the_run(slow: Callable[..., SlowGrid], run: Run) -> None:
    grid = slow("strategy.min_sites=2 num_rounds=3 strategy.wait_for_sites_s=100")
    grid.away = {2: (79.0, 1e6), 3: (79.0, 1e6)}
    with pytest.raises(RunError, match=r"round 3: 2 of 3 sites must be connected, missing for 100 s: b, c\. Finished"):
        run(grid)


def test_a_deadline_reaches_the_site_and_ends_its_steps(
    slow: Callable[..., SlowGrid], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is over before the first step ends it after that one."""
    grid = slow("strategy.min_sites=2 num_rounds=2 strategy.deadline_floor_s=1e-9")
    grid.delays = {(site, number): 0.0 for site in "abc" for number in (1, 2)}
    rounds = run(grid)
    assert "ended_early" not in rounds[0]
    assert rounds[1]["ended_early"] == {"a": 1, "b": 1, "c": 1}
    steps = {key: reply.content.metric_records["metrics"]["steps"] for key, reply in grid.answers.items()}
    assert {steps[site, number] for site in "abc" for number in (1,)} == {2}
    assert {steps[site, 2] for site in "abc"} == {1}
    deadlines = [
        message.content.config_records["config"].get("deadline-s")
        for message in grid.messages
        if "train" in message.metadata.message_type
    ]
    assert deadlines == [None] * 3 + [EARLIER * 1e-9] * 3
    assert "round 2: ended early, at the deadline: a 1 of 2 steps, b 1 of 2 steps, c 1 of 2 steps" in capsys.readouterr().out


def test_a_deadline_that_is_kept_changes_nothing(slow: Callable[..., SlowGrid], run: Run, tmp_path: Path) -> None:
    """Bit for bit what a run gives that waits for everybody."""
    checkpoints = []
    for overrides in ("", "strategy.min_sites=2"):
        grid = slow(overrides, "num_rounds=3")
        rounds = run(grid)
        assert all("ended_early" not in line for line in rounds)
        checkpoints.append(load_file(max((tmp_path / "runs" / "slow" / "checkpoints").glob("pretrain-*"))))
        (tmp_path / "runs" / "slow").rename(tmp_path / f"run{len(checkpoints)}")
    told = [message.content.config_records["config"].get("deadline-s") for message in grid.messages[-3:]]
    assert told == pytest.approx([EARLIER * 120] * 3, rel=0.03)
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert all(torch.equal(value, checkpoints[1][name]) for name, value in checkpoints[0].items())
