"""The connected sites: asking them, what all of them must know before they can answer, and the bytes that crossed."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from flwr.app import ConfigRecord, Error, Message, RecordDict

from core.exchange import ExchangeError, State, array_bytes, check_size, content, fingerprint, pack
from core.faults import error_kind
from server.grid import LOST, UNAVAILABLE, PatientGrid, by_name

log = logging.getLogger("isocenter")

Failures = dict[str, tuple[str, str]]
FORGETFUL = {"constants", "moments"}
"""Kinds of failure of a site that was started anew and has lost what it was told once: it is told and asked again."""
Answer = TypeVar("Answer")


class RunError(RuntimeError):
    """The run cannot go on; the text says which sites and why."""


@dataclass(frozen=True)
class Node:
    """A connected site.

    Attributes:
        node_id: Flower's number for it.
        site: its own name.
        about: the counts it told.
    """

    node_id: int
    site: str
    about: Mapping[str, object]


@dataclass
class Sites:
    """Correspondence with the sites.

    Attributes:
        grid: Flower's, with patience.
        timeout_s: how long an answer may take.
        max_message_mb: a larger answer is a failure.
        traffic: bytes of arrays that crossed, by (what they are, "to sites" or "from sites").
        constants: weights that no one trains. They travel once: a site keeps them for the run.
    """

    grid: PatientGrid
    timeout_s: float
    max_message_mb: float = 2048.0
    traffic: Counter[tuple[str, str]] = field(default_factory=Counter)
    constants: State = field(default_factory=dict)
    _holders: set[int] = field(default_factory=set)

    def ask(
        self, nodes: Mapping[int, str], message_type: str, records: Callable[[int], RecordDict]
    ) -> tuple[dict[str, RecordDict], Failures]:
        """Send one message to each node and wait: answers by site, and failures (kind, sentence) by site, both in site order.

        A site that has lost the run's constants is told them and asked again.
        """
        answers, failures = self._ask(nodes, message_type, records)
        if forgetful := {node: site for node, site in nodes.items() if failures.get(site, ("",))[0] in FORGETFUL}:
            self.forget(forgetful)
            self.tell_constants(forgetful)
            again, failed_again = self._ask(forgetful, message_type, records)
            answers, failures = answers | again, failures | failed_again
            failures = {site: failure for site, failure in failures.items() if site not in answers}
        return dict(sorted(answers.items())), dict(sorted(failures.items()))

    def _ask(
        self, nodes: Mapping[int, str], message_type: str, records: Callable[[int], RecordDict]
    ) -> tuple[dict[str, RecordDict], Failures]:
        self.grid.names.update(nodes)
        messages = [Message(content=records(node), message_type=message_type, dst_node_id=node) for node in nodes]
        return self.sort(nodes, self.post(messages))

    def post(self, messages: Iterable[Message]) -> list[Message]:
        """Send messages, each to its node, and wait for the answers; both are counted."""
        replies = self.grid.send_and_receive(messages, timeout=self.timeout_s)
        self.count(self.grid.sent, "to sites")
        self.count(replies, "from sites")
        return replies

    def sort(self, nodes: Mapping[int, str], replies: Iterable[Message]) -> tuple[dict[str, RecordDict], Failures]:
        """Answers and failures by site name, in the order of the names, whatever order they came in."""
        by_node = {self.grid.node_of(reply): reply for reply in replies}
        answers: dict[str, RecordDict] = {}
        failures: Failures = {}
        for node, site in by_name(nodes):
            reply = by_node.get(node)
            if reply is None:
                failures[site] = self.grid.unanswered.get(node, ("late", "no answer."))
            elif reply.has_error():
                failures[site] = failure_of(reply.error)
            else:
                try:
                    check_size(reply.content, self.max_message_mb, f"site {site}")
                    answers[site] = reply.content
                except ExchangeError as error:
                    failures[site] = ("exchange", str(error))
        return answers, failures

    def gather(
        self,
        nodes: Mapping[int, str],
        query: str,
        task: RecordDict | Callable[[int], RecordDict],
        read: Callable[[RecordDict, str], Answer],
    ) -> tuple[dict[str, Answer], Failures]:
        """Ask every node, the same or each its own, and read the answers, by site; one that cannot be read is a failure."""
        answers, failures = self.ask(nodes, query, task if callable(task) else lambda _: task)
        values: dict[str, Answer] = {}
        for site, answer in answers.items():
            try:
                values[site] = read(answer, f"site {site}")
            except ExchangeError as error:
                failures[site] = ("exchange", str(error))
            except KeyError as error:
                failures[site] = ("exchange", f"site {site}: the answer must hold {error}, it does not.")
        return values, failures

    def set_constants(self, nodes: Mapping[int, str], constants: State) -> None:
        """Replace the run's constants and tell them to these nodes."""
        self.constants = constants
        self._holders.clear()
        self.tell_constants(nodes)

    def tell_constants(self, nodes: Mapping[int, str], quorum: int | None = None) -> None:
        """Tell the run's constants to those of the nodes that do not hold them yet.

        Args:
            nodes: site name by node number.
            quorum: how many must have them afterwards; None: all.

        Raises:
            RunError: too few sites took them.
        """
        missing = {node: site for node, site in nodes.items() if node not in self._holders} if self.constants else {}
        if not missing:
            return
        arrays, layout = pack(self.constants)
        task = content(constants=arrays, config=ConfigRecord({"fingerprint": fingerprint(), "layout": layout}))
        rule = self.grid.rule
        if rule.enough is not None and quorum is not None:
            # Who holds them already has answered.
            self.grid.rule = replace(rule, enough=max(0, quorum - (len(nodes) - len(missing))))
        taken, failures = self._ask(missing, "query.constants", lambda _: task)
        self.grid.rule = rule
        self._holders.update(node for node, site in missing.items() if site in taken)
        if len(nodes) - len(failures) < (len(nodes) if quorum is None else quorum):
            raise RunError(f"constants: every site must take them, {len(failures)} did not.{reasons(failures)}")

    def forget(self, nodes: Iterable[int]) -> None:
        """Note that these nodes have lost the constants."""
        self._holders.difference_update(nodes)

    def count(self, messages: Iterable[Message], direction: str) -> None:
        """Add the arrays of messages to the traffic."""
        for message in messages:
            if message.has_content():
                for name, size in array_bytes(message.content).items():
                    self.traffic[name, direction] += size


def failure_of(error: Error) -> tuple[str, str]:
    """Kind and sentence of an answer that is an error: the site's own, or Flower's about a node that it has lost."""
    if error.code == UNAVAILABLE:
        return LOST
    return error_kind(error.reason or "")


def reasons(failures: Mapping[str, tuple[str, str]]) -> str:
    """The failures as one line a site."""
    return "".join(f"\n  {site}: {text}" for site, (_, text) in failures.items())
