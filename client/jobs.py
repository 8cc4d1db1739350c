"""A task of a site as plain values: what a thin process takes from Flower and hands to whoever carries it out.

Records cross between processes of one site as a JSON head and the arrays' own bytes behind it: no pickle, no copy of weights as
text.
"""

import json
import socket
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Values = Mapping[str, str | int | float | bool]
PROTOCOL = 1  # of what the worker of one version and the gate of another say to each other
LENGTH = 8  # bytes that tell the length of a head
LONGEST_HEAD = 64 << 20


@dataclass(frozen=True)
class Job:
    """One task.

    Attributes:
        message_type: Flower's, such as ``train.pretrain``.
        received: what the server sent.
        node_config: the site's own, from its SuperNode.
        run_config: the run's.
        run_id: Flower's number of the run.
        memory: what the site keeps for the run; whoever carries the task out changes it in place.
    """

    message_type: str
    received: RecordDict
    node_config: Values
    run_config: Values
    run_id: int
    memory: RecordDict


def _as_text(value: bytes) -> dict[str, str]:
    """Bytes as JSON can hold them; no other value of a record is a dictionary."""
    return {"base64": b64encode(value).decode("ascii")}


def _as_before(value: Any) -> Any:
    """A value of a record, from what JSON holds of it."""
    if isinstance(value, list):
        return [_as_before(element) for element in value]
    return b64decode(value["base64"]) if isinstance(value, dict) else value


def flatten(records: RecordDict) -> tuple[list[Any], list[bytes]]:
    """A description of the records that JSON can hold, and the bytes of their arrays in its order."""
    described: list[Any] = []
    parts: list[bytes] = []
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            arrays = [[key, array.dtype, list(array.shape), array.stype, len(array.data)] for key, array in record.items()]
            parts += [array.data for array in record.values()]
            described.append([name, "arrays", arrays])
        else:
            kind = "metrics" if isinstance(record, MetricRecord) else "config"
            described.append([name, kind, dict(record)])
    return described, parts


def restore(described: Sequence[Any], parts: Sequence[bytes]) -> RecordDict:
    """The records that were flattened."""
    records, following = RecordDict(), iter(parts)
    for name, kind, values in described:
        if kind == "arrays":
            records[name] = ArrayRecord(
                {key: Array(dtype, tuple(shape), stype, next(following)) for key, dtype, shape, stype, _ in values}
            )
        else:
            plain = {key: _as_before(value) for key, value in values.items()}
            records[name] = MetricRecord(plain) if kind == "metrics" else ConfigRecord(plain)
    return records


def encode(about: Mapping[str, Any], **records: RecordDict) -> list[bytes]:
    """The pieces of a message: the length of the head, the head, and the bytes of every array."""
    flat = {name: flatten(value) for name, value in records.items()}
    told = {"about": about, "records": {name: described for name, (described, _) in flat.items()}}
    head = json.dumps(told, default=_as_text).encode()
    return [len(head).to_bytes(LENGTH, "big"), head, *(part for _, parts in flat.values() for part in parts)]


def decode_head(head: bytes) -> tuple[dict[str, Any], dict[str, list[Any]], list[int]]:
    """What a message is about, its records' descriptions, and the lengths of the arrays that follow."""
    told = json.loads(head)
    records = told["records"]
    lengths = [
        array[-1] for described in records.values() for _, kind, arrays in described if kind == "arrays" for array in arrays
    ]
    return told["about"], records, lengths


def decoded(records: Mapping[str, list[Any]], parts: Iterator[bytes]) -> dict[str, RecordDict]:
    """The records of a message by name, from their descriptions and the bytes that followed."""
    result = {}
    for name, described in records.items():
        count = sum(len(arrays) for _, kind, arrays in described if kind == "arrays")
        result[name] = restore(described, [next(parts) for _ in range(count)])
    return result


def send(connection: socket.socket, about: Mapping[str, Any], **records: RecordDict) -> None:
    """Send a message to the process at the other end."""
    for piece in encode(about, **records):
        connection.sendall(piece)


def receive(connection: socket.socket) -> tuple[dict[str, Any], dict[str, RecordDict]] | None:
    """The next message; None where the other end closed or died.

    Raises:
        TimeoutError: nothing came for as long as the socket's timeout.
    """
    if (length := _exactly(connection, LENGTH)) is None:
        return None
    size = int.from_bytes(length, "big")
    if size > LONGEST_HEAD:
        raise ValueError(f"message: its head must be at most {LONGEST_HEAD} bytes, got {size}.")
    if (head := _exactly(connection, size)) is None:
        return None
    about, described, lengths = decode_head(head)
    parts = [_exactly(connection, length) for length in lengths]
    if any(part is None for part in parts):
        return None
    return about, decoded(described, iter([part for part in parts if part is not None]))


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            count = connection.recv_into(view)
        except ConnectionError:
            return None
        if count == 0:
            return None
        view = view[count:]
    return bytes(data)
