"""Hostile and broken messages, at the server and at a site: refused in a sentence, and the round goes on without their sender."""

import io
import json
import math
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from client.app import app as client_app
from core import npy
from core.config import ConfigError, StrategyConfig, load_config
from core.exchange import ExchangeError, array_bytes, pack, pack_groups, pack_reference, received, unpack, unpack_groups
from core.moments import GroupMoments, Reference
from server.average import capped_shares, check_enough
from server.grid import PatientGrid
from server.guard import UpdateGuard, read_about, read_count
from server.sites import RunError, Sites
from server.strategy import SiteRounds, read_sums
from simulations.in_process import InProcessGrid

Federate = Callable[..., Path]
TEMPLATE = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
SITES = {1: "a", 2: "b", 3: "c", 4: "d", 5: "e"}


def npy_bytes(descr: str = "<f4", shape: str = "(10,)", payload: bytes = bytes(40), order: str = "False") -> bytes:
    """A .npy file whose header claims what it likes."""
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return npy.MAGIC + len(text).to_bytes(2, "little") + text.encode() + payload


def raw(data: bytes) -> Array:
    return Array(dtype="float32", shape=(10,), stype="numpy.ndarray", data=data)


def saved(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


# What an array may be.


@pytest.mark.parametrize("code", sorted(npy.DTYPES))
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (1, 2, 3), (0,), (0, 500, 500)], ids=str)
def test_what_numpy_saves_is_read_back_bit_for_bit(code: str, shape: tuple[int, ...]) -> None:
    values = (np.arange(math.prod(shape)).reshape(shape) % 2).astype(code)
    back = npy.read(saved(values))
    assert (back.dtype, back.shape) == (values.dtype, shape)
    assert back.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy_bytes(shape="(10000000000000,)"), "must hold the 40000000000000 bytes that its header claims, got 40"),
        (npy_bytes(payload=bytes(36)), "must hold the 40 bytes that its header claims, got 36"),
        (npy_bytes(payload=bytes(44)), "must hold the 40 bytes that its header claims, got 44"),
        (npy_bytes(shape="(-1,)"), "must have a header as numpy.save writes it"),
        (npy_bytes(shape="(0, 1000000000000000000, 1000000000)", payload=b""), "must have dimensions that numpy can hold"),
        (npy_bytes(shape=f"({'1, ' * 39}1)", payload=bytes(4)), "must have at most 8 dimensions, got 40"),
        (npy_bytes("|O"), "must be of plain little-endian numbers, got dtype '|O'"),
        (saved(np.array([{}], dtype=object)), "must be of plain little-endian numbers, got dtype '|O'"),
        (npy_bytes("<c8", payload=bytes(80)), "must be of plain little-endian numbers, got dtype '<c8'"),
        (npy_bytes(">f4"), "must be of plain little-endian numbers, got dtype '>f4'"),
        (npy_bytes("<U1"), "must be of plain little-endian numbers, got dtype '<U1'"),
        (saved(np.zeros(2, [("x", "<f4")])), "must have a header as numpy.save writes it"),
        (npy_bytes(order="True"), "must be in C order, got Fortran order"),
        (saved(np.asfortranarray(np.ones((2, 3)))), "must be in C order, got Fortran order"),
        (npy_bytes("|b1", payload=bytes([2] * 10)), "must hold truth values of 0 and 1"),
        (npy_bytes(order="__import__('os')"), "must have a header as numpy.save writes it"),
        (npy.MAGIC + b"\xff\xff" + b"(" * 65535, "must have a header of at most 1024 bytes"),
        (b"\x93NUMPY\x02\x00" + bytes(60), "must be the bytes of a .npy file"),
        (b"PK\x03\x04" + bytes(60), "must be the bytes of a .npy file"),
        (b"", "must be the bytes of a .npy file"),
    ],
    ids=lambda value: value[:60].replace(" ", "-") if isinstance(value, str) else "",
)
def test_bytes_that_are_no_plain_array_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ExchangeError) as error:
        received(raw(data), "site b: the array")
    assert str(error.value).startswith("site b: the array must ")
    assert reason in str(error.value)


VALID = npy_bytes(payload=np.arange(10, dtype=np.float32).tobytes())


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=200).map(lambda tail: npy.MAGIC + tail),
        st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=8)).map(
            lambda change: VALID[: change[0]] + change[1] + VALID[change[0] + len(change[1]) :]
        ),
        st.builds(
            lambda descr, sizes, payload: npy_bytes(descr, str(tuple(sizes)), payload),
            st.sampled_from(["<f4", "<f8", "|b1", "|O", "<c16", "<V8", "<M8[s]", "<i8"]),
            st.lists(st.integers(-1, 10**20), max_size=12),
            st.binary(max_size=64),
        ),
    )
)
def test_no_bytes_make_the_reader_fail_otherwise_or_allocate_more_than_they_are(data: bytes) -> None:
    tracemalloc.start()
    try:
        values = received(raw(data), "site b: the array")
        assert values.nbytes <= len(data)
    except ExchangeError as error:
        assert str(error).startswith("site b: the array must ")  # noqa: PT017 - either is right
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= len(data) + 50_000


# What a layout may be.


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (None, "a layout must be a text of at most 1000000 characters"),
        ("[" * 100_000, "a layout must be JSON of names, dtypes and shapes"),
        ("x" * 1_000_001, "a layout must be a text of at most 1000000 characters"),
        ("9" * 5000, "a layout must be JSON"),
        ('{"a": 1}', "a layout must be JSON"),
        ("nonsense", "a layout must be JSON"),
        ('[["a", "float32", [-10]]]', "a layout must be JSON"),
        ('[["a", "float32", [1e1]]]', "a layout must be JSON"),
        ('[["a", "float32", [true]]]', "a layout must be JSON"),
        ('[["a", "float32", [[10]]]]', "a layout must be JSON"),
        ('[["a", "float32", [18446744073709551626]]]', "a layout must be JSON"),
        ('[["a", "float32", [1, 1, 1, 1, 1, 1, 1, 1, 10]]]', "a layout must be JSON"),
        ('[["a\\n", "float32", [10]]]', "a layout must be JSON"),
        ('[["a", "float32"]]', "a layout must be JSON"),
        ('[["a", "Tensor", [10]]]', "dtype must be one of ['bool', 'uint8'"),
        ('[["a", "complex64", [10]]]', "dtype must be one of ['bool', 'uint8'"),
        ('[["a", "float32", [5]], ["a", "float32", [5]]]', "a layout must hold every name once"),
        ('[["a", "float32", [1099511627775, 1099511627775]]]', "it is missing or too short"),
        ('[["a", "float64", [10]]]', "it is missing or too short"),
        ("[]", "got values left over"),
        ('[["a", "float32", [9]]]', "got values left over"),
    ],
    ids=range(21),
)
def test_a_layout_that_is_none_is_refused(layout: object, reason: str) -> None:
    with pytest.raises(ExchangeError) as error:
        unpack(ArrayRecord({"float32": raw(VALID)}), layout, "site b")
    assert str(error.value).startswith("site b: ")
    assert reason in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["float32", "bfloat16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_no_layout_fails_otherwise(told: object) -> None:
    with pytest.raises(ExchangeError):
        unpack(ArrayRecord({"float32": raw(VALID)}), json.dumps(told), "site b")


# What an update may be.


def rounds_of(folder: Path, *overrides: str, nodes: Mapping[int, str] = SITES) -> SiteRounds:
    """The real strategy over sites whose answers the test makes itself."""
    config = load_config(["experiment=tiny", "data=folder", "data.root=/", "debias=none", *overrides])
    grid = InProcessGrid(client_app, {}, {})
    strategy = SiteRounds(config, "pretrain", Sites(PatientGrid(grid), 1.0), nodes, TEMPLATE, folder)
    strategy.round_arrays = pack(TEMPLATE)[0]
    return strategy


def answer(values: np.ndarray | Tensor, **metrics: float) -> RecordDict:
    """An honest answer: ten weights, and what is told of them."""
    flat = torch.as_tensor(np.asarray(values, dtype=np.float32))
    arrays, layout = pack({"a": flat[:6].reshape(2, 3), "b": flat[6:]})
    told = {"num-examples": 10, "seconds": 1.0, "waited-seconds": 0.1, "steps": 2, "loss": 2.0, "objective": 2.0} | metrics
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(told), "config": ConfigRecord({"layout": layout})})


def replies_of(answers: Mapping[int, RecordDict]) -> list[Message]:
    """Answers as messages from the nodes."""
    asked = {node: Message(RecordDict(), dst_node_id=node, message_type="train.pretrain") for node in answers}
    return [Message(content, reply_to=asked[node]) for node, content in answers.items()]


def honest(node: int, size: float = 1.0) -> np.ndarray:
    """An update that every site would make, with its own noise."""
    return size * (1.0 + 0.05 * np.random.default_rng(node).normal(size=10))


def arrays_of(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def apply(record: RecordDict) -> None:
        values = change(record["arrays"]["float32"].numpy().copy())  # type: ignore[index, union-attr]
        record.array_records["arrays"]["float32"] = Array(values)

    return apply


def layout_of(change: Callable[[list], object]) -> Callable[[RecordDict], None]:
    def apply(record: RecordDict) -> None:
        about = record.config_records["config"]
        about["layout"] = json.dumps(change(json.loads(str(about["layout"]))))

    return apply


def metric(name: str, value: object) -> Callable[[RecordDict], None]:
    def apply(record: RecordDict) -> None:
        dict.__setitem__(record.metric_records["metrics"].__dict__["_data"], name, value)  # what no honest client could pack

    return apply


def bytes_of(data: bytes) -> Callable[[RecordDict], None]:
    def apply(record: RecordDict) -> None:
        record.array_records["arrays"]["float32"] = raw(data)

    return apply


def put(values: np.ndarray, where: int, value: float) -> np.ndarray:
    values[where] = value
    return values


def another_array(record: RecordDict) -> None:
    record.array_records["arrays"]["int64"] = Array(np.zeros(3, np.int64))


def another_record(record: RecordDict) -> None:
    record["moments-h"] = ArrayRecord({"float32": Array(np.zeros(3))})


def without_metrics(record: RecordDict) -> None:
    del record["metrics"]


def setting(record: RecordDict) -> None:
    record.config_records["config"]["command"] = "rm"


def epsilon_of_words(record: RecordDict) -> None:
    record.config_records["config"]["privacy-epsilon"] = "none"


HOSTILE: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "nan": (arrays_of(lambda v: put(v, 5, math.nan)), "every weight must be finite, got NaN or infinity in 1, first 'a'"),
    "inf": (arrays_of(lambda v: put(v, 9, math.inf)), "every weight must be finite, got NaN or infinity in 1, first 'b'"),
    "a million times": (arrays_of(lambda v: 1e6 * v), "the norm of an update must be at most 10 times the usual"),
    "largest float": (arrays_of(lambda v: 0 * v + 3e38), "the norm of an update must be at most 10 times the usual"),
    "wrong shape": (layout_of(lambda t: [["a", "float32", [3, 2]], t[1]]), "got 'a' float32 (3, 2) where 'a' float32 (2, 3)"),
    "wrong dtype": (layout_of(lambda t: [["a", "float64", [2, 3]], t[1]]), "got 'a' float64 (2, 3) where 'a' float32"),
    "several dimensions": (arrays_of(lambda v: v.reshape(2, 5)), "the float32 array must have shape (any,), got (2, 5)"),
    "integers as floats": (arrays_of(lambda v: v.astype(np.int32)), "the float32 array must be float32, got int32"),
    "doubles as floats": (arrays_of(lambda v: v.astype(np.float64)), "the float32 array must be float32, got float64"),
    "missing name": (layout_of(lambda t: t[:1]), "weights must match the run's model, 'b' float32 (4,) is missing"),
    "additional name": (layout_of(lambda t: [*t, ["c", "float32", [1]]]), "got 'c' float32 (1,) too many"),
    "wrong order": (layout_of(lambda t: t[::-1]), "got 'b' float32 (4,) where 'a' float32 (2, 3) is expected"),
    "duplicate name": (layout_of(lambda t: [t[0], t[0]]), "a layout must hold every name once"),
    "unknown dtype": (layout_of(lambda t: [["a", "nn", [2, 3]], t[1]]), "dtype must be one of ['bool'"),
    "huge layout": (layout_of(lambda t: t * 50_000), "a layout must be a text of at most 1000000 characters"),
    "nested layout": (lambda r: r.config_records["config"].update(layout="[" * 9999), "a layout must be JSON"),
    "no layout": (lambda r: r.config_records["config"].pop("layout"), "a layout must be a text"),
    "10^13 values": (bytes_of(npy_bytes(shape="(10000000000000,)")), "must hold the 40000000000000 bytes that its header claims"),
    "short payload": (bytes_of(VALID[:-4]), "must hold the 40 bytes that its header claims, got 36"),
    "long payload": (bytes_of(VALID + bytes(4)), "must hold the 40 bytes that its header claims, got 44"),
    "one value less": (arrays_of(lambda v: v[:9].copy()), "must hold 10 values of the state, it is missing or too short"),
    "one value more": (arrays_of(lambda v: np.append(v, v[:1])), "the arrays must hold nothing but the state"),
    "objects": (bytes_of(saved(np.array([{}] * 10, dtype=object))), "plain little-endian numbers, got dtype '|O'"),
    "complex": (arrays_of(lambda v: v.astype(np.complex64)), "plain little-endian numbers, got dtype '<c8'"),
    "fortran": (bytes_of(npy_bytes(order="True")), "must be in C order, got Fortran order"),
    "another array": (another_array, "the arrays must hold nothing but the state"),
    "another record": (another_record, "an answer must have one record of arrays, got 2"),
    "negative weight": (metric("num-examples", -399), "num-examples must be a whole number from 1 to 10000000, got -399"),
    "no weight": (metric("num-examples", 0), "num-examples must be a whole number from 1 to 10000000, got 0"),
    "huge weight": (metric("num-examples", 10**9), "num-examples must be a whole number from 1 to 10000000, got 1000000000"),
    "fractional weight": (metric("num-examples", 1.5), "num-examples must be a whole number from 1 to 10000000, got 1.5"),
    "NaN weight": (metric("num-examples", math.nan), "num-examples must be a whole number from 1 to 10000000, got nan"),
    "bool weight": (metric("num-examples", True), "num-examples must be a whole number from 1 to 10000000, got True"),
    "list as weight": (metric("num-examples", [10]), "num-examples must be a whole number from 1 to 10000000, got [10]"),
    "list as metric": (metric("loss", [1.0] * 10**6), "metrics must be finite numbers, got [1.0, 1.0"),
    "NaN metric": (metric("loss", math.nan), "metrics must be finite numbers, got nan for loss"),
    "foreign metric": (metric("oldest-age", 91.0), "metrics must be among ['fairkl', 'loss', 'num-examples'"),
    "negative seconds": (metric("seconds", -1.0), "seconds must be at least 0, got -1.0"),
    "missing metric": (lambda r: r.metric_records["metrics"].pop("seconds"), "metrics must hold ['num-examples', 'seconds'"),
    "no metrics": (without_metrics, "an answer must have one record of metrics, got 0"),
    "foreign setting": (setting, "an answer must tell the layout and a guarantee alone, got ['command']"),
    "epsilon of words": (epsilon_of_words, "a guarantee must be finite numbers"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_answer_is_refused_and_the_round_goes_on_without_it(tmp_path: Path, how: str) -> None:
    spoil, reason = HOSTILE[how]
    answers = {node: answer(honest(node)) for node in SITES}
    spoil(answers[2])
    strategy = rounds_of(tmp_path, "strategy.min_sites=4")
    arrays, _ = strategy.aggregate_train(1, replies_of(answers))
    assert arrays is not None
    [line] = [json.loads(text) for text in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert set(line["failures"]) == {"b"}
    assert line["failures"]["b"].startswith("site b: ")
    assert reason in line["failures"]["b"]
    assert len(line["failures"]["b"]) < 500
    assert set(line["sites"]) == {"a", "c", "d", "e"}
    # The average is, bit for bit, that of the sites that are left.
    others = rounds_of(tmp_path / "others", nodes={node: site for node, site in SITES.items() if node != 2})
    (tmp_path / "others").mkdir()
    expected, _ = others.aggregate_train(1, replies_of({node: answer(honest(node)) for node in SITES if node != 2}))
    assert expected is not None
    assert arrays["float32"].data == expected["float32"].data


def test_without_quorum_a_hostile_answer_stops_the_run_and_is_named(tmp_path: Path) -> None:
    answers = {node: answer(honest(node)) for node in SITES}
    HOSTILE["a million times"][0](answers[4])
    with pytest.raises(RunError, match=r"at least 5 of 5 sites must answer.*, 4 did\.\n  d: site d: the norm"):
        rounds_of(tmp_path).aggregate_train(1, replies_of(answers))


@pytest.mark.parametrize("how", ["10^13 values", "foreign metric", "unknown dtype", "a million times"])
def test_a_federation_goes_on_without_a_hostile_site(consortium: Path, federate: Federate, how: str) -> None:
    spoil, reason = HOSTILE[how]

    def tamper(reply: Message, message_type: str) -> Message:
        if message_type == "train.pretrain" and reply.metadata.src_node_id == 2:
            spoil(reply.content)
        return reply

    folder = federate(consortium, "strategy.min_sites=2", "debias=none", tamper=tamper)
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert len(rounds) == 2
    # The bytes made up for the test are shorter than the real model's, which is as good a reason.
    assert all(set(line["sites"]) == {"a", "c"} and reason.partition(" the 4")[0] in line["failures"]["b"] for line in rounds)


# How large an update may be.


def strategy_with(**changes: object) -> StrategyConfig:
    plain = load_config("experiment=tiny data=folder data.root=/").strategy.model_dump()
    return StrategyConfig.model_validate(plain | changes)


def test_two_sites_are_not_judged_in_the_first_round_and_are_in_the_second() -> None:
    guard = UpdateGuard(strategy_with())
    assert guard.judge(1, {"a": 1.0, "b": 100.0}, ["w"]) == ({}, {})
    refused, _ = guard.judge(2, {"a": 1.0, "b": 100.0}, ["w"])
    assert refused == {
        "b": "site b: the norm of an update must be at most 10 times the usual 1, got 100. Look at its losses; "
        "strategy.reject_norm is the limit."
    }


def test_the_usual_norm_is_of_the_last_rounds_and_what_was_refused_is_not_in_it() -> None:
    guard = UpdateGuard(strategy_with())
    for number in range(1, 9):
        refused, factors = guard.judge(number, {"a": 1.0, "b": 1.1, "c": 10.5}, ["w"])
        assert (set(refused), factors) == (set(), {})
        refused, _ = guard.judge(number, {"a": 1.0, "b": 1.1, "c": 12.0}, ["w"])
        assert set(refused) == {"c"}
    assert {number for number, _ in guard.state()["norms"]} == {5, 6, 7, 8}


def test_sites_that_send_back_what_they_were_sent_do_not_make_the_others_unusual() -> None:
    guard = UpdateGuard(strategy_with())
    for number in (1, 2, 3):
        assert guard.judge(number, {"a": 0.0, "b": 0.0, "c": 1.0}, ["w"]) == ({}, {})
    assert set(guard.judge(4, {"a": 0.0, "b": 0.0, "c": 11.0}, ["w"])[0]) == {"c"}


def test_half_of_the_sites_do_not_raise_the_usual_norm() -> None:
    refused, _ = UpdateGuard(strategy_with()).judge(1, {"a": 1.0, "b": 1.0, "c": 1e6, "d": 1e6}, ["w"])
    assert set(refused) == {"c", "d"}


def test_a_round_that_trains_other_weights_begins_anew() -> None:
    guard = UpdateGuard(strategy_with())
    guard.judge(1, {"a": 1.0, "b": 1.0, "c": 1.0}, ["head"])
    assert guard.judge(2, {"a": 50.0, "b": 50.0, "c": 50.0}, ["head", "encoder"]) == ({}, {})


def test_no_norm_is_refused_where_the_run_says_so_but_one_past_all_numbers() -> None:
    guard = UpdateGuard(strategy_with(reject_norm=None))
    refused, _ = guard.judge(1, {"a": 1.0, "b": 1.0, "c": 1e9, "d": math.inf}, ["w"])
    assert set(refused) == {"d"}


def test_a_large_update_is_clipped_to_the_usual_norm_and_told(tmp_path: Path) -> None:
    answers = {node: answer(honest(node)) for node in SITES} | {3: answer(honest(3, 9.0))}
    strategy = rounds_of(tmp_path, "strategy.clip_norm=2")
    arrays, _ = strategy.aggregate_train(1, replies_of(answers))
    norms = {node: float(np.linalg.norm(np.float32(honest(node)).astype(float))) for node in SITES}
    factor = 2 * sorted([*(norms[n] for n in SITES if n != 3), 9 * norms[3]])[2] / (9 * norms[3])
    line = json.loads((tmp_path / "rounds.jsonl").read_text())
    assert line["clipped"] == {"c": pytest.approx(factor, abs=1e-4)}
    assert "failures" not in line
    expected = np.mean([honest(n) if n != 3 else 9 * factor * honest(3) for n in SITES], axis=0)
    assert arrays is not None
    np.testing.assert_allclose(arrays["float32"].numpy(), expected, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1e6), min_size=3, max_size=3), min_size=2, max_size=12), st.integers(1, 11))
def test_a_guard_that_was_saved_judges_as_one_that_was_not(norms: list[list[float]], after: int) -> None:
    whole = UpdateGuard(strategy_with(clip_norm=2.0))
    told = []
    for number, row in enumerate(norms, 1):
        told.append(whole.judge(number, dict(zip("abc", row, strict=True)), ["w"]))
        if number == after:
            kept = json.dumps(whole.state())
    if after >= len(norms):
        return
    resumed = UpdateGuard(strategy_with(clip_norm=2.0))
    resumed.restore(json.loads(kept))
    for number, row in enumerate(norms[after:], after + 1):
        assert resumed.judge(number, dict(zip("abc", row, strict=True)), ["w"]) == told[number - 1]
    assert resumed.state() == whole.state()


@pytest.mark.parametrize("state", [{}, {"trained": ["w"], "norms": [1]}, {"trained": [], "norms": [[1, math.nan]]}], ids=range(3))
def test_a_state_that_is_none_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="guard: "):
        UpdateGuard(strategy_with()).restore(state)


# How updates become one.


@pytest.mark.parametrize("aggregate", ["mean", "trimmed_mean", "median"])
def test_the_order_of_answers_changes_no_bit(tmp_path: Path, aggregate: str) -> None:
    found = set()
    for number, order in enumerate(([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [3, 1, 5, 2, 4])):
        folder = tmp_path / str(number)
        folder.mkdir()
        strategy = rounds_of(folder, f"strategy.aggregate={aggregate}")
        arrays, _ = strategy.aggregate_train(1, replies_of({node: answer(honest(node)) for node in order}))
        assert arrays is not None
        found.add(arrays["float32"].data)
    assert len(found) == 1


def test_robust_averages_are_those_of_their_definitions(tmp_path: Path) -> None:
    rows = np.float32([honest(node) for node in SITES])
    for aggregate, expected in (
        ("median", np.median(rows, axis=0)),
        ("trimmed_mean", np.sort(rows, axis=0)[1:4].mean(axis=0)),
    ):
        folder = tmp_path / aggregate
        folder.mkdir()
        # Sites of other sizes weigh alike.
        answers = {node: answer(honest(node), **{"num-examples": 10 * node}) for node in SITES}
        arrays, _ = rounds_of(folder, f"strategy={aggregate}").aggregate_train(1, replies_of(answers))
        assert arrays is not None
        np.testing.assert_allclose(arrays["float32"].numpy(), expected, rtol=1e-6)


def test_a_site_that_turns_its_update_round_moves_robust_averages_less(tmp_path: Path) -> None:
    """The norm is the usual one, so no check sees it; along the honest direction (length 1) the mean loses two fifths."""
    progress = {}
    for aggregate in ("mean", "trimmed_mean", "median"):
        folder = tmp_path / aggregate
        folder.mkdir()
        answers = {node: answer(-honest(node) if node == 5 else honest(node)) for node in SITES}
        arrays, _ = rounds_of(folder, f"strategy={aggregate}".replace("=mean", "=fedavg")).aggregate_train(1, replies_of(answers))
        assert arrays is not None
        assert "failures" not in json.loads((folder / "rounds.jsonl").read_text())
        progress[aggregate] = float(arrays["float32"].numpy().mean())
    assert progress["mean"] == pytest.approx(0.6, abs=0.03)
    assert progress["trimmed_mean"] > progress["mean"] + 0.3
    assert progress["median"] > progress["mean"] + 0.3


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10**7), min_size=1), st.floats(0.01, 0.99))
def test_capped_shares_sum_to_one_and_keep_the_order(counts: dict[str, int], cap: float) -> None:
    if cap * len(counts) < 1 - 1e-9:
        with pytest.raises(ValueError, match="must be able to sum to 1"):
            capped_shares(counts, cap)
        return
    shares = capped_shares(counts, cap)
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares.values()) <= cap * (1 + 1e-6)
    for one in counts:
        for other in counts:
            assert counts[one] > counts[other] or shares[one] <= shares[other] * (1 + 1e-6)


def test_no_site_weighs_more_than_the_cap(tmp_path: Path) -> None:
    sizes = {1: 10, 2: 10, 3: 10, 4: 10, 5: 10**7}
    answers = {node: answer(np.full(10, float(node)), **{"num-examples": size}) for node, size in sizes.items()}
    arrays, _ = rounds_of(tmp_path, "strategy.max_weight_share=0.4").aggregate_train(1, replies_of(answers))
    assert arrays is not None
    # 0.4 of 5, and 0.15 each of 1, 2, 3 and 4
    np.testing.assert_allclose(arrays["float32"].numpy(), np.full(10, 3.5), rtol=1e-6)
    line = json.loads((tmp_path / "rounds.jsonl").read_text())
    assert line["shares"] == {"a": 0.15, "b": 0.15, "c": 0.15, "d": 0.15, "e": 0.4}


def test_a_cap_that_no_site_reaches_changes_no_bit(tmp_path: Path) -> None:
    found = []
    for name, option in (("without", "null"), ("with", "0.9")):
        (tmp_path / name).mkdir()
        strategy = rounds_of(tmp_path / name, f"strategy.max_weight_share={option}")
        arrays, _ = strategy.aggregate_train(1, replies_of({n: answer(honest(n), **{"num-examples": 7 * n}) for n in SITES}))
        assert arrays is not None
        found.append(arrays["float32"].data)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("strategy=median strategy.max_weight_share=0.4", "max_weight_share must be null with aggregate=median"),
        ("strategy.clip_norm=10", "clip_norm must be less than reject_norm, got 10 and 10"),
        ("strategy.max_weight_share=0.4 strategy.min_sites=2", "min_sites must be at least 3 with strategy.max_weight_share=0.4"),
        ("strategy=trimmed_mean strategy.min_sites=4", "min_sites must be at least 5 with strategy.trim_share=0.2, got 4"),
        ("strategy=median strategy.min_sites=2", "min_sites must be at least 3 with strategy.aggregate=median, got 2"),
        ("strategy.aggregate=krum", "strategy.aggregate"),
        ("strategy.trim_share=0.5", "strategy.trim_share"),
        ("strategy.reject_norm=1", "strategy.reject_norm"),
    ],
    ids=range(8),
)
def test_settings_that_make_no_sense_together_are_refused(options: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(f"experiment=tiny data=folder data.root=/ {options}")
    assert reason in str(error.value)


@pytest.mark.parametrize(("share", "fewest"), [(0.2, 5), (0.1, 10), (0.25, 4), (0.34, 3), (0.05, 20)])
def test_a_trimmed_mean_needs_as_many_sites_as_leave_one_out_at_either_end(share: float, fewest: int) -> None:
    strategy = strategy_with(aggregate="trimmed_mean", trim_share=share)
    check_enough(strategy, fewest, "pretraining")
    with pytest.raises(RunError, match=rf"pretraining: strategy.trim_share={share} needs answers of at least {fewest} sites"):
        check_enough(strategy, fewest - 1, "pretraining")


def test_too_few_sites_for_an_average_are_refused_before_a_round(consortium: Path, federate: Federate) -> None:
    with pytest.raises(RunError, match=r"pretraining: strategy.trim_share=0.2 needs answers of at least 5 sites .*, got 3"):
        federate(consortium, "strategy=trimmed_mean", name="trimmed")
    with pytest.raises(RunError, match=r"pretraining: strategy.max_weight_share=0.3 needs answers of at least 4 sites .*, got 3"):
        federate(consortium, "strategy.max_weight_share=0.3", name="capped")
    with pytest.raises(RunError, match=r"fine-tuning: strategy.aggregate=median needs answers of at least 3 sites .*, got 1"):
        federate(consortium, "strategy=median", "finetune=both", name="targets")
    assert not list((consortium.parent / "runs").glob("*/rounds.jsonl"))


def test_a_federation_averages_by_the_median(consortium: Path, federate: Federate) -> None:
    weights = {
        name: load_file(max((federate(consortium, option, name=name) / "checkpoints").glob("pretrain-*")))
        for name, option in (("mean", "strategy=fedavg"), ("median", "strategy=median"))
    }
    assert all(value.isfinite().all() for value in weights["median"].values())
    assert any(not torch.equal(value, weights["mean"][name]) for name, value in weights["median"].items())


def test_a_site_with_a_model_of_its_own_needs_no_others(consortium: Path, federate: Federate) -> None:
    folder = federate(consortium, "strategy=median", "finetune=both", "finetune.where=local", "finetune.stages=[linear_probe]")
    assert list((folder / "checkpoints").glob("linear_probe-c-*"))


# What else a site tells.


def sums_answer(values: np.ndarray) -> RecordDict:
    return RecordDict({"sums": ArrayRecord({"sums": Array(values)})})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.ones((3, 4)), "sums must be 3 rows of 5"),
        (np.ones((3, 5), np.float32), "the sums must be float64, got float32"),
        (np.ones(15), "the sums must have shape (any, any), got (15,)"),
        (np.full((3, 5), np.inf), "without infinities"),
        (np.full((3, 5), 1e9), "of a number of subjects"),
        (-np.ones((3, 5)), "of a number of subjects"),
    ],
    ids=range(6),
)
def test_sums_that_are_none_are_refused(values: np.ndarray, reason: str) -> None:
    with pytest.raises(ExchangeError) as error:
        read_sums(sums_answer(values), 5, "site b")
    assert reason in str(error.value)


def moments(**changes: np.ndarray) -> ArrayRecord:
    plain = {
        "label_GL": np.ones((2, 1), np.float32),
        "count_G": np.full(2, 10, np.float32),
        "mean_GD": np.zeros((2, 3), np.float32),
        "covariance_GDD": np.zeros((2, 3, 3), np.float32),
    }
    return ArrayRecord({name: Array(value) for name, value in (plain | changes).items()})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label_GL": np.float32(1)}, "label_GL must have shape (any, any), got ()"),
        ({"mean_GD": np.zeros((2, 3))}, "mean_GD must be float32, got float64"),
        ({"mean_GD": np.full((2, 3), 5, np.float32)}, "unit ball"),
        ({"mean_GD": np.full((2, 3), np.nan, np.float32)}, "must be finite"),
        ({"count_G": np.full(2, 1e9, np.float32)}, "count_G must be counts of at most 10000000 subjects"),
        ({"count_G": np.full(2, np.nan, np.float32)}, "count_G must be counts"),
        ({"covariance_GDD": np.full((2, 3, 3), 1e30, np.float32)}, "covariances of unit vectors must be at most 2"),
        ({"more_G": np.zeros(2, np.float32)}, "the arrays must be ['count_G', 'covariance_GDD', 'label_GL', 'mean_GD']"),
    ],
    ids=range(8),
)
def test_moments_that_are_none_are_refused(changes: dict[str, np.ndarray], reason: str) -> None:
    assert len(unpack_groups(GroupMoments, moments(), 3, "site b")) == 2
    with pytest.raises(ExchangeError) as error:
        unpack_groups(GroupMoments, moments(**{name: np.asarray(value) for name, value in changes.items()}), 3, "site b")
    assert reason in str(error.value)


DESCRIPTION: dict[str, object] = {
    **{"site": "b", "scans": 3, "subjects": 3, "scanners": 1, "pretraining-subjects": 3, "classes-in-train": 0, "num-inputs": 1},
    **{"inputs": "x", "problems": ["no_age=2"], "device": "cpu", "share-per-scan": False},
}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("site", "../../etc", "a site must be called by"),
        ("site", 3, "a site must be called by"),
        ("scans", -1, "scans must be a whole number"),
        ("subjects", "many", "subjects must be a whole number"),
        ("problems", ["sub-003=1 /data"], "problems must be counts by kind"),
        ("problems", "no_age=2", "problems must be counts by kind"),
        ("inputs", "x" * 1000, "inputs must be a short line of text"),
        ("device", "cpu\nstopped", "device must be a short line of text"),
        ("share-per-scan", "yes", "share-per-scan must be true or false"),
    ],
    ids=range(9),
)
def test_a_site_that_describes_itself_oddly_is_refused(name: str, value: object, reason: str) -> None:
    assert read_about(RecordDict({"config": ConfigRecord(DESCRIPTION)}), "site b") == DESCRIPTION  # type: ignore[arg-type]
    with pytest.raises(ExchangeError) as error:
        read_about(RecordDict({"config": ConfigRecord({**DESCRIPTION, name: value})}), "site b")  # type: ignore[dict-item]
    assert reason in str(error.value)


def test_counts_are_whole_numbers_in_range() -> None:
    assert read_count(MetricRecord({"withheld": 3}), "withheld", "site b") == 3
    for metrics in ({}, {"withheld": -1}, {"withheld": 1.0}, {"withheld": [1]}, {"withheld": 10**8}):
        with pytest.raises(ExchangeError, match="site b: withheld must be a whole number from 0 to 10000000"):
            read_count(MetricRecord(metrics), "withheld", "site b")  # type: ignore[arg-type]


def test_names_that_a_site_makes_up_are_counted_as_other() -> None:
    message = RecordDict({f"made-up-{number}": ArrayRecord({"x": Array(np.zeros(1))}) for number in range(9)})
    assert set(array_bytes(message)) == {"other"}


def test_a_message_that_is_too_large_is_a_failure_of_its_site(consortium: Path, federate: Federate) -> None:
    def tamper(reply: Message, message_type: str) -> Message:
        if message_type == "query.sums" and reply.metadata.src_node_id == 2:
            reply.content["sums"] = ArrayRecord({"sums": Array(np.zeros(300_000))})
        return reply

    with pytest.raises(RunError, match=r"b: site b: a message must be at most 1 MB, got 2\. Raise strategy\.max_message_mb"):
        federate(consortium, "strategy.max_message_mb=1", "debias.warmup_rounds=0", tamper=tamper)


# The same at the site, for what comes from the server.


def server_weights(change: Callable[[ArrayRecord], None]) -> Callable[[RecordDict], None]:
    return lambda record: change(record.array_records["arrays"])


def not_finite(arrays: ArrayRecord) -> None:
    values = arrays["float32"].numpy().copy()
    values[3] = math.nan
    arrays["float32"] = Array(values)


def as_double(arrays: ArrayRecord) -> None:
    arrays["float32"] = Array(arrays["float32"].numpy().astype(np.float64))


def claim_terabytes(arrays: ArrayRecord) -> None:
    arrays["float32"] = raw(npy_bytes(shape="(10000000000000,)"))


def retyped(entries: list) -> list:
    return [[entries[0][0], "jit", entries[0][2]], *entries[1:]]


def long_moments(record: RecordDict) -> None:
    names = ("label_GL", "count_G", "mean_GD", "covariance_GDD")
    record["moments-h"] = ArrayRecord(dict.fromkeys(names, raw(npy_bytes(shape="(10000000000000,)"))))


def made_up_moments(record: RecordDict) -> None:
    record["moments-x"] = ArrayRecord({"label_GL": Array(np.zeros(1))})


def reference_of_others(record: RecordDict) -> None:
    record["reference-h"] = pack_reference(Reference(torch.zeros(3), torch.ones(3)))


def no_spread(record: RecordDict) -> None:
    record["reference-h"] = ArrayRecord({name: Array(np.zeros(64, np.float32)) for name in ("mean", "scale")})


def moments_of_others(record: RecordDict) -> None:
    groups = GroupMoments(torch.ones(1, 1), torch.ones(1), torch.zeros(1, 3), torch.zeros(0, 3, 3))
    record["moments-h"] = pack_groups(groups)


def large(record: RecordDict) -> None:
    record["arrays"] = ArrayRecord({"float32": Array(np.zeros(600_000, np.float32))})


FROM_SERVER: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "nan": (server_weights(not_finite), "server: every weight must be finite"),
    "doubles": (server_weights(as_double), "server: the float32 array must be float32, got float64"),
    "10^13 values": (server_weights(claim_terabytes), "must hold the 40000000000000 bytes that its header claims"),
    "missing name": (layout_of(lambda entries: entries[1:]), "server: weights must match the run's model"),
    "wrong order": (layout_of(lambda entries: entries[::-1]), "server: weights must match the run's model"),
    "unknown dtype": (layout_of(retyped), "server: dtype must be one of"),
    "huge layout": (layout_of(lambda entries: entries * 50_000), "server: a message must be at most 2 MB"),
    "large": (large, "server: a message must be at most 2 MB"),
    "10^13 moments": (long_moments, "must hold the 40000000000000 bytes that its header claims, got 40"),
    "made-up moments": (made_up_moments, "server: moments must be of ['h'], got 1 of something else"),
    "moments of others": (moments_of_others, "server: groups must have 64 features, got 3"),
    "reference of others": (reference_of_others, "server: the reference must have 64 features, got (3,)"),
    "reference without spread": (no_spread, "server: reference: means must be finite and scales positive"),
}


@pytest.mark.parametrize("how", FROM_SERVER)
def test_a_site_refuses_what_a_hostile_server_sends(
    consortium: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    spoil, reason = FROM_SERVER[how]
    original = SiteRounds.training_tasks

    def tampered(self: SiteRounds, round_number: int, nodes: Mapping[int, str]) -> Iterable[Message]:
        messages = original(self, round_number, nodes)
        for message in messages:
            if message.metadata.dst_node_id == 2:
                # Every site is sent the same objects.
                records = {name: type(record)(dict(record)) for name, record in message.content.items()}
                message.content.clear()
                message.content.update(records)
                spoil(message.content)
        return messages

    monkeypatch.setattr(SiteRounds, "training_tasks", tampered)
    debias = "debias.warmup_rounds=0 debias.exchange_every=9" if "moments" in how or "reference" in how else "debias=none"
    debias = "debias=fairkl_only debias.warmup_rounds=0" if "of others" in how or "spread" in how else debias
    options = [*debias.split(), "num_rounds=1", "warmup_rounds=0", "strategy.min_sites=2", "strategy.max_message_mb=2"]
    folder = federate(consortium, *options)
    line = json.loads((folder / "rounds.jsonl").read_text())
    assert set(line["failures"]) == {"b"}
    assert reason in line["failures"]["b"]
    assert "incident" not in line["failures"]["b"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda entries: [["encoder.standardise.other", *entries[0][1:]], *entries[1:]], "server: constants: weights must match"),
        (lambda entries: entries[:-1], "server: the arrays must hold nothing but the state"),
        (lambda _: "x", "server: a layout must be JSON"),
    ],
    ids=["name", "fewer", "no list"],
)
def test_a_site_refuses_constants_of_another_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[list], object], reason: str
) -> None:
    from server.app import app as server_app
    from simulations.in_process import run_in_process

    table = tmp_path / "table.csv"
    rows = [f"s{i:02d},{'ab'[i % 2]},{20 + i},{'FM'[i // 2 % 2]},{i % 7},{i % 5 + 0.1 * i}" for i in range(60)]
    table.write_text("\n".join(["participant_id,site,age,sex,f0,f1", *rows]) + "\n")
    original = InProcessGrid.push_messages

    def tampered(self: InProcessGrid, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        if messages[0].metadata.message_type == "query.constants":
            layout_of(change)(messages[0].content)
        return original(self, messages)

    monkeypatch.setattr(InProcessGrid, "push_messages", tampered)
    nodes = {number: {"partition-id": number - 1, "num-partitions": 2} for number in (1, 2)}
    overrides = f"experiment=roi data.table={table} debias=none encoder.width=4 embedding_size=2 output={tmp_path} num_rounds=1 "
    overrides += "policy.diagonal_subjects=10"
    with pytest.raises(RunError) as error:
        run_in_process(server_app, client_app, f"{overrides} warmup_rounds=0", nodes)
    assert reason in str(error.value)
    assert "incident" not in str(error.value)
