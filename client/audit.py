"""What left a site, in a file that shows it when it was changed: every entry holds the hash of the one before.

One entry a line, canonical JSON, appended and flushed to the disk before an answer leaves. What the chain cannot show is that its
end was cut off, for a shorter chain is whole too: ``audit.head`` beside it holds the number and hash of the last entry. Who can
write both files can cut the end off both, or write both anew. Only a copy of the head kept
elsewhere, such as on paper, shows that.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from core.settings import DpSgd

if TYPE_CHECKING:
    from core.config import RunConfig

Entry = Mapping[str, Any]
NO_HASH = "0" * 64
"""What the first entry has as the hash before it."""
FIELDS: Mapping[str, Any] = {
    "run": None,
    "round": None,
    "message": "",
    "app": None,
    "config": None,
    "arrays": [],
    "statistics": [],
    "bytes": 0,
    "epsilon": None,
    "error": None,
}
"""What an entry tells beside its place in the chain, and what that is where it is not told."""
REPAIR = "audit.repair"
"""The message of an entry that tells of a torn last line, which was taken out."""
LOCK_S = 60.0


class AuditError(RuntimeError):
    """The log cannot be relied on or not be written; for the site's IT, with the line where there is one."""


@dataclass(frozen=True)
class Chain:
    """What a log holds.

    Attributes:
        entries: those before the first problem.
        torn: bytes of a last line that a power cut has left unfinished; empty if there is none.
        problem: what was changed and at which line; empty for a log that is whole.
        behind: the head was not yet written for the last entry, as after a power cut between the two.
    """

    entries: tuple[Entry, ...]
    torn: bytes = b""
    problem: str = ""
    behind: bool = False


def canonical(value: object) -> str:
    """JSON that is the same for the same content.

    >>> canonical({"b": 1, "a": [None, "é"]})
    '{"a":[null,"é"],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_of(value: object) -> str:
    """SHA-256 of the canonical JSON of a value; of an entry without its own hash."""
    if isinstance(value, Mapping):
        value = {key: part for key, part in value.items() if key != "hash"}
    return hashlib.sha256(canonical(value).encode()).hexdigest()


class AuditLog:
    """The log of a site, ``audit.jsonl``, with ``audit.head`` and ``audit.lock`` beside it.

    Args:
        path: of the log; it and its folder are made, for their owner alone, when the first entry is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head_path = path.with_suffix(".head")
        self._lock = FileLock(path.with_suffix(".lock"), timeout=LOCK_S, mode=0o600)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out, so that what is read still holds when it is added to."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock.acquire()
        except OSError as error:  # filelock's Timeout is one
            raise AuditError(f"{self.path}: the log must be open to this process, got {error}.") from None
        try:
            yield
        finally:
            self._lock.release()

    def examine(self) -> Chain:
        """What the log holds and whether it is whole; reads only.

        Raises:
            AuditError: a file cannot be read.
        """
        try:
            content, head, again = b"", None, self._read_head()
            # Another process may write meanwhile: the head is the same before and behind what belongs to it.
            for attempt in range(10):
                if attempt and head == again:
                    break
                head, content, again = again, self.path.read_bytes() if self.path.exists() else b"", self._read_head()
        except (OSError, UnicodeDecodeError) as error:
            raise AuditError(f"{self.path}: the log and its head must be readable, got {error}.") from None
        *lines, torn = content.split(b"\n")
        entries: list[Entry] = []
        for number, line in enumerate(lines, start=1):
            previous = entries[-1]["hash"] if entries else NO_HASH
            problem = _problem(line, number, previous)
            if problem:
                return Chain(tuple(entries), problem=f"line {number}: {problem}")
            entries.append(json.loads(line))
        return _against_head(tuple(entries), torn, head)

    def _read_head(self) -> str | None:
        return self.head_path.read_text() if self.head_path.exists() else None

    def read(self) -> tuple[Entry, ...]:
        """The entries of a log that is whole, but for a torn last line.

        Raises:
            AuditError: the log was changed, or cannot be read.
        """
        return self._whole().entries

    def _whole(self) -> Chain:
        chain = self.examine()
        if chain.problem:
            raise AuditError(f"{self.path}: the log must be as it was written, got a change at {chain.problem}")
        return chain

    def append(self, **fields: Any) -> Entry:
        """Add an entry and flush it to the disk; a torn last line is taken out before and told in an entry of its own.

        Args:
            fields: of `FIELDS`.

        Raises:
            AuditError: the log was changed, or cannot be written.
        """
        if unknown := set(fields) - set(FIELDS):
            raise TypeError(f"audit: fields must be of {sorted(FIELDS)}, got {sorted(unknown)}.")
        with self.held():
            chain = self._whole()
            entries, torn = chain.entries, chain.torn
            try:
                if chain.behind:
                    self._write_head(entries[-1])
                if torn:
                    what = f"a last line of {len(torn)} bytes (sha256 {hashlib.sha256(torn).hexdigest()}) was torn and taken out"
                    entries = (*entries, self._write(entries, {"message": REPAIR, "error": what}, torn))
                return self._write(entries, fields)
            except OSError as error:
                raise AuditError(f"{self.path}: the log must be writable, got {error.strerror or error}.") from None

    def _write(self, entries: Sequence[Entry], fields: Mapping[str, Any], torn: bytes = b"") -> Entry:
        """Write one entry behind the others, then the head."""
        entry: dict[str, Any] = {
            **FIELDS,
            **fields,
            "n": len(entries) + 1,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "previous": entries[-1]["hash"] if entries else NO_HASH,
        }
        entry["hash"] = hash_of(entry)
        new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            end = os.fstat(descriptor).st_size - len(torn)
            _write_at(descriptor, end, (canonical(entry) + "\n").encode())
        finally:
            os.close(descriptor)
        if new:
            _sync_folder(self.path.parent)
        self._write_head(entry)
        return entry

    def _write_head(self, entry: Entry) -> None:
        """Replace the head as a whole."""
        new = self.head_path.with_suffix(".head.new")
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            _write_at(descriptor, 0, (canonical({"n": entry["n"], "hash": entry["hash"]}) + "\n").encode())
        finally:
            os.close(descriptor)
        new.replace(self.head_path)
        _sync_folder(self.path.parent)


def _write_at(descriptor: int, end: int, data: bytes) -> None:
    """Write all of the data at a file's end and flush it; the file is as it was if that fails."""
    before = os.pread(descriptor, max(0, os.fstat(descriptor).st_size - end), end)
    try:
        os.ftruncate(descriptor, end)
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], end + written)
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
            os.pwrite(descriptor, before, end)
        raise


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _problem(line: bytes, number: int, previous: str) -> str:
    """What is wrong with a whole line, or nothing."""
    try:
        entry = json.loads(line)
        same = line.decode() == canonical(entry)
    except (ValueError, RecursionError):
        return "it must be JSON, it was changed."
    if not (isinstance(entry, dict) and same and set(entry) == {*FIELDS, "n", "time", "previous", "hash"}):
        return "it must be an entry as it was written, it was changed."
    if entry["hash"] != hash_of(entry):
        return "its hash must be that of its content, it was edited."
    if entry["n"] != number or entry["previous"] != previous:
        return f"it must follow the entry before, got entry {entry['n']}: lines were removed, added or moved."
    return ""


def _against_head(entries: tuple[Entry, ...], torn: bytes, head: str | None) -> Chain:
    """The entries of a whole chain, held against the head."""
    last, behind = len(entries), False
    if head is None:
        # A power cut comes between the first entry and its head at the earliest.
        if last > 1:
            return Chain(entries, problem=f"line {last}: audit.head must be beside the log, there is none: it was removed.")
        return Chain(entries, torn, behind=last == 1)
    try:
        told = json.loads(head)
        count, hash_ = int(told["n"]), str(told["hash"])
    except (ValueError, KeyError, TypeError):
        return Chain(entries, problem=f"line {last}: audit.head must hold the last entry's number and hash, it was changed.")
    if count > last:
        return Chain(entries, problem=f"line {last + 1}: {count} entries were written, {last} are left: the end was cut off.")
    behind = count == last - 1
    if count not in (last, last - 1) or hash_ != (entries[count - 1]["hash"] if count else NO_HASH):
        return Chain(entries, problem=f"line {last}: audit.head must belong to the last entry, it is of another.")
    return Chain(entries, torn, behind=behind)


def bytes_since(entries: Sequence[Entry], since: datetime) -> int:
    """Bytes of the answers that left since then."""
    return sum(entry["bytes"] for entry in entries if datetime.fromisoformat(entry["time"]) >= since)


def epsilon_spent(entries: Sequence[Entry]) -> float:
    """What all fine-tuning so far has spent, by basic composition: the sum over runs."""
    return float(sum(entry["epsilon"] or 0.0 for entry in entries))


def epsilon_added(config: "RunConfig", entries: Sequence[Entry], run: tuple[int, str]) -> float | None:
    """What one more round of fine-tuning in this run adds; None where nothing is guaranteed.

    The noise is made for the run's target, which all rounds of all its stages may spend together. The first of them therefore
    adds the whole target, however many follow. Rounds beyond those it was made for, as when the coordinator asks for one twice,
    and another configuration begin anew.
    """
    choice = config.privacy
    if not isinstance(choice, DpSgd) or choice.target_epsilon == float("inf"):
        return None
    covered = len(config.finetune.stages) * config.finetune.num_rounds
    before = sum((entry["run"], entry["config"]) == run and entry["epsilon"] is not None for entry in entries)
    return choice.target_epsilon if covered == 0 or before % covered == 0 else 0.0
