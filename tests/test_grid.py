"""Waiting for sites by a clock that no one waits for: who is asked, how long, and what becomes of every answer."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from server.grid import LONGEST_PAUSE_S, LOOK_S, LOST, UNAVAILABLE, Pace, PatientGrid, Rule
from server.sites import Sites

TIMEOUT_S = 500.0
NAMES = {1: "a", 2: "b", 3: "c"}


@dataclass
class NodeInfo:
    """What Flower tells of a node."""

    node_id: int
    last_activated_at: str


@dataclass
class FakeGrid:
    """Flower's grid by a clock of its own.

    Attributes:
        delays: by node, after how many seconds it answers, one for each question; None: never.
        failing: nodes whose answer is an error.
        offline: nodes that are not connected, and when they come: seconds, or None for never.
        restarts: nodes that are started anew, and when; what they were asked before is lost.
    """

    delays: dict[int, list[float | None]]
    failing: set[int] = field(default_factory=set)
    offline: dict[int, float | None] = field(default_factory=dict)
    restarts: dict[int, float] = field(default_factory=dict)
    now: float = 0.0
    pushed: list[Message] = field(default_factory=list)
    replies: list[tuple[float, Message]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def get_nodes(self) -> Iterable[NodeInfo]:
        never = float("inf")
        since = {node: never if when is None else when for node, when in self.offline.items()}
        connected = [node for node in self.delays if since.get(node, 0.0) <= self.now]
        return [NodeInfo(node, "anew" if self.restarts.get(node, never) <= self.now else "first") for node in connected]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        return [self.push(message) for message in messages]

    def push(self, message: Message) -> str:
        self.pushed.append(message)
        message.metadata.__dict__["_message_id"] = number = f"message {len(self.pushed)}"
        node = message.metadata.dst_node_id
        delay = self.delays[node].pop(0) if self.delays[node] else 0.0
        if delay is not None:
            content: Any = Error(0, "[isocenter:data] no scans.") if node in self.failing else RecordDict()
            self.replies.append((self.now + delay, Message(content, reply_to=message)))
        return number

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        due = [message for when, message in self.replies if when <= self.now and message.metadata.reply_to_message_id in wanted]
        self.replies = [pair for pair in self.replies if pair[1] not in due]
        return due

    def patient(self, **more: Any) -> PatientGrid:
        """Our grid around this one."""
        grid = PatientGrid(self, clock=self.clock, sleep=self.sleep, **more)  # type: ignore[arg-type]
        grid.names.update(NAMES)
        return grid


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    """Flower's messages want to know whose they are."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_id", "_task_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, even after a run has sent the log elsewhere."""
    monkeypatch.setattr(logging.getLogger("isocenter"), "propagate", True)
    caplog.set_level(logging.INFO, logger="isocenter")
    return caplog


def question(nodes: Iterable[int], message_type: str = "train.pretrain") -> list[Message]:
    return [Message(RecordDict(), dst_node_id=node, message_type=message_type) for node in nodes]


def ask(grid: PatientGrid, nodes: Iterable[int], message_type: str = "train.pretrain") -> list[int]:
    """Who answers a question."""
    return sorted(grid.node_of(reply) for reply in grid.send_and_receive(question(nodes, message_type), timeout=TIMEOUT_S))


def test_a_node_that_was_started_anew_is_waited_for_no_longer(said: pytest.LogCaptureFixture) -> None:
    fake = FakeGrid({1: [20.0], 2: [None, 3.0], 3: [30.0]}, restarts={2: 12.0})
    grid = fake.patient()
    assert ask(grid, NAMES) == [1, 3]
    assert grid.unanswered == {2: LOST}
    assert fake.now <= 30 + LOOK_S
    assert "b was started anew and has lost pretrain" in said.text
    assert ask(grid, [2]) == [2]
    assert grid.debts == {}


def test_what_a_node_owes_that_was_started_anew_is_forgotten() -> None:
    fake = FakeGrid({1: [0.0], 2: [None, 3.0]}, restarts={2: 2 * TIMEOUT_S})
    grid = fake.patient()
    assert ask(grid, [1, 2]) == [1]
    assert set(grid.debts) == {2}
    fake.now = 2 * TIMEOUT_S
    assert ask(grid, [1, 2]) == [1, 2]
    assert grid.debts == {}


def test_everybody_answers_and_nobody_is_waited_for_longer() -> None:
    fake = FakeGrid({1: [5.0], 2: [0.0], 3: [20.0]})
    grid = fake.patient()
    assert ask(grid, NAMES) == [1, 2, 3]
    assert 20 <= fake.now <= 20 + LONGEST_PAUSE_S
    assert grid.unanswered == grid.debts == grid.late == {}
    assert grid.quorum_s is None
    assert [grid.answered[node] for node in NAMES] == pytest.approx([5, 0, 20], abs=LONGEST_PAUSE_S)


def test_without_a_quorum_a_silent_node_is_waited_for_until_the_timeout() -> None:
    fake = FakeGrid({1: [], 2: [], 3: [None]})
    grid = fake.patient()
    grid.rule = Rule(deadline_s=10.0)
    assert ask(grid, NAMES) == [1, 2]
    assert TIMEOUT_S <= fake.now <= TIMEOUT_S + LONGEST_PAUSE_S
    assert grid.unanswered[3][0] == "late"
    assert grid.unanswered[3][1].startswith("no answer within 500 s")
    assert list(grid.debts) == [3]


def test_with_a_quorum_the_deadline_ends_the_question() -> None:
    fake = FakeGrid({1: [3.0], 2: [7.0], 3: [None]})
    grid = fake.patient()
    grid.rule = Rule(enough=2, deadline_s=30.0, round_number=4, stage="pretrain")
    assert ask(grid, NAMES) == [1, 2]
    assert 30 <= fake.now <= 31
    assert grid.quorum_s == pytest.approx(7, abs=LONGEST_PAUSE_S)
    debt = grid.debts[3]
    assert (debt.round_number, debt.stage, debt.message_type, debt.asked) == (4, "pretrain", "train.pretrain", 0.0)


def test_the_deadline_waits_for_the_quorum() -> None:
    fake = FakeGrid({1: [3.0], 2: [90.0], 3: [None]})
    grid = fake.patient()
    grid.rule = Rule(enough=2, deadline_s=30.0)
    assert ask(grid, NAMES) == [1, 2]
    assert 90 <= fake.now <= 91


def test_with_a_quorum_and_no_deadline_all_are_waited_for() -> None:
    fake = FakeGrid({1: [3.0], 2: [7.0], 3: [200.0]})
    grid = fake.patient()
    grid.rule = Rule(enough=2)
    assert ask(grid, NAMES) == [1, 2, 3]


def test_an_error_is_no_answer_that_counts() -> None:
    fake = FakeGrid({1: [1.0], 2: [1.0], 3: [None]}, failing={2})
    grid = fake.patient()
    grid.rule = Rule(enough=2, deadline_s=30.0)
    assert ask(grid, NAMES) == [1, 2]
    assert fake.now >= TIMEOUT_S
    assert grid.quorum_s is None


def test_the_missing_are_named_after_a_minute_and_every_minute(said: pytest.LogCaptureFixture) -> None:
    fake = FakeGrid({1: [185.0], 2: [0.0], 3: [100.0]})
    moves: list[float] = []
    grid = fake.patient(on_move=lambda: moves.append(fake.now))
    grid.rule = Rule(round_number=2, stage="pretrain")
    push = fake.push_messages

    def push_and_lose(messages: Iterable[Message]) -> Iterable[str | None]:
        numbers = push(messages)
        fake.offline[3] = None
        return numbers

    fake.push_messages = push_and_lose  # type: ignore[method-assign]
    assert ask(grid, NAMES) == [1, 2, 3]
    texts = said.messages
    assert [text.partition(" s ago")[0].rpartition(" ")[0] for text in texts] == [
        "waiting for a, asked for pretrain round 2",
        "waiting for c, asked for pretrain round 2",
        "waiting for a, asked for pretrain round 2",
        "waiting for a, asked for pretrain round 2",
    ]
    assert [text.rpartition("; ")[2] for text in texts] == ["it is connected", "it is NOT connected", *["it is connected"] * 2]
    seconds = [float(text.partition(" s ago")[0].rpartition(" ")[2]) for text in texts]
    assert seconds == pytest.approx([60, 60, 120, 180], abs=2 * LONGEST_PAUSE_S)
    assert len(moves) >= 185 / 6  # so that others learn that it goes on


def test_a_node_that_owes_is_sent_nothing_and_clears_its_debt_late(said: pytest.LogCaptureFixture) -> None:
    fake = FakeGrid({1: [], 2: [], 3: [45.0]})
    grid = fake.patient()
    grid.rule = Rule(enough=2, deadline_s=10.0, round_number=1, stage="pretrain")
    assert ask(grid, NAMES) == [1, 2]
    assert ask(grid, NAMES) == [1, 2]
    assert sum(message.metadata.dst_node_id == 3 for message in fake.pushed) == 1
    assert [message.metadata.dst_node_id for message in grid.sent] == [1, 2]
    kind, text = grid.unanswered[3]
    assert kind == "busy"
    assert text == f"still works on pretrain round 1, for {grid.owes_s(3):.0f} s; nothing was sent."
    fake.now = 60.0
    grid.collect_late()
    assert grid.debts == {}
    assert grid.owes_s(3) == 0
    debt, message = grid.late[3]
    assert debt.round_number == 1
    assert grid.node_of(message) == 3
    assert "c has answered pretrain round 1, late" in said.messages
    assert ask(grid, NAMES) == [1, 2, 3]


def test_a_late_answer_to_a_query_or_a_late_error_is_not_kept(said: pytest.LogCaptureFixture) -> None:
    """And does not take the place of a late update."""
    fake = FakeGrid({1: [], 2: [20.0, 20.0], 3: [20.0]}, failing={3})
    grid = fake.patient()
    grid.rule = Rule(enough=1, deadline_s=10.0, round_number=1, stage="pretrain")
    ask(grid, NAMES)
    fake.now += 20
    grid.collect_late()
    assert list(grid.late) == [2]
    ask(grid, [1, 2], "query.moments")
    assert list(grid.debts) == [2]
    fake.now += 20
    grid.collect_late()
    assert grid.debts == {}
    assert grid.late[2][0].message_type == "train.pretrain"
    assert "c has failed at pretrain round 1, late" in said.messages
    assert "b has answered pretrain round 1 (moments), late" in said.messages


def test_outside_of_rounds_a_question_waits_for_debts_first(said: pytest.LogCaptureFixture) -> None:
    fake = FakeGrid({1: [], 2: [], 3: [100.0, 1.0]})
    grid = fake.patient()
    grid.rule = Rule(enough=2, deadline_s=10.0, round_number=1, stage="pretrain")
    ask(grid, NAMES)
    grid.rule = Rule()
    assert ask(grid, NAMES, "query.embed") == [1, 2, 3]
    assert 101 <= fake.now <= 103
    assert sum("waiting for c to finish earlier work" in text for text in said.messages) == 2


def test_it_waits_for_debts_up_to_the_timeout_and_then_asks_the_others() -> None:
    fake = FakeGrid({1: [], 2: [], 3: [None]})
    grid = fake.patient()
    grid.rule = Rule(enough=2, deadline_s=10.0)
    ask(grid, NAMES)
    began, grid.rule = fake.now, Rule()
    assert ask(grid, NAMES) == [1, 2]
    assert TIMEOUT_S <= fake.now - began <= TIMEOUT_S + LONGEST_PAUSE_S
    assert grid.unanswered[3][0] == "busy"


def test_a_debt_of_a_node_that_is_not_asked_is_not_waited_for() -> None:
    fake = FakeGrid({1: [], 2: [], 3: [None]})
    grid = fake.patient()
    grid.rule = Rule(enough=2, deadline_s=10.0)
    ask(grid, NAMES)
    began, grid.rule = fake.now, Rule()
    assert ask(grid, [1, 2]) == [1, 2]
    assert fake.now - began <= LONGEST_PAUSE_S


def test_with_a_quorum_debts_are_waited_for_until_enough_can_be_asked() -> None:
    fake = FakeGrid({1: [], 2: [40.0], 3: [60.0]})
    grid = fake.patient()
    grid.rule = Rule(enough=1, deadline_s=10.0)
    assert ask(grid, NAMES) == [1]
    grid.rule = Rule(enough=2, deadline_s=10.0)
    assert ask(grid, NAMES) == [1, 2]
    assert 40 <= fake.now <= 52
    assert grid.unanswered[3][0] == "busy"


def test_a_late_answer_counts_where_the_rule_says_so_and_its_node_is_not_asked() -> None:
    fake = FakeGrid({1: [0.0, 0.0, 5.0], 2: [30.0], 3: [None]})
    grid = fake.patient()
    grid.rule = Rule(enough=1, deadline_s=10.0)
    ask(grid, NAMES)
    # b is done while a works, c never is.
    grid.rule = Rule(enough=1, deadline_s=25.0, late=lambda: grid.late)
    ask(grid, [1])
    fake.now = 40.0
    grid.rule = Rule(enough=2, deadline_s=25.0, late=lambda: grid.late)
    assert ask(grid, NAMES) == [1]
    assert fake.now == pytest.approx(45, abs=2 * LONGEST_PAUSE_S)
    assert grid.quorum_s == pytest.approx(5, abs=2 * LONGEST_PAUSE_S)
    assert [message.metadata.dst_node_id for message in grid.sent] == [1]
    assert 2 not in grid.unanswered


def test_late_answers_alone_can_be_enough() -> None:
    fake = FakeGrid({1: [None], 2: [30.0], 3: [30.0]})
    grid = fake.patient()
    grid.rule = Rule(enough=0, deadline_s=10.0)
    assert ask(grid, NAMES) == []
    grid.rule = Rule(enough=2, deadline_s=10.0, late=lambda: grid.late)
    assert ask(grid, NAMES) == []
    assert sorted(grid.late) == [2, 3]
    assert 30 <= fake.now <= 32
    assert grid.sent == []


def test_a_lost_node_is_told_by_its_site_though_flower_answers_for_it() -> None:
    fake = FakeGrid({1: [], 2: [], 3: [None]})
    grid = fake.patient()
    push = fake.push_messages

    def lose_c(messages: Iterable[Message]) -> Iterable[str | None]:
        numbers = list(push(messages))
        reply = Message(Error(UNAVAILABLE, "Node Unavailable"), reply_to=fake.pushed[-1])
        reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's own, which is a's number here
        fake.replies.append((30.0, reply))
        return numbers

    fake.push_messages = lose_c  # type: ignore[method-assign]
    answers, failures = Sites(grid, TIMEOUT_S).ask(NAMES, "query.describe", lambda _: RecordDict())
    assert list(answers) == ["a", "b"]
    assert failures == {"c": ("away", "was lost while it had the task: its SuperNode ended or its connection was cut.")}
    assert grid.debts == {}


def test_a_node_that_is_not_connected_is_sent_nothing() -> None:
    fake = FakeGrid({1: [], 2: [], 3: []}, offline={2: None})
    grid = fake.patient()
    assert ask(grid, NAMES) == [1, 3]
    assert grid.unanswered == {2: ("away", "is not connected; nothing was sent.")}
    assert [message.metadata.dst_node_id for message in fake.pushed] == [1, 3]
    assert fake.now == 0


def test_nobody_connected_is_no_reason_to_wait() -> None:
    fake = FakeGrid({1: [], 2: []}, offline={1: None, 2: None})
    grid = fake.patient()
    grid.rule = Rule(enough=1, deadline_s=10.0)
    assert ask(grid, [1, 2]) == []
    assert set(grid.unanswered) == {1, 2}
    assert fake.pushed == []


@pytest.mark.parametrize(("enough", "expected", "until"), [(1, {1}, 0), (2, {1, 2}, 90), (3, {1, 2}, 300), (9, {1, 2}, 300)])
def test_enough_nodes_are_waited_for_to_connect(
    enough: int, expected: set[int], until: float, said: pytest.LogCaptureFixture
) -> None:
    fake = FakeGrid({1: [], 2: [], 3: []}, offline={2: 90.0, 3: None})
    assert fake.patient().wait_until_connected(NAMES, enough, 300.0) == expected
    assert until <= fake.now <= until + LONGEST_PAUSE_S
    named = [text for text in said.messages if text.startswith("waiting for ")]
    assert len(named) == {0: 0, 90: 2, 300: 5}[int(until)]
    if named:
        assert named[0] == "waiting for b, c to connect, up to 300 s more"


def test_more_nodes_than_there_are_are_not_waited_for() -> None:
    fake = FakeGrid({1: [], 2: [], 3: []})
    assert fake.patient().wait_until_connected([1], 3, 300.0) == {1}
    assert fake.now == 0


def test_a_pace_is_a_multiple_of_the_median_of_the_last_rounds() -> None:
    pace = Pace(factor=2.0, floor_s=10.0, rounds=3)
    assert pace.deadline_s() is None
    for seconds, deadline in ((1.0, 10.0), (9.0, 10.0), (100.0, 18.0), (100.0, 200.0), (6.0, 200.0), (6.0, 12.0)):
        pace.learn(seconds)
        assert pace.deadline_s() == deadline


def test_a_reply_that_comes_twice_counts_once(said: pytest.LogCaptureFixture) -> None:
    fake = FakeGrid({1: [], 2: [1.0]})
    pull = fake.pull_messages
    fake.pull_messages = lambda ids: [reply for reply in pull(ids) for _ in range(2)]  # type: ignore[method-assign]
    grid = fake.patient()
    assert ask(grid, [1, 2]) == [1, 2]
    assert said.messages == ["an answer came to no question that is open; it is left alone"] * 2


def test_a_reply_to_a_message_nobody_sent_is_left_alone() -> None:
    fake = FakeGrid({1: [], 2: [1.0]})
    pull = fake.pull_messages
    other = question([1])[0]
    other.metadata.__dict__["_message_id"] = "another"
    stray = Message(RecordDict(), reply_to=other)
    fake.pull_messages = lambda ids: [stray, *pull(ids)]  # type: ignore[method-assign]
    assert ask(fake.patient(), [1, 2]) == [1, 2]


@pytest.mark.parametrize(
    "numbers", [lambda all_: [all_[0], None], lambda all_: all_[:1], lambda _: []], ids=["none", "few", "no"]
)
def test_a_message_that_flower_does_not_take_is_told(numbers: Any) -> None:
    fake = FakeGrid({1: [], 2: []})
    push = fake.push_messages
    fake.push_messages = lambda messages: numbers(list(push(messages)))  # type: ignore[method-assign]
    grid = fake.patient()
    answered = ask(grid, [1, 2])
    assert 2 not in answered
    assert grid.unanswered[2] == ("unsent", "the server's SuperLink did not take the message for it.")
    assert set(answered) | set(grid.unanswered) == {1, 2}
    assert [message.metadata.dst_node_id for message in grid.sent] == answered
    assert grid.debts == {}
    assert fake.now <= LONGEST_PAUSE_S


@pytest.mark.parametrize("part", ["get_nodes", "pull_messages"])
def test_a_superlink_that_cannot_be_reached_for_a_moment_is_tried_again(
    part: str, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    fake = FakeGrid({1: [70.0], 2: [80.0]})
    grid = fake.patient()
    assert grid.get_node_ids() == {1, 2}
    original = getattr(fake, part)

    def sometimes(*arguments: Any) -> Any:
        if 20 < fake.now < 75:
            raise httpx.ConnectError("refused")
        return original(*arguments)

    monkeypatch.setattr(fake, part, sometimes)
    assert ask(grid, [1, 2]) == [1, 2]
    assert sum("the SuperLink cannot be reached (ConnectError), trying again" in text for text in said.messages) == 1


def test_a_superlink_that_refuses_ends_the_question() -> None:
    fake = FakeGrid({1: [None]})

    def refuse(_: object) -> Iterable[Message]:
        raise PermissionError("the run is over")

    fake.pull_messages = refuse  # type: ignore[method-assign]
    with pytest.raises(PermissionError, match="the run is over"):
        ask(fake.patient(), [1])


DELAYS = st.one_of(st.none(), st.floats(0, 700))


@given(
    delays=st.lists(st.lists(DELAYS, min_size=3, max_size=3), min_size=1, max_size=5),
    failing=st.sets(st.integers(1, 5)),
    offline=st.dictionaries(st.integers(1, 5), st.one_of(st.none(), st.floats(0, 400))),
    enough=st.one_of(st.none(), st.integers(0, 5)),
    deadline=st.one_of(st.none(), st.floats(1, 600)),
)
def test_every_node_has_answered_or_not_and_the_wait_ends(
    delays: list[list[float | None]],
    failing: set[int],
    offline: dict[int, float | None],
    enough: int | None,
    deadline: float | None,
) -> None:
    fake = FakeGrid(dict(enumerate(delays, 1)), failing, offline)
    grid, nodes = fake.patient(), set(fake.delays)
    grid.rule = Rule(enough, deadline)
    for _ in range(3):
        began, owed = fake.now, dict(grid.debts)
        answered = ask(grid, nodes)
        assert set(answered) == set(grid.answered)
        assert len(answered) == len(set(answered))
        assert set(answered) | set(grid.unanswered) == nodes
        assert not set(answered) & set(grid.unanswered)
        # Time for debts and time for answers, each with its last pause.
        assert fake.now - began <= (2 if owed else 1) * (TIMEOUT_S + LONGEST_PAUSE_S)
        kinds = {node: kind for node, (kind, _) in grid.unanswered.items()}
        # What is owed from before may come while others are waited for.
        assert {node for node in kinds if kinds[node] == "late"} <= set(grid.debts)
        assert {kinds[node] for node in grid.debts} <= {"late", "busy"}
        assert grid.waiting == {}
        if grid.quorum_s is not None:
            assert enough is not None
            assert sum(node not in failing for node in answered) >= enough
