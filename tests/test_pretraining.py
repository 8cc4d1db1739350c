"""Every objective, debiasing and sampling that a configuration can name takes its steps on real volumes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.site import holdings, this_site
from core.config import CONFIGS, RunConfig, load_config
from core.data.feed import Ring, Waited
from core.data.site import SiteData
from core.models import Pretrainer, build_pretrainer
from core.moments import GroupMoments
from core.training import TrainResult, embed, pretrain, pretraining_losses

OBJECTIVES = sorted(path.stem for path in (CONFIGS / "objective").glob("*.yaml"))
CPU = torch.device("cpu")


@pytest.fixture
def two_scanners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_site: Callable[..., None]) -> tuple[str, SiteData]:
    """Overrides and data of a hospital with two scanners, one subject in two having two scans."""
    monkeypatch.setenv("ISOCENTER_CACHE", str(tmp_path / "cache"))
    write_site(tmp_path / "sites" / "north", seed=5, healthy=40, scanners=2, gain=1.6)
    overrides = f"experiment=tiny finetune=none data=folder data.root={tmp_path / 'sites'} batch_size=24"
    config = load_config(overrides)
    data = holdings(this_site({"partition-id": 0, "num-partitions": 1}, config), config).splits["train"]
    repeated = range(0, len(data), 2)
    return overrides, SiteData(
        data.site,
        (*data.scans, *(data.scans[i] for i in repeated)),
        (*data.positions, *(data.positions[i - 1] for i in repeated)),
        data.store,
    )


def model_of(config: RunConfig) -> Pretrainer:
    return build_pretrainer(config.encoder, config.embedding_size, config.seed, num_classes=config.num_classes)


def train(
    overrides: str, data: SiteData, remote: dict[str, GroupMoments] | None = None
) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    config = load_config(overrides)
    model = model_of(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = pretrain(model, data, config, round_number=2, device=CPU, remote=remote)
    assert all(value.isfinite().all() for value in result.state.values())
    return result, before


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_every_weight(two_scanners: tuple[str, SiteData], objective: str) -> None:
    overrides, data = two_scanners
    result, before = train(f"{overrides} objective={objective} debias=none", data)
    assert set(result.metrics) == {"loss", "objective"}
    assert result.metrics["loss"] == pytest.approx(result.metrics["objective"])
    unmoved = [name for name, value in result.state.items() if torch.equal(value, before[name])]
    assert unmoved == []
    assert ("classifier.weight" in result.state) == (objective == "joint")


@pytest.mark.parametrize(
    "options",
    [
        "debias.divergence=kl",
        "debias.divergence=jeffreys",
        "debias.divergence=moments",
        "debias=end",
        "debias.statistics=per_batch",
        "debias.space=z",
        "debias.space=both",
        "debias.kernel.shape=cauchy",
        "debias.exchange_every=0 debias.kernel.bandwidths.sex=0 debias.kernel.bandwidths.age_years=40",
        "sampling=multi_instance sampling.balance_scanners=true",
    ],
)
def test_every_debiasing_counts(two_scanners: tuple[str, SiteData], options: str) -> None:
    overrides, data = two_scanners
    result, _ = train(f"{overrides} {options}", data)
    assert set(result.metrics) == {"loss", "objective", "fairkl"}
    assert result.metrics["fairkl"] > 0
    plain, _ = train(f"{overrides} {options if 'sampling' in options else ''} debias=none", data)
    assert not all(torch.equal(value, plain.state[name]) for name, value in result.state.items())


def test_both_spaces_are_the_sum_of_each(two_scanners: tuple[str, SiteData]) -> None:
    overrides, data = two_scanners
    terms = {}
    for space in ("h", "z", "both"):
        config = load_config(f"{overrides} debias.space={space}")
        terms[space] = next(pretraining_losses(model_of(config), data, config, 2, CPU, {}, {}, Waited()))["fairkl"].detach()
    assert float(terms["both"]) == pytest.approx(float(terms["h"]) + float(terms["z"]), rel=1e-6)


def test_the_second_view_of_multi_instance_pairs_shows_the_second_scan(
    two_scanners: tuple[str, SiteData], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, data = two_scanners
    asked = []
    read = SiteData.read

    def spy(self: SiteData, indices: list[int], device: torch.device, ring: Ring | None = None) -> torch.Tensor:
        asked.append(list(indices))
        return read(self, indices, device, ring)

    monkeypatch.setattr(SiteData, "read", spy)
    config = load_config(f"{overrides} sampling=multi_instance debias=none local_steps=1")
    next(pretraining_losses(model_of(config), data, config, 1, CPU, {}, {}, Waited()))
    ((*both,),) = asked
    first, second = both[: len(both) // 2], both[len(both) // 2 :]
    assert [data.scans[i].subject for i in first] == [data.scans[i].subject for i in second]
    assert first != second
    asked.clear()
    config = load_config(f"{overrides} debias=none local_steps=1")
    next(pretraining_losses(model_of(config), data, config, 1, CPU, {}, {}, Waited()))
    assert [len(indices) for indices in asked] == [len(first)]


def test_a_split_without_scans_has_representations_of_no_row(two_scanners: tuple[str, SiteData]) -> None:
    overrides, data = two_scanners
    for encoder in ("small", "resnet18"):
        model = model_of(load_config(f"{overrides.replace('experiment=tiny ', '')} encoder={encoder}"))
        none, some = (embed(model, data.select(keep), CPU) for keep in (lambda _: False, lambda scan: scan == data.scans[0]))
        assert [part.shape[1:] for part in none] == [part.shape[1:] for part in some]
        assert {len(part) for part in none} == {0}
