"""The map of representations by age: its measure, and the command from scans to figure."""

import json
from pathlib import Path

import numpy as np
import pytest

from core.evaluation.embeddings import Embeddings
from simulations.age_maps import main, neighbour_error


def embeddings(h_NF: np.ndarray, age_N: np.ndarray) -> Embeddings:
    n = len(age_N)
    return Embeddings(
        h_NF=h_NF.astype(np.float32),
        subject=np.arange(n),
        site=np.array(["north"] * n),
        scanner=np.array(["x"] * n),
        sex=np.array([""] * n),
        diagnosis=np.array(["control"] * n),
        split=np.array(["test" if i % 4 == 0 else "train" for i in range(n)]),
        age_years=age_N,
    )


def test_ages_in_order_are_told_by_neighbours_and_scattered_ages_are_not() -> None:
    random = np.random.default_rng(0)
    age_N = random.uniform(20, 80, 200)
    line_NF = np.stack([age_N, np.zeros(200)], axis=1) + random.normal(0, 1e-3, (200, 2))
    error, low, high = neighbour_error(embeddings(line_NF, age_N), seed=0)
    assert low < error < high < 4
    error, low, _ = neighbour_error(embeddings(random.normal(0, 1, (200, 2)), age_N), seed=0)
    # Uniform ages over 60 years told by their mean: 60 / 4 = 15 years off.
    assert error == pytest.approx(15, abs=4)
    assert low > 10


def test_the_command_draws_every_objective(consortium: Path, tmp_path: Path) -> None:
    overrides = ["experiment=tiny", "data=folder", f"data.root={consortium}"]
    main(overrides, objectives="ntxent,exp", output=tmp_path / "maps")
    told = json.loads((tmp_path / "maps" / "age_maps.json").read_text())
    assert list(told) == ["ntxent", "exp"]
    assert all(low <= error <= high for error, low, high in told.values())
    assert (tmp_path / "maps" / "age_maps.png").read_bytes()[:4] == b"\x89PNG"
