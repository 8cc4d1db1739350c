"""Asking sites and waiting for them, with patience that ends: Flower's grid behind our rules.

Flower sends, waits for everyone until one fixed time, forgets who did not answer and sends them more. Here who is missing is
named every minute; a site that still owes an answer, or is not connected, is sent nothing; what comes too late is kept for who
wants it; and with a quorum a round ends at a deadline.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import pull_objects

log = logging.getLogger("isocenter")

NOTICE_S = 60.0
LOOK_S = 5.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
UNREACHABLE = httpx.TransportError  # what Flower raises where its SuperLink does not answer
UNAVAILABLE = 5  # Flower's code of an answer that a lost node will not give
LOST = ("away", "was lost while it had the task: its SuperNode ended or its connection was cut.")
Found = TypeVar("Found")


AGAIN_S = 0.05


def ask_again_soon() -> None:
    """Let Flower's grid ask for the rest of an answer that is still on its way after a moment; its own pause is a second."""
    defaults = pull_objects.__kwdefaults__
    assert defaults is not None
    defaults["initial_backoff"] = AGAIN_S


@dataclass(frozen=True)
class Debt:
    """A question that a site has not answered in time.

    Attributes:
        message_id: Flower's.
        message_type: Flower's.
        round_number: of the run's stage; None outside of rounds.
        stage: of the run; "" outside of rounds.
        asked: time of the clock.
        session: when the node had been connected, as Flower tells it; another one has lost the question.
    """

    message_id: str
    message_type: str
    round_number: int | None
    stage: str
    asked: float
    session: str = ""

    @property
    def words(self) -> str:
        """The question for people.

        >>> Debt("", "train.pretrain", 3, "pretrain", 0.0).words, Debt("", "query.describe", None, "", 0.0).words
        ('pretrain round 3', 'describe')
        """
        what = self.message_type.partition(".")[2]
        if self.round_number is None:
            return what
        return f"{self.stage} round {self.round_number}" + ("" if self.message_type.startswith("train.") else f" ({what})")


@dataclass(frozen=True)
class Rule:
    """How long to wait.

    Attributes:
        enough: answers that are enough once the deadline has passed; None: everybody's.
        deadline_s: from the question on; None: no other than the timeout.
        round_number: of the run's stage, for what is told; None outside of rounds.
        stage: of the run.
        late: nodes whose late answer, in `PatientGrid.late`, counts as one of those, so that they are not asked.
    """

    enough: int | None = None
    deadline_s: float | None = None
    round_number: int | None = None
    stage: str = ""
    late: Callable[[], Collection[int]] = tuple


class Pace:
    """A deadline for rounds, learned from those before: a multiple of their median, and never less than a floor.

    >>> pace = Pace(factor=3.0, floor_s=30.0)
    >>> pace.deadline_s() is None
    True
    >>> for seconds in (20.0, 24.0, 400.0): pace.learn(seconds)
    >>> pace.deadline_s()
    72.0
    """

    def __init__(self, factor: float, floor_s: float, rounds: int = 5) -> None:
        self.factor, self.floor_s = factor, floor_s
        self.seconds: deque[float] = deque(maxlen=rounds)

    def learn(self, seconds: float) -> None:
        """Take in how long a round took until its quorum had answered."""
        self.seconds.append(seconds)

    def deadline_s(self) -> float | None:
        """Seconds that a round may take; None before the first."""
        return max(self.floor_s, self.factor * median(self.seconds)) if self.seconds else None


class PatientGrid:
    """Flower's grid with the rules above.

    Attributes:
        rule: how long to wait, until it is set anew.
        debts: by node, what it owes.
        late: by node, answers to training tasks that came after their time: the debt and the message.
        sent: messages of the last question, less those to nodes that were not asked.
        answered: of the last question, by node, after how many seconds it answered, if only with an error.
        seen: nodes that were connected when that was last looked at.
        sessions: by node, when it was connected, as Flower tells it.
        training: whether the last question was a task of training.
        unanswered: of the last question, by node, why there is no answer: kind and sentence.
        quorum_s: seconds until ``rule.enough`` had answered the last question; None where they have not.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        on_move: Callable[[], None] = lambda: None,
    ) -> None:
        self.grid, self.clock, self.sleep, self.on_move = grid, clock, sleep, on_move
        self.rule = Rule()
        self.names: dict[int, str] = {}
        self.debts: dict[int, Debt] = {}
        self.late: dict[int, tuple[Debt, Message]] = {}
        self.unanswered: dict[int, tuple[str, str]] = {}
        self.waiting: dict[int, Debt] = {}
        self.answered: dict[int, float] = {}
        self.quorum_s: float | None = None
        self.sent: list[Message] = []
        self.training = False
        self._node_of: dict[str, int] = {}
        self.seen: set[int] = set()
        self.sessions: dict[int, str] = {}
        self._unreachable = -NOTICE_S

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The answers that came in time, one a node; why there is none from a node is in ``unanswered``.

        Where earlier debts leave fewer than are needed to be asked, they are waited for first. Both waits end with the timeout.
        """
        messages = list(messages)
        began = self.clock()
        self.unanswered, self.answered, self.quorum_s = {}, {}, None
        self._wait_for_debts({message.metadata.dst_node_id for message in messages}, began, timeout)
        self.collect_late()
        connected, excused = self.connected(), set(self.rule.late())
        self.training = any(message.metadata.message_type.startswith("train.") for message in messages)
        asked: list[Message] = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in excused:
                continue
            if debt := self.debts.get(node):
                self.unanswered[node] = (
                    "busy",
                    f"still works on {debt.words}, for {self.owes_s(node):.0f} s; nothing was sent.",
                )
            elif node not in connected:
                self.unanswered[node] = ("away", "is not connected; nothing was sent.")
            else:
                asked.append(message)
        self._push(asked)
        replies = self._wait(self.clock(), timeout)
        for node, debt in self.waiting.items():
            self.debts[node] = debt
            self.unanswered[node] = ("late", f"no answer within {self.clock() - debt.asked:.0f} s.")
        self.waiting = {}
        self.on_move()
        return replies

    def _push(self, messages: Iterable[Message]) -> None:
        """Send, and note for whom to wait: Flower has no number for a message that it did not take."""
        messages, self.waiting, self.sent = list(messages), {}, []
        numbers: list[str | None] = list(self.grid.push_messages(messages)) if messages else []
        # Of too many at once it takes none and tells no numbers at all.
        numbers += [None] * (len(messages) - len(numbers))
        for message, message_id in zip(messages, numbers, strict=True):
            about = message.metadata
            if not message_id:
                self.unanswered[about.dst_node_id] = ("unsent", "the server's SuperLink did not take the message for it.")
                continue
            session = self.sessions.get(about.dst_node_id, "")
            debt = Debt(message_id, about.message_type, self.rule.round_number, self.rule.stage, self.clock(), session)
            self.waiting[about.dst_node_id] = debt
            self._node_of[message_id] = about.dst_node_id
            self.sent.append(message)

    def _too_few(self, nodes: Collection[int], busy: Collection[int]) -> bool:
        """Whether the nodes that may be asked now are not enough."""
        if self.rule.enough is None:
            return True
        free = self.connected().intersection(nodes).difference(busy)
        return len(free.union(self.rule.late())) < self.rule.enough

    def _wait_for_debts(self, nodes: Collection[int], began: float, timeout: float | None) -> None:
        """Let who is still busy finish first, where their answers are needed."""
        noticed = began - NOTICE_S
        while (busy := [node for node in self.debts if node in nodes]) and self._too_few(nodes, busy):
            self.collect()
            now = self.clock()
            if timeout is not None and now - began >= timeout:
                return
            if now - noticed >= NOTICE_S:
                noticed = now
                log.info("waiting for %s to finish earlier work", ", ".join(sorted(map(self.name, busy))))
                self.on_move()
            self.sleep(LONGEST_PAUSE_S)

    def _wait(self, began: float, timeout: float | None) -> list[Message]:
        """Answers until all have come, or the rule or the timeout ends it."""
        replies: list[Message] = []
        good, pause, noticed, looked = 0, SHORTEST_PAUSE_S, began, began
        while self.waiting:
            for message in self.collect():
                replies.append(message)
                good += not message.has_error()
                pause = SHORTEST_PAUSE_S
            now = self.clock()
            if self.rule.enough is not None and good + len(self.rule.late()) >= self.rule.enough:
                self.quorum_s = self.quorum_s if self.quorum_s is not None else now - began
            over = self.rule.deadline_s is not None and now - began >= self.rule.deadline_s
            if not self.waiting or (over and self.quorum_s is not None) or (timeout is not None and now - began >= timeout):
                break
            if now - looked >= LOOK_S:
                looked = now
                self.connected()
                self.on_move()
            if now - noticed >= NOTICE_S:
                noticed = now
                self.name_missing(now)
            self.sleep(pause)
            pause = min(LONGEST_PAUSE_S, 1.2 * pause)
        return replies

    def collect(self) -> list[Message]:
        """Answers to the question that is open; to earlier ones, those to training tasks go to ``late``, no one wants the others.

        What answers no question, or one that was answered before, is left alone.
        """
        by_id = {debt.message_id: node for node, debt in (*self.waiting.items(), *self.debts.items())}
        replies = []
        nothing: list[Message] = []
        for message in self._reach(lambda: list(self.grid.pull_messages(list(by_id))), nothing) if by_id else nothing:
            node = by_id.pop(message.metadata.reply_to_message_id, None)
            if node is None:
                log.warning("an answer came to no question that is open; it is left alone")
                continue
            if node in self.waiting and self.waiting[node].message_id == message.metadata.reply_to_message_id:
                debt = self.waiting.pop(node)
                self.answered[node] = self.clock() - debt.asked
                replies.append(message)
                self.on_move()
                continue
            debt = self.debts.pop(node)
            if not message.has_error() and debt.message_type.startswith("train."):
                self.late[node] = (debt, message)
            log.info("%s has %s %s, late", self.name(node), "failed at" if message.has_error() else "answered", debt.words)
        return replies

    def collect_late(self) -> None:
        """Take in what came since the last question."""
        if self.debts:
            self.collect()

    def node_of(self, reply: Message) -> int:
        """The node that was asked; an answer in place of a lost node's has Flower itself for its source."""
        return self._node_of.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)

    def name(self, node: int) -> str:
        """The site's name, or the node's number where it has not told one."""
        return self.names.get(node, f"node {node}")

    def owes_s(self, node: int) -> float:
        """For how many seconds a node has owed an answer; 0 where it owes none."""
        return self.clock() - self.debts[node].asked if node in self.debts else 0.0

    def name_missing(self, now: float) -> None:
        """Log who has not answered yet, for how long, and whether it is connected."""
        connected = self.connected()
        for node, debt in sorted(self.waiting.items(), key=lambda item: self.name(item[0])):
            state = "it is connected" if node in connected else "it is NOT connected"
            log.info("waiting for %s, asked for %s %.0f s ago; %s", self.name(node), debt.words, now - debt.asked, state)

    def wait_until_connected(self, nodes: Iterable[int], enough: int, limit_s: float) -> set[int]:
        """Wait for enough of the nodes to be connected, naming the missing every minute; those that are connected in the end.

        More than all of them are not waited for.
        """
        wanted, began = set(nodes), self.clock()
        enough, noticed = min(enough, len(wanted)), began - NOTICE_S
        while True:
            missing = wanted - self.connected()
            now = self.clock()
            if len(wanted) - len(missing) >= enough or now - began >= limit_s:
                return wanted - missing
            if now - noticed >= NOTICE_S:
                noticed = now
                names = ", ".join(sorted(map(self.name, missing)))
                log.warning("waiting for %s to connect, up to %.0f s more", names, limit_s - (now - began))
                self.on_move()
            self.sleep(LONGEST_PAUSE_S)

    def registered(self) -> dict[int, str]:
        """Names that the keys of the connected nodes were registered for; "" where they were not, as in a simulation."""
        return {node.node_id: node.name for node in self.grid.get_nodes()}

    def get_node_ids(self) -> Iterable[int]:
        """Numbers of the connected nodes."""
        return self.connected()

    def connected(self) -> set[int]:
        """The connected nodes; those of the last time while the SuperLink cannot be reached."""
        nodes = self._reach(lambda: {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}, None)
        if nodes is not None:
            self.seen = set(nodes)
            self.sessions |= nodes
            self._forget_lost()
        return set(self.seen)

    def _forget_lost(self) -> None:
        """Wait no longer for nodes that were started anew since they were asked.

        Flower tells of a node that is lost only where it is looked for while it is away; one may be back by then.
        """
        for node, debt in [*self.waiting.items(), *self.debts.items()]:
            if self.sessions.get(node, debt.session) != debt.session:
                log.info("%s was started anew and has lost %s", self.name(node), debt.words)
                if self.waiting.pop(node, None) is not None:
                    self.unanswered[node] = LOST
                self.debts.pop(node, None)

    def _reach(self, look: Callable[[], Found], otherwise: Found) -> Found:
        """What the SuperLink tells, or, while it cannot be reached, something else: whoever waits looks again."""
        try:
            found = look()
        except UNREACHABLE as error:
            if self.clock() - self._unreachable >= NOTICE_S:
                self._unreachable = self.clock()
                log.warning("the SuperLink cannot be reached (%s), trying again", type(error).__name__)
            return otherwise
        return found


def by_name(nodes: Mapping[int, str]) -> list[tuple[int, str]]:
    """Nodes and names in the order of the names."""
    return sorted(nodes.items(), key=lambda item: item[1])
