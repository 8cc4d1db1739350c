"""What crosses the wire: states, moments, embeddings and scores, to and from Flower's records.

A state travels packed, one array per dtype with names and shapes beside it: Flower moves every array as an object of its own,
which makes a tensor each 5-6 times slower. No pickle: arrays are .npy bytes, everything else text or numbers.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from core import npy
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
MAX_COVARIANCE = 2  # of coordinates of unit vectors, over n - 1
MAX_LAYOUT, MAX_NAME_LENGTH, MAX_DIMENSIONS = 1_000_000, 500, 8
DTYPES = {
    "bool": (torch.bool, "|b1"),
    "uint8": (torch.uint8, "|u1"),
    "int8": (torch.int8, "|i1"),
    "int16": (torch.int16, "<i2"),
    "int32": (torch.int32, "<i4"),
    "int64": (torch.int64, "<i8"),
    "float16": (torch.float16, "<f2"),
    "bfloat16": (torch.bfloat16, "<i2"),
    "float32": (torch.float32, "<f4"),
    "float64": (torch.float64, "<f8"),
}
"""What weights may be made of, by the name in a layout: torch's dtype, and what their bytes are called in a .npy header."""


class ExchangeError(ValueError):
    """Something received is not what was agreed; the text names no scan and may leave the site."""


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


class Entry(NamedTuple):
    """A tensor in a layout."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype} {self.shape}"


def entries_of(state: Mapping[str, Tensor]) -> list[Entry]:
    """The layout that a state is packed with."""
    return [Entry(name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in state.items()]


def read_layout(text: object, where: str) -> list[Entry]:
    """A layout as somebody else tells it, checked to be one.

    Raises:
        ExchangeError: no JSON list of names, dtypes and shapes, an unknown dtype, a size that is no number, a name twice.
    """
    if not isinstance(text, str) or len(text) > MAX_LAYOUT:
        raise ExchangeError(f"{where}: a layout must be a text of at most {MAX_LAYOUT} characters, got another or a longer one.")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, list) or not all(_is_entry(entry) for entry in told):
        raise ExchangeError(f"{where}: a layout must be JSON of names, dtypes and shapes, got something else.")
    entries = [Entry(name, dtype, tuple(shape)) for name, dtype, shape in told]
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise ExchangeError(f"{where}: dtype must be one of {list(DTYPES)}, got another for {entry.name!r}.")
    if len({entry.name for entry in entries}) < len(entries):
        raise ExchangeError(f"{where}: a layout must hold every name once, got one twice.")
    return entries


def _is_entry(told: object) -> bool:
    """Whether a name, a dtype's name and a shape of sizes from 0 on."""
    match told:
        case [str(name), str(), list(shape)] if len(name) <= MAX_NAME_LENGTH and name.isprintable():
            return len(shape) <= MAX_DIMENSIONS and all(type(size) is int and 0 <= size < 2**40 for size in shape)
    return False


def received(
    array: Array, where: str, *, dtypes: Collection[str] = tuple(npy.DTYPES), shape: tuple[int | None, ...] | None = None
) -> npt.NDArray[Any]:
    """The values of an array that somebody else sent, of one of the dtypes (as .npy calls them) and a shape (None: any length).

    What cannot be written to: it is the message's own bytes, and nothing is allocated for what its header claims.

    Raises:
        ExchangeError: no plain .npy array of such a dtype and shape that is as long as it says.
    """
    try:
        dtype, found, _ = npy.header(array.data)
        if dtype.str not in dtypes:
            wanted = " or ".join(np.dtype(code).name for code in dtypes)
            raise npy.NpyError(f"must be {wanted}, got {dtype.name}")
        if shape is not None and (len(shape) != len(found) or any(w not in (None, f) for w, f in zip(shape, found, strict=True))):
            wanted = str(shape).replace("None", "any")
            raise npy.NpyError(f"must have shape {wanted}, got {found}")
        return npy.read(array.data)
    except npy.NpyError as error:
        raise ExchangeError(f"{where} {error}.") from None


def tensor(array: Array, where: str, *, dtypes: Collection[str] = ("<f4", "<f8"), ndim: int | None = None) -> Tensor:
    """The values of a `received` array, as a tensor of its own."""
    values = received(array, where, dtypes=dtypes, shape=None if ndim is None else (None,) * ndim)
    return torch.from_numpy(values.copy())


def of_message(records: Mapping[str, Message], name: str, where: str) -> Message:
    """The record of that name in a message.

    Raises:
        ExchangeError: there is none.
    """
    if name not in records:
        raise ExchangeError(f"{where}: the message must hold {name!r}, it does not.")
    return records[name]


def unpack(arrays: ArrayRecord, layout: object, where: str = "exchange", expected: Mapping[str, Tensor] | None = None) -> State:
    """The state that was packed.

    Args:
        arrays: received.
        layout: received with them.
        where: who sent it.
        expected: a state that it must be like, which is seen before an array is read.

    Raises:
        ExchangeError: arrays and layout disagree in dtype or length, the state is not as expected, or a float is not finite.
    """
    entries = read_layout(layout, where)
    if expected is not None:
        check_entries(entries, entries_of(expected), where)
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + math.prod(entry.shape)
    flat: dict[str, npt.NDArray[Any]] = {}
    for dtype, size in sizes.items():
        if dtype in arrays:
            flat[dtype] = received(arrays[dtype], f"{where}: the {dtype} array", dtypes=(DTYPES[dtype][1],), shape=(None,))
        if dtype not in arrays or flat[dtype].size < size:
            raise ExchangeError(f"{where}: the {dtype} array must hold {size} values of the state, it is missing or too short.")
    if len(arrays) > len(flat) or any(array.size > sizes[dtype] for dtype, array in flat.items()):
        raise ExchangeError(f"{where}: the arrays must hold nothing but the state, got values left over.")
    used = dict.fromkeys(flat, 0)
    state: State = {}
    for name, dtype, shape in entries:
        size = math.prod(shape)
        stored = torch.from_numpy(flat[dtype][used[dtype] : used[dtype] + size].copy())
        used[dtype] += size
        state[name] = (stored.view(torch.bfloat16) if dtype == "bfloat16" else stored).reshape(shape)
    # One array is looked at in a fraction of the time of its many parts, which are looked at for the name of a bad one.
    if "bfloat16" in flat or not all(np.isfinite(array).all() for array in flat.values()):
        check_finite(state, where)
    return state


def unpack_state(
    message: RecordDict, record: str = "arrays", *, where: str = "exchange", expected: Mapping[str, Tensor] | None = None
) -> State:
    """The state in a message: its arrays with the ``layout`` in its ``config``."""
    arrays = of_message(message.array_records, record, where)
    layout = of_message(message.config_records, "config", where).get("layout")
    return unpack(arrays, layout, where, expected)


def check_size(message: RecordDict, most_mb: float, where: str) -> None:
    """Refuse a message whose arrays and texts are more than so many megabytes (10^6 bytes)."""
    size = sum(len(array.data) for record in message.array_records.values() for array in record.values())
    texts = [value for record in message.config_records.values() for value in record.values()]
    size += sum(len(value) for value in texts if isinstance(value, str | bytes | list))
    if size > most_mb * 1e6:
        raise ExchangeError(
            f"{where}: a message must be at most {most_mb:g} MB, got {size / 1e6:.0f}. Raise strategy.max_message_mb."
        )


KINDS = frozenset(
    (
        *("weights", "constants", "sums", "reference", "moments", "scanners", "candidates", "hits", "eraser", "probes"),
        *("embeddings", "predictions"),
    )
)
"""What arrays are; whatever else a message calls its own is counted as other."""


def array_bytes(message: RecordDict) -> dict[str, int]:
    """Bytes of the arrays in a message, by what they are; ``arrays`` are weights."""
    kinds = {name: "weights" if name == "arrays" else name.partition("-")[0] for name in message.array_records}
    kinds = {name: kind if kind in KINDS else "other" for name, kind in kinds.items()}
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


def check_finite(state: Mapping[str, Tensor], where: str = "exchange") -> None:
    """Refuse NaN and infinities: one would spoil the average for every site."""
    bad = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ExchangeError(f"{where}: every weight must be finite, got NaN or infinity in {len(bad)}, first {bad[0]!r}.")


def check_like(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Refuse a state whose names, order, shapes or dtypes are not those of this run's model."""
    check_entries(entries_of(state), entries_of(expected), where)


def check_entries(found: list[Entry], wanted: list[Entry], where: str) -> None:
    """Refuse a layout other than the one that is wanted."""
    if found == wanted:
        return
    first = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), None)
    if first is None:
        odd = (found if len(found) > len(wanted) else wanted)[min(len(found), len(wanted))]
        how = f"got {odd} too many" if len(found) > len(wanted) else f"{odd} is missing"
    else:
        how = f"got {first[0]} where {first[1]} is expected"
    raise ExchangeError(f"{where}: weights must match the run's model, {how}.")


def pack_groups(groups: GroupMoments | ScannerSums) -> ArrayRecord:
    """What a site tells of its groups or scanners, by field name: moments as float32, sums that are solved as float64."""
    dtype = torch.float32 if isinstance(groups, GroupMoments) else torch.float64
    return ArrayRecord({name: Array(_numpy(value.to(dtype))) for name, value in vars(groups).items()})


def unpack_groups(kind: type[Groups], arrays: ArrayRecord, features: int, where: str) -> Groups:
    """What was packed, checked by its own kind and to be about ``features`` features."""
    check_names(arrays, [field.name for field in dataclasses.fields(kind)], where)
    dtypes = ("<f4",) if kind is GroupMoments else ("<f8",)
    values = {
        # The capitals behind a name are its dimensions.
        name: tensor(array, f"{where}: {name}", dtypes=dtypes, ndim=len(name.rpartition("_")[2]))
        for name, array in arrays.items()
    }
    for name, value in values.items():
        if name.startswith("count") and not bool((value <= MAX_SUBJECTS).all()):
            raise ExchangeError(f"{where}: {name} must be counts of at most {MAX_SUBJECTS} subjects, got more.")
        if name == "covariance_GDD" and bool((value.abs() > MAX_COVARIANCE).any()):
            raise ExchangeError(f"{where}: covariances of unit vectors must be at most {MAX_COVARIANCE}, got more.")
    try:
        groups = kind(**values)
    except (TypeError, ValueError) as error:
        raise ExchangeError(f"{where}: {error}") from None
    if groups.num_features != features:
        raise ExchangeError(f"{where}: groups must have {features} features, got {groups.num_features}.")
    return groups


def check_names(arrays: ArrayRecord, names: Collection[str], where: str) -> None:
    """Refuse a record of other arrays than those."""
    if set(arrays) != set(names):
        raise ExchangeError(f"{where}: the arrays must be {sorted(names)}, got others, {len(arrays)} of them.")


def pack_reference(reference: Reference) -> ArrayRecord:
    """Mean and scale as float32 arrays."""
    return ArrayRecord({"mean": Array(_numpy(reference.mean_D.float())), "scale": Array(_numpy(reference.scale_D.float()))})


def unpack_reference(arrays: ArrayRecord, features: int, where: str) -> Reference:
    """The reference that was packed, checked."""
    check_names(arrays, ("mean", "scale"), where)
    mean_D, scale_D = (tensor(arrays[name], f"{where}: the {name}", dtypes=("<f4",), ndim=1) for name in ("mean", "scale"))
    if tuple(mean_D.shape) != (features,):
        raise ExchangeError(f"{where}: the reference must have {features} features, got {tuple(mean_D.shape)}.")
    try:
        return Reference(mean_D, scale_D)
    except ValueError as error:
        raise ExchangeError(f"{where}: {error}") from None


def pack_eraser(eraser: Eraser) -> ArrayRecord:
    """Mean, scale and directions as they are."""
    return ArrayRecord({name: Array(_numpy(value)) for name, value in vars(eraser).items()})


def unpack_eraser(arrays: ArrayRecord, features: int, where: str) -> Eraser:
    """The eraser that was packed, checked to be of ``features`` features and finite."""
    names = ("mean_F", "scale_F", "directions_KF")
    check_names(arrays, names, where)
    values = {name: tensor(arrays[name], f"{where}: {name}", ndim=len(name.rpartition("_")[2])) for name in names}
    if any(value.shape[-1] != features for value in values.values()):
        raise ExchangeError(f"{where}: the eraser must have {features} features, got another number.")
    check_finite(values, where)
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
        if name in plain:
            value = received(array, f"{where}: {name} of {kind.__name__}", dtypes=("<f8",))
        if name not in plain or not np.isfinite(value).all():
            raise ExchangeError(f"{where}: {kind.__name__} must be finite float64 arrays of its fields, got another {name!r}.")
        if "count" in name and (value.min(initial=0) < 0 or value.max(initial=0) > MAX_SUBJECTS):
            raise ExchangeError(f"{where}: {name} of {kind.__name__} must be counts of at most {MAX_SUBJECTS} subjects.")
        values[name] = torch.from_numpy(value.copy())
    for name, shape in shapes.items():
        found = tuple(values[name].shape) if isinstance(values.get(name), Tensor) else None  # type: ignore[attr-defined]
        if found is None or len(found) != len(shape) or any(w not in (None, f) for f, w in zip(found, shape, strict=True)):
            raise ExchangeError(f"{where}: {name} of {kind.__name__} must have shape {shape}, got {found}.")
    try:
        texts = json.loads(_bytes_of(arrays["texts"], where))
        values |= {name: _plain_texts(value, where) for name, value in texts.items() if name not in plain}
        return kind(**values)
    except ExchangeError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError, IndexError) as error:
        raise ExchangeError(f"{where}: {kind.__name__}: {error}") from None


def _bytes_of(array: Array, where: str) -> bytes:
    """The text that was sent as bytes; of what every part of may be at most so long and so many."""
    values = received(array, f"{where}: the texts", dtypes=("|u1",), shape=(None,))
    if values.size > MAX_LAYOUT:
        raise ExchangeError(f"{where}: the texts must be at most {MAX_LAYOUT} bytes, got {values.size}.")
    return values.tobytes()


def _plain_texts(value: object, where: str) -> object:
    """Texts and numbers in tuples, as they came; nothing long, nothing of several lines."""
    if isinstance(value, list) and len(value) <= MAX_TEXTS:
        return tuple(_plain_texts(entry, where) for entry in value)
    if type(value) is int or (isinstance(value, str) and len(value) <= MAX_TEXT_LENGTH and value.isprintable()):
        return value
    raise ExchangeError(f"{where}: texts must be short lines, got something else.")


TEXT_FIELDS = ("site", "scanner", "sex", "diagnosis", "split")


def unpack_embeddings(arrays: ArrayRecord, where: str = "exchange") -> Embeddings:
    """The embeddings that were packed; `Embeddings` checks lengths and numbers."""
    try:
        return Embeddings(**_unpack_columns(arrays, where))
    except (TypeError, ValueError) as error:
        raise ExchangeError(f"{where}: {error}") from None


def unpack_predictions(arrays: ArrayRecord, target: Target, where: str) -> Predictions:
    """The predictions that were packed; `Predictions` checks lengths and numbers."""
    try:
        return Predictions(target=target, **_unpack_columns(arrays, where))
    except (TypeError, ValueError) as error:
        raise ExchangeError(f"{where}: predictions: {error}") from None


def _unpack_columns(arrays: ArrayRecord, where: str) -> dict[str, npt.NDArray[Any]]:
    values: dict[str, npt.NDArray[Any]] = {}
    for name, array in arrays.items():
        if name in TEXT_FIELDS:
            value = received(array, f"{where}: {name}", dtypes=("|u1",), shape=(None, None))
            if not 0 < value.shape[1] <= 4 * MAX_TEXT_LENGTH:
                raise ExchangeError(f"{where}: {name} must be of 1 to {4 * MAX_TEXT_LENGTH} bytes, got {value.shape[1]}.")
            value = np.char.decode(np.ascontiguousarray(value).view(f"S{value.shape[1]}").reshape(-1), "utf-8")
            values[name] = value
        else:
            values[name] = received(array, f"{where}: {name}").copy()
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
