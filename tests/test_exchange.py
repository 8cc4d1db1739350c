"""What crosses the wire comes out as it went in, or is refused."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.nets import DenseNet121

from core.evaluation.embeddings import Embeddings
from core.exchange import (
    ExchangeError,
    check_like,
    fingerprint,
    pack,
    pack_embeddings,
    pack_groups,
    unpack,
    unpack_embeddings,
    unpack_groups,
)
from core.faults import SiteError, error_kind
from core.moments import GroupMoments, site_moments
from core.settings import MomentPolicy
from simulations.in_process import run_in_process


def test_densenet_round_trip_is_bit_exact_and_keeps_integer_buffers() -> None:
    torch.manual_seed(0)
    state = DenseNet121(spatial_dims=3, in_channels=1, out_channels=2).state_dict()
    state["features.norm0.num_batches_tracked"] += 2**40 + 1
    assert len(state) == 727
    arrays, layout = pack(state)
    assert set(arrays) == {"float32", "int64"}
    back = unpack(arrays, layout)
    assert list(back) == list(state)
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert back[name].numpy().tobytes() == value.numpy().tobytes()
    assert int(back["features.norm0.num_batches_tracked"]) == 2**40 + 1


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**31)), max_size=6))
def test_any_state_survives(entries: list[tuple[torch.dtype, list[int], int]]) -> None:
    state = {}
    for number, (dtype, shape, seed) in enumerate(entries):
        values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 37
        state[f"w{number}"] = values.to(dtype)
    back = unpack(*pack(state))
    assert list(back) == list(state)
    assert all(back[n].dtype == v.dtype and back[n].shape == v.shape and torch.equal(back[n], v) for n, v in state.items())


def test_damaged_states_are_refused() -> None:
    state = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    arrays, layout = pack(state)
    with pytest.raises(ExchangeError, match="missing or too short"):
        unpack(ArrayRecord({"float32": Array(np.ones(9, np.float32))}), layout)
    with pytest.raises(ExchangeError, match="left over"):
        unpack(ArrayRecord({"float32": Array(np.ones(11, np.float32))}), layout)
    with pytest.raises(ExchangeError, match=r"must be float32, got float64"):
        unpack(ArrayRecord({"float32": Array(np.ones(10))}), layout)
    with pytest.raises(ExchangeError, match="missing or too short"):
        unpack(arrays, json.dumps([["a", "float16", [2, 3]]]))
    for bad in (math.nan, math.inf):
        values = np.ones(10, np.float32)
        values[7] = bad
        with pytest.raises(ExchangeError, match="finite, got NaN or infinity in 1, first 'b'"):
            unpack(ArrayRecord({"float32": Array(values)}), layout)


def test_states_of_another_model_are_refused() -> None:
    state = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    check_like(state, {name: value * 2 for name, value in state.items()}, "here")
    for other in (
        {"a": torch.ones(3, 2), "b": torch.ones(4)},
        {"b": torch.ones(4), "a": torch.ones(2, 3)},
        {"a": torch.ones(2, 3)},
    ):
        with pytest.raises(ExchangeError, match="here: weights must match"):
            check_like(other, state, "here")


def test_moments_survive_and_the_wrong_width_is_refused() -> None:
    z = torch.nn.functional.normalize(torch.randn(90, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    labels = {"age_years": torch.full((90,), 40.0), "sex": torch.ones(90)}
    moments, _ = site_moments(z, labels, torch.zeros(90), bin_years=5.0, policy=MomentPolicy())
    back = unpack_groups(GroupMoments, pack_groups(moments), 4, "site a")
    assert back.label_GL.tolist() == [[40.0, 1.0]]
    assert torch.allclose(back.mean_GD.double(), moments.mean_GD, atol=1e-7)
    assert back.count_G.tolist() == [90.0]
    with pytest.raises(ExchangeError, match="site a: groups must have 5 features, got 4"):
        unpack_groups(GroupMoments, pack_groups(moments), 5, "site a")
    with pytest.raises(ExchangeError, match="site a"):
        unpack_groups(GroupMoments, ArrayRecord({"label_GL": Array(np.ones(2, np.float32))}), 4, "site a")


def test_embeddings_survive_with_any_names() -> None:
    table = Embeddings(
        h_NF=np.arange(6, dtype=np.float32).reshape(3, 2),
        subject=np.array([0, 1, 1]),
        site=np.array(["Université", "b", "b"]),
        scanner=np.array(["", "3T é", "x"]),
        sex=np.array(["F", "", "M"]),
        diagnosis=np.array(["control", "", "patient"]),
        split=np.array(["train", "test", "test"]),
        age_years=np.array([1.5, np.nan, 80.0]),
    )
    back = unpack_embeddings(pack_embeddings(table))
    for name, value in vars(table).items():
        np.testing.assert_array_equal(getattr(back, name), value)


def test_what_a_site_reports_is_read_back() -> None:
    raised = f"{SiteError}{SiteError('not_finite', 'site a, round 3: the loss must be finite.')}"
    assert error_kind(raised) == ("not_finite", "site a, round 3: the loss must be finite.")
    assert error_kind("boom") == ("unknown", "boom")
    assert error_kind("") == ("unknown", "no reason given")


def test_fingerprint_is_of_the_code() -> None:
    assert len(fingerprint()) == 64
    assert fingerprint() == fingerprint()


def answers_before_training(folder: Path, rows: Sequence[str], debias: str) -> list[tuple[str, bytes]]:
    """What a site with these rows of a table says before the first training step, next to another site: kind and bytes."""
    from client.app import app as client_app
    from server.app import app as server_app

    folder.mkdir()  # what a site has read it keeps: another file
    header = "participant_id,age,sex,scanner,f0,f1"
    others = [f"b{i:02d},{30 + i},{'FM'[i % 2]},x,{i % 6},{i % 4 + 0.3 * i}" for i in range(24)]
    for site, lines in {"a": rows, "b": others}.items():
        (folder / f"{site}.csv").write_text("\n".join([header, *lines]) + "\n")
    heard: list[tuple[str, bytes]] = []

    def listen(reply: Message, message_type: str) -> Message:
        if message_type == "train.pretrain":
            raise RuntimeError("enough")
        if reply.metadata.src_node_id == 1 and message_type != "query.describe":
            for record in reply.content.array_records.values():
                heard.extend((message_type, array.data) for array in record.values())
        return reply

    overrides = (
        f"experiment=roi {debias} debias.erase=input data.table=null data.fractions=[1,0,0] encoder.width=4 embedding_size=2 "
        f"output={folder} policy.min_group=8 policy.diagonal_subjects=8"
    )
    policy = {"min-group": 8, "diagonal-subjects": 8}
    nodes = {number: {"site": site, "data-root": str(folder / f"{site}.csv"), **policy} for number, site in enumerate("ab", 1)}
    with pytest.raises(RuntimeError, match="enough"):
        run_in_process(server_app, client_app, overrides, nodes, tamper=listen)
    return heard


def test_no_difference_of_sums_is_about_a_scanner_that_a_site_withholds(tmp_path: Path) -> None:
    """Site a has 24 training subjects on one scanner and 6, too few, on another; two more have no age.

    Whatever these hold, the site says the same, bit for bit, in every answer before the first training step.
    """
    fairkl = "debias=fairkl debias.kernel.bandwidths.sex=0 debias.exchange_every=1 debias.warmup_rounds=0"

    def answers(offset: float) -> list[tuple[str, bytes]]:
        rows = []
        for i in range(32):
            withheld = i >= 24
            age = "n/a" if i in (30, 31) else str(20 + i)
            values = f"{i % 7 + withheld * offset},{i % 5 + 0.1 * i + withheld * offset}"
            rows.append(f"a{i:02d},{age},{'FM'[i % 2]},{'small' if 24 <= i < 30 else 'large'},{values}")
        return answers_before_training(tmp_path / f"{offset:g}", rows, fairkl)

    told = answers(0.0)
    assert [name for name, _ in told].count("query.inputs") == 2
    assert {name for name, _ in told} >= {"query.inputs", "query.scanners", "query.sums", "query.moments"}
    assert answers(1000.0) == told


def test_no_mean_is_about_the_few_of_a_scanner_who_have_a_feature(tmp_path: Path) -> None:
    """Feature f1 is known of every subject on one scanner of site a, and of 3 of 12 on the other: of these nothing is told."""

    def answers(offset: float) -> list[tuple[str, bytes]]:
        rows = []
        for i in range(36):
            few, known = i >= 24, i < 27
            value = i % 5 + 0.1 * i + few * offset if known else ""
            rows.append(f"a{i:02d},{20 + i},{'FM'[i % 2]},{'other' if few else 'large'},{i % 7},{value}")
        return answers_before_training(tmp_path / f"{offset:g}", rows, "debias=erasure")

    told = answers(0.0)
    assert [name for name, _ in told] == ["query.inputs", "query.scanners"] + ["query.scanners"] * 4 + ["query.inputs"]
    assert answers(1000.0) == told
