"""What crosses the wire: states, moments, embeddings and scores, to and from Flower's records.

A state travels packed, one array per dtype with names and shapes beside it: Flower moves every array as an object of its own,
which makes a tensor each 5-6 times slower. No pickle: arrays are .npy bytes, everything else text or numbers.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from core.erasure import Eraser, ScannerSums
from core.evaluation.embeddings import Embeddings
from core.evaluation.predictions import Predictions
from core.moments import GroupMoments, Reference
from core.targets import Target

State = dict[str, Tensor]
Groups = TypeVar("Groups", GroupMoments, ScannerSums)
Message = TypeVar("Message")

PER_SCAN = ("embeddings", "predictions")
"""Records with a row a scan, which leave a site only where it shares them."""
PRIVACY = "privacy-"
"""What DP-SGD guarantees at a site has this before its names."""
MAX_SUBJECTS = 10_000_000
MAX_TEXTS, MAX_TEXT_LENGTH = 1000, 500


class ExchangeError(ValueError):
    """Something received is not what was agreed; the text names no scan and may leave the site."""


class SiteError(Exception):
    """A failure at a site, in words that may leave it: no subject, no path, no value of a scan.

    Args:
        kind: a fixed word the server decides by, e.g. ``not_finite``.
        text: one sentence.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"[isocenter:{kind}] {text}")


def error_kind(reason: str) -> tuple[str, str]:
    """Kind and sentence of a failure a site reported; ``unknown`` when the text is not one of ours."""
    found = re.search(r"\[isocenter:(\w+)\] (.*)", reason, re.DOTALL)
    return (found[1], found[2].strip()) if found else ("unknown", reason.strip() or "no reason given")


def _numpy(value: Tensor) -> np.ndarray:
    plain = value.detach().cpu().contiguous()
    return plain.view(torch.int16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()


def pack(state: Mapping[str, Tensor]) -> tuple[ArrayRecord, str]:
    """One flat array per dtype, and the layout as JSON: [[name, dtype, shape], ...] in the order of the state.

    Bit-exact for every dtype; integer buffers stay integers.
    """
    layout: list[tuple[str, str, list[int]]] = []
    flat: dict[str, list[np.ndarray]] = {}
    for name, value in state.items():
        dtype = str(value.dtype).removeprefix("torch.")
        layout.append((name, dtype, list(value.shape)))
        flat.setdefault(dtype, []).append(_numpy(value).reshape(-1))
    return ArrayRecord({dtype: Array(np.concatenate(parts)) for dtype, parts in flat.items()}), json.dumps(layout)


def unpack(arrays: ArrayRecord, layout: str) -> State:
    """The state that was packed.

    Raises:
        ExchangeError: arrays and layout disagree in dtype or length, or a float is not finite.
    """
    flat = {dtype: array.numpy() for dtype, array in arrays.items()}
    used = dict.fromkeys(flat, 0)
    state: State = {}
    for name, dtype, shape in json.loads(layout):
        torch_dtype = getattr(torch, dtype)
        size = int(np.prod(shape, dtype=np.int64))
        if dtype not in flat or flat[dtype].ndim != 1 or used[dtype] + size > flat[dtype].size:
            raise ExchangeError(f"exchange: the {dtype} array must hold every value of {name}, it is missing or too short.")
        stored = torch.from_numpy(flat[dtype][used[dtype] : used[dtype] + size].copy())
        if torch_dtype == torch.bfloat16:
            stored = stored.view(torch.bfloat16)
        if stored.dtype != torch_dtype:
            raise ExchangeError(f"exchange: {name} must be {dtype}, got {stored.dtype}.")
        used[dtype] += size
        state[name] = stored.reshape(shape)
    if any(used[dtype] != array.size for dtype, array in flat.items()):
        raise ExchangeError("exchange: the arrays must hold nothing but the state, got values left over.")
    check_finite(state)
    return state


def unpack_state(received: RecordDict, record: str = "arrays") -> State:
    """The state in a message: its arrays with the ``layout`` in its ``config``."""
    return unpack(received.array_records[record], str(received.config_records["config"]["layout"]))


def array_bytes(message: RecordDict) -> dict[str, int]:
    """Bytes of the arrays in a message, by what they are; ``arrays`` are weights."""
    kinds = {name: "weights" if name == "arrays" else name.partition("-")[0] for name in message.array_records}
    sizes: dict[str, int] = {}
    for name, record in message.array_records.items():
        sizes[kinds[name]] = sizes.get(kinds[name], 0) + sum(len(array.data) for array in record.values())
    return sizes


def describe_answer(answer: RecordDict) -> dict[str, object]:
    """What an answer holds, for a site's audit log: arrays by name, shape, dtype and bytes; names of all else; bytes in all.

    A name is that of the record, then that within it: ``arrays/float32``, ``metrics/loss``.
    """
    arrays = [
        {"name": f"{record}/{name}", "shape": list(array.shape), "dtype": array.dtype, "bytes": len(array.data)}
        for record, group in answer.array_records.items()
        for name, array in group.items()
    ]
    values = {
        f"{record}/{name}": value
        for records in (answer.metric_records, answer.config_records)
        for record, group in records.items()
        for name, value in group.items()
    }
    size = sum(len(array.data) for group in answer.array_records.values() for array in group.values())
    return {"arrays": arrays, "statistics": sorted(values), "bytes": size + sum(map(_value_bytes, values.values()))}


def _value_bytes(value: object) -> int:
    """Bytes of a number, a text, or several of them."""
    if isinstance(value, list):
        return sum(map(_value_bytes, value))
    return len(value.encode()) if isinstance(value, str) else len(value) if isinstance(value, bytes) else 8


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinities: one would spoil the average for every site."""
    bad = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ExchangeError(f"exchange: every weight must be finite, got NaN or infinity in {len(bad)}, first {bad[0]!r}.")


def check_like(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Refuse a state whose names, order, shapes or dtypes are not those of this run's model."""
    found = [(name, tuple(value.shape), value.dtype) for name, value in state.items()]
    wanted = [(name, tuple(value.shape), value.dtype) for name, value in expected.items()]
    if found != wanted:
        first = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), (len(found), len(wanted)))
        raise ExchangeError(f"{where}: weights must match the run's model, got {first[0]} where {first[1]} is expected.")


def pack_groups(groups: GroupMoments | ScannerSums) -> ArrayRecord:
    """What a site tells of its groups or scanners, by field name: moments as float32, sums that are solved as float64."""
    dtype = torch.float32 if isinstance(groups, GroupMoments) else torch.float64
    return ArrayRecord({name: Array(_numpy(value.to(dtype))) for name, value in vars(groups).items()})


def unpack_groups(kind: type[Groups], arrays: ArrayRecord, features: int, where: str) -> Groups:
    """What was packed, checked by its own kind and to be about ``features`` features."""
    try:
        groups = kind(**{name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()})
    except (TypeError, ValueError) as error:
        raise ExchangeError(f"{where}: {error}") from None
    if groups.num_features != features:
        raise ExchangeError(f"{where}: groups must have {features} features, got {groups.num_features}.")
    return groups


def pack_reference(reference: Reference) -> ArrayRecord:
    """Mean and scale as float32 arrays."""
    return ArrayRecord({"mean": Array(_numpy(reference.mean_D.float())), "scale": Array(_numpy(reference.scale_D.float()))})


def unpack_reference(arrays: ArrayRecord, features: int, where: str) -> Reference:
    """The reference that was packed, checked."""
    mean_D, scale_D = (torch.from_numpy(arrays[name].numpy().copy()) for name in ("mean", "scale"))
    if tuple(mean_D.shape) != (features,):
        raise ExchangeError(f"{where}: the reference must have {features} features, got {tuple(mean_D.shape)}.")
    return Reference(mean_D, scale_D)


def pack_eraser(eraser: Eraser) -> ArrayRecord:
    """Mean, scale and directions as they are."""
    return ArrayRecord({name: Array(_numpy(value)) for name, value in vars(eraser).items()})


def unpack_eraser(arrays: ArrayRecord, features: int, where: str) -> Eraser:
    """The eraser that was packed, checked to be of ``features`` features and finite."""
    values = {name: torch.from_numpy(arrays[name].numpy().copy()) for name in ("mean_F", "scale_F", "directions_KF")}
    if any(value.shape[-1] != features for value in values.values()):
        raise ExchangeError(f"{where}: the eraser must have {features} features, got another number.")
    check_finite(values)
    return Eraser(**values)


def pack_embeddings(embeddings: Embeddings) -> ArrayRecord:
    """Embeddings and the labels the probes need. Leaves a site only when the site shares per scan."""
    return _pack_columns(vars(embeddings))


def pack_predictions(predictions: Predictions) -> ArrayRecord:
    """Scores and labels, subjects as numbers that mean nothing elsewhere. Leaves a site only when the site shares per scan."""
    columns = {name: value for name, value in vars(predictions).items() if name != "target"}
    _, columns["subject"] = np.unique(columns["subject"], return_inverse=True)
    return _pack_columns(columns)


def _pack_columns(columns: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Arrays by name; text as UTF-8 bytes."""
    return ArrayRecord(
        {
            name: Array(
                np.char.encode(value, "utf-8").view(np.uint8).reshape(len(value), -1) if value.dtype.kind == "U" else value
            )
            for name, value in columns.items()
        }
    )


def pack_message(message: object) -> ArrayRecord:
    """A dataclass of the evaluation from sums: its tensors as float64 by field name, its texts as JSON in UTF-8 bytes."""
    values = vars(message)
    texts = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    tensors = {name: Array(_numpy(value.double())) for name, value in values.items() if isinstance(value, Tensor)}
    return ArrayRecord({**tensors, "texts": Array(np.frombuffer(json.dumps(texts).encode(), np.uint8).copy())})


def unpack_message(kind: type[Message], arrays: ArrayRecord, where: str, **shapes: tuple[int | None, ...]) -> Message:
    """What was packed, checked by its own kind, in shape, to be finite, and to count no more subjects than there can be.

    Args:
        kind: the dataclass.
        arrays: received.
        where: who sent it.
        shapes: what shape some fields must have; None is any length. Shape of a field that is empty where withheld: (0, ...).
    """
    plain = {field.name for field in dataclasses.fields(kind) if field.type is Tensor}  # type: ignore[arg-type]
    values: dict[str, object] = {}
    for name, array in arrays.items():
        if name == "texts":
            continue
        value = array.numpy()
        if name not in plain or value.dtype != np.float64 or not np.isfinite(value).all():
            raise ExchangeError(f"{where}: {kind.__name__} must be finite float64 arrays of its fields, got another {name!r}.")
        if "count" in name and (value.min(initial=0) < 0 or value.max(initial=0) > MAX_SUBJECTS):
            raise ExchangeError(f"{where}: {name} of {kind.__name__} must be counts of at most {MAX_SUBJECTS} subjects.")
        values[name] = torch.from_numpy(value.copy())
    for name, shape in shapes.items():
        found = tuple(values[name].shape) if isinstance(values.get(name), Tensor) else None  # type: ignore[attr-defined]
        if found is None or len(found) != len(shape) or any(w not in (None, f) for f, w in zip(found, shape, strict=True)):
            raise ExchangeError(f"{where}: {name} of {kind.__name__} must have shape {shape}, got {found}.")
    try:
        texts = json.loads(arrays["texts"].numpy().tobytes())
        values |= {name: _plain_texts(value, where) for name, value in texts.items() if name not in plain}
        return kind(**values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ExchangeError(f"{where}: {kind.__name__}: {error}") from None


def _plain_texts(value: object, where: str) -> object:
    """Texts and numbers in tuples, as they came; nothing long, nothing of several lines."""
    if isinstance(value, list) and len(value) <= MAX_TEXTS:
        return tuple(_plain_texts(entry, where) for entry in value)
    if type(value) is int or (isinstance(value, str) and len(value) <= MAX_TEXT_LENGTH and value.isprintable()):
        return value
    raise ExchangeError(f"{where}: texts must be short lines, got something else.")


TEXT_FIELDS = ("site", "scanner", "sex", "diagnosis", "split")


def unpack_embeddings(arrays: ArrayRecord) -> Embeddings:
    """The embeddings that were packed; `Embeddings` checks lengths and numbers."""
    return Embeddings(**_unpack_columns(arrays))


def unpack_predictions(arrays: ArrayRecord, target: Target, where: str) -> Predictions:
    """The predictions that were packed; `Predictions` checks lengths and numbers."""
    try:
        return Predictions(target=target, **_unpack_columns(arrays))
    except (TypeError, ValueError) as error:
        raise ExchangeError(f"{where}: predictions: {error}") from None


def _unpack_columns(arrays: ArrayRecord) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        value = array.numpy()
        if name in TEXT_FIELDS:
            value = np.char.decode(np.ascontiguousarray(value).view(f"S{value.shape[1]}").reshape(-1), "utf-8")
        values[name] = value
    return values


@cache
def fingerprint() -> str:
    """SHA-256 of the code and configs this process runs, so that a site never trains with other code than the server's."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder, suffix in (("core", "py"), ("client", "py"), ("server", "py"), ("configs", "yaml")):
        for path in sorted((root / folder).rglob(f"*.{suffix}")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def content(**records: ArrayRecord | ConfigRecord | MetricRecord) -> RecordDict:
    """A message's content by record name."""
    return RecordDict(dict(records))
