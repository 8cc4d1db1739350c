"""The way in and out of a site for one message: its policy before the task, policy and audit log before the answer leaves."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from client.audit import AuditError, AuditLog, Entry, epsilon_added, hash_of
from client.policy import Refusal, SitePolicy
from client.state import state_folder
from core.config import RunConfig
from core.exchange import fingerprint
from core.faults import SiteError

log = logging.getLogger("isocenter")

UNWRITTEN = "this site's audit log cannot be written or was changed, so nothing leaves; see its log."


def now() -> datetime:
    """Local time, with its zone."""
    return datetime.now().astimezone()


@dataclass(frozen=True)
class Door:
    """One message at a site.

    Attributes:
        audit: the site's log, or None.
        message: its type.
        run: the run's number and the hash of its configuration.
        round_number: where it belongs to one.
    """

    audit: AuditLog | None
    message: str
    run: tuple[int, str]
    round_number: int | None

    @classmethod
    def of(
        cls,
        node_config: Mapping[str, object],
        message: str,
        run_id: int,
        run_config: Mapping[str, object],
        round_number: object = None,
    ) -> "Door":
        """The door of the site with this node config."""
        folder = state_folder(node_config)
        return cls(
            audit=None if folder is None else AuditLog(folder / "audit.jsonl"),
            message=message,
            run=(run_id, hash_of(dict(run_config))),
            round_number=round_number if type(round_number) is int else None,
        )

    def enter(self, policy: SitePolicy | None, config: RunConfig) -> None:
        """Refuse what the policy does not let in; a virtual site has none.

        Raises:
            SiteError: it is refused, or the audit log cannot be read.
        """
        if policy is not None:
            _raise(policy.refusal(self.message, config, now(), self._entries(policy), self.run))

    def leave(self, policy: SitePolicy | None, config: RunConfig, answer: Mapping[str, object]) -> None:
        """Refuse what the policy does not let out, and write down what leaves before it does.

        Args:
            policy: the site's; a virtual one has none.
            config: the run's.
            answer: as `core.exchange.describe_answer` tells of it.

        Raises:
            SiteError: it is refused, or the audit log cannot be written.
        """
        if policy is None and self.audit is None:
            return
        size = answer["bytes"]
        assert isinstance(size, int)
        if self.audit is None:
            assert policy is not None
            _raise(policy.refusal_to_send(self.message, size, config, now(), (), self.run))
            return
        try:
            with self.audit.held():
                entries = self.audit.read()
                if policy is not None:
                    _raise(policy.refusal_to_send(self.message, size, config, now(), entries, self.run))
                added = epsilon_added(config, entries, self.run) if self.message == "train.finetune" else None
                self._write(epsilon=added, **answer)
        except AuditError as error:
            raise _unwritten(error) from None

    def note(self, error: SiteError) -> None:
        """Write down the sentence of an error before it leaves.

        Raises:
            SiteError: the audit log cannot be written.
        """
        try:
            self._write(error=str(error))
        except AuditError as fault:
            raise _unwritten(fault) from None

    def _write(self, **fields: object) -> None:
        if self.audit is not None:
            about = {"run": self.run[0], "config": self.run[1], "round": self.round_number, "message": self.message}
            self.audit.append(app=fingerprint(), **about, **fields)

    def _entries(self, policy: SitePolicy) -> Sequence[Entry]:
        """The audit log, where the policy counts by it."""
        if policy.max_megabytes_a_day is None and policy.privacy.max_epsilon is None:
            return ()
        if self.audit is None:
            raise SiteError("policy", "this site's policy counts by an audit log and it keeps none: it must be told state-root.")
        try:
            return self.audit.read()
        except AuditError as error:
            raise _unwritten(error) from None


def _raise(refusal: Refusal | None) -> None:
    """Refuse, if there is a reason."""
    if refusal is not None:
        raise SiteError(refusal.kind, refusal.sentence)


def _unwritten(error: AuditError) -> SiteError:
    """The sentence that leaves; the site's log has the reason."""
    log.error("%s", error)
    return SiteError("audit", UNWRITTEN)
