"""What site-effect removal is compared with: the same scans, steps, views and seeds as a run of ours, without our debiasing.

`open_sites` opens a consortium as the real apps do; `run_baseline` gives one of `BASELINES` as a table of representations, the
same training and test scans in the same order for each. Nothing that is fitted sees a test scan or an unseen site.

Shape legend: N scans, F features, C covariates.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from client.site import holdings, this_site
from core.checkpoint import load_strictly
from core.combat import pooled_combat
from core.config import DebiasConfig, RunConfig
from core.data.holdings import Holdings
from core.data.manifest import Manifest, split_by_subject
from core.data.site import SiteData, default_cache_root
from core.data.table import FeatureRows
from core.evaluation.embeddings import Embeddings
from core.finetuning import labelled, num_classes
from core.models import Pretrainer, RowEncoder, build_pretrainer, num_erased
from core.scaling import input_sums, standardisation_from, standardising
from core.settings import NoHardening
from core.training import embed, pretraining_scans
from server.app import Results, choose_sites, choose_targets
from server.sites import Node
from simulations.methods import FedBN, FedDAPL, FedHarmony, FedProx, Method, Progress, State, Trained, federate

MAX_COMPONENTS = 128
INNER_FRACTIONS = (0.75, 0.0, 0.25)
TABLE_SPLITS = ("train", "test")
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class SitesData:
    """A consortium, open.

    Attributes:
        config: the run's, without debiasing.
        splits: scans of the splits train and test of every site that is evaluated, by site in the order of names.
        known: the sites that pretrain; the others are unseen.
        initial: weights before the first round.
        table: every scan, with the representation of the initial encoder.
        notes: what took no part and why; baselines add theirs.
        trained: what methods gave, kept for the baselines that build on it.
    """

    config: RunConfig
    splits: Mapping[str, Mapping[str, SiteData]]
    known: tuple[str, ...]
    initial: State
    table: Embeddings
    notes: list[str]
    trained: dict[Method, Trained] = field(default_factory=dict)

    @property
    def training(self) -> dict[str, SiteData]:
        """What each known site trains on: its healthy training scans."""
        return {site: pretraining_scans(self.splits[site]["train"], self.config) for site in self.known}

    def parts(self) -> Iterator[SiteData]:
        """The scans of the table, in its order."""
        return (splits[split] for splits in self.splits.values() for split in TABLE_SPLITS)

    def model(self) -> Pretrainer:
        """Encoder and projector with the initial weights."""
        model = _fresh_model(self.config, self.splits)
        load_strictly(model, self.initial)
        return model

    def embed(self, trained: Trained, device: torch.device) -> Embeddings:
        """The table, each site's scans represented by the weights that it uses, a run's own among them."""
        model = _fresh_model(self.config, self.splits, num_erased(trained.state)).to(device)
        h_NF = []
        for part in filter(len, self.parts()):
            load_strictly(model, trained.at(part.site))
            h_NF.append(embed(model, part, device)[0])
        return replace(self.table, h_NF=torch.cat(h_NF).numpy())

    def for_validation(self) -> "SitesData":
        """The training scans of the known sites alone, a quarter of their subjects as test: to choose settings by."""
        splits: dict[str, dict[str, SiteData]] = {}
        rows: list[NDArray[Any]] = []
        for site in self.known:
            train = self.splits[site]["train"]
            cut = split_by_subject(Manifest(site, train.scans), split_seed=self.config.seed, fractions=INNER_FRACTIONS)
            row_N = np.flatnonzero((self.table.site == site) & (self.table.split == "train"))
            splits[site] = {split: train.select(cut[split].scans.__contains__) for split in TABLE_SPLITS}
            rows += [row_N[[scan in cut[split].scans for scan in train.scans]] for split in TABLE_SPLITS]
        split_N = np.repeat(np.array(TABLE_SPLITS * len(self.known)), [len(row_N) for row_N in rows])
        table = replace(self.table.select(np.concatenate(rows)), split=split_N)
        return _standardised(replace(self, splits=splits, table=table, notes=[], trained={}))


Baseline = Callable[[SitesData, torch.device, Progress], Embeddings]


def open_sites(config: RunConfig) -> SitesData:
    """Open all virtual sites of a run's data; which pretrain and which are evaluated is decided as the server does.

    Args:
        config: of the run; its debiasing plays no part.

    Raises:
        ValueError: the run names no data or hardens updates.
        SiteError, UnusableScansError, TableError: a site cannot open its data.
        RunError: no site can pretrain.
    """
    if config.data.root is None:
        raise ValueError(f"baselines: data.{config.data.PLACES[0]} must name the data, got null. Add it to the overrides.")
    if not isinstance(config.privacy, NoHardening):
        raise ValueError(f"baselines: privacy must be none, as theirs is, got {config.privacy.name!r}. Leave it out.")
    config = config.model_copy(update={"debias": DebiasConfig(name="none")})
    num_sites = len(config.data.source(default_cache_root(), config.data.places).sites())
    virtual = [this_site({"partition-id": number, "num-partitions": num_sites}, config) for number in range(num_sites)]
    held = {site.name: holdings(site, config) for site in virtual}
    results = Results()
    nodes = [Node(number, site, _about(held[site], config)) for number, site in enumerate(held)]
    pretraining, targets = choose_sites(nodes, config, results), choose_targets(nodes, config)
    if config.data.pretrain_sites is not None:
        held = {site: held[site] for site in held if site in {*pretraining.values(), *targets.values()}}
    splits = {site: {split: of_site.splits[split] for split in TABLE_SPLITS} for site, of_site in held.items()}
    model = _fresh_model(config, splits)
    columns = [{split: np.zeros((len(data), 0), np.float32) for split, data in of_site.items()} for of_site in splits.values()]
    table = Embeddings.concatenate([of_site.embeddings(h) for of_site, h in zip(held.values(), columns, strict=True)])
    return _standardised(SitesData(config, splits, tuple(pretraining.values()), model.state_dict(), table, results.notes))


def run_baseline(
    name: str, data: SitesData, *, device: torch.device = CPU, progress: Progress = lambda _done, _rounds: None
) -> Embeddings:
    """One of `BASELINES`: ``data.table`` with the representations that it gives.

    Args:
        name: of the baseline.
        data: from `open_sites`; what baselines share is computed once.
        device: where to train.
        progress: told the rounds done and the rounds in all.

    Raises:
        ValueError: unknown name, or a baseline of tables for images.
    """
    if name not in BASELINES:
        raise ValueError(f"baselines: name must be one of {list(BASELINES)}, got {name!r}.")
    return BASELINES[name](data, device, progress)


def of_method(method: Method) -> Baseline:
    """The baseline that a federated method is, with whatever weights."""

    def trained(data: SitesData, device: torch.device, progress: Progress) -> Embeddings:
        if method not in data.trained:
            data.trained[method] = federate(data.model(), data.training, data.config, method, device=device, progress=progress)
        return data.embed(data.trained[method], device)

    return trained


def raw(data: SitesData, device: torch.device, progress: Progress) -> Embeddings:
    """No encoder: standardised rows, 0 where a value is missing; of volumes the principal components over training scans."""
    del device, progress
    encoder = data.model().encoder
    if isinstance(encoder, RowEncoder):
        return replace(data.table, h_NF=torch.cat([encoder.standardise(_inputs(part)) for part in data.parts()]).numpy())
    fit_NV = torch.cat([_inputs(data.splits[site]["train"]).flatten(1) for site in data.known]).numpy()
    components = PCA(min(MAX_COMPONENTS, len(fit_NV) - 1), svd_solver="full").fit(fit_NV)
    h_NF = np.concatenate([components.transform(_inputs(part).flatten(1).numpy()) for part in filter(len, data.parts())])
    return replace(data.table, h_NF=h_NF.astype(np.float32))


def untrained(data: SitesData, device: torch.device, progress: Progress) -> Embeddings:
    """The encoder before the first round: what the architecture gives for nothing."""
    del device, progress
    return data.table


def local_only(data: SitesData, device: torch.device, progress: Progress) -> Embeddings:
    """The encoder of the site with most healthy training subjects, trained alone for as many steps as it takes with others.

    Of rows it has the standardisation over all sites: what is compared is the training.
    """
    largest = max(data.training.values(), key=_num_subjects)
    trained = federate(data.model(), {largest.site: largest}, data.config, Method(), device=device, progress=progress)
    return data.embed(trained, device)


def pooled(data: SitesData, device: torch.device, progress: Progress) -> Embeddings:
    """All sites' scans in one place, which no hospital allows: in a round as many steps, and views, as all sites take together.

    A batch holds as many subjects as those of the sites on average. The optimiser starts afresh with a round, as everywhere.
    """
    batch_size, steps = pooled_batches(data)
    config = data.config.model_copy(update={"local_steps": steps, "batch_size": batch_size})
    everything = join(list(data.training.values()))
    trained = federate(data.model(), {"pooled": everything}, config, Method(), device=device, progress=progress)
    return data.embed(trained, device)


def pooled_batches(data: SitesData) -> tuple[int, int]:
    """Subjects in a batch of the pooled scans, and batches in a round."""
    sizes = [min(data.config.batch_size, _num_subjects(part)) for part in data.training.values()]
    return round(sum(sizes) / len(sizes)), data.config.local_steps * len(sizes)


def combat_raw(data: SitesData, device: torch.device, progress: Progress) -> Embeddings:
    """`without_scanners` on `raw`: what is done to tables of regions everywhere (Fortin et al. 2018)."""
    return without_scanners(raw(data, device, progress), data.known, data.notes)


def combat_h(data: SitesData, device: torch.device, progress: Progress) -> Embeddings:
    """`without_scanners` on the representations of FedAvg."""
    return without_scanners(run_baseline("fedavg", data, device=device, progress=progress), data.known, data.notes)


def combat_input(data: SitesData, device: torch.device, progress: Progress) -> Embeddings:
    """FedAvg on rows that went through `without_scanners`: the strongest use a consortium of tables has of ComBat.

    A missing value counts as its mean for ComBat and stays missing for the encoder.

    Raises:
        ValueError: the data are volumes, whose voxels ComBat does not harmonise.
    """
    before = data.model().encoder
    if not isinstance(before, RowEncoder):
        raise ValueError(f"combat_input: data must be a table, got {data.config.data.kind!r}. Use combat_raw or combat_h.")
    harmonised_NF = torch.from_numpy(combat_raw(data, device, progress).h_NF)
    rows_NF = harmonised_NF * before.standardise.scale + before.standardise.mean
    rows_NF[torch.cat([_inputs(part) for part in data.parts()]).isnan()] = torch.nan
    splits: dict[str, dict[str, SiteData]] = {site: {} for site in data.splits}
    start = 0
    for part, (site, split) in zip(data.parts(), ((s, t) for s in data.splits for t in TABLE_SPLITS), strict=True):
        assert isinstance(part.store, FeatureRows)
        store = FeatureRows(part.store.names, rows_NF[start : start + len(part)].numpy())
        splits[site][split] = replace(part, positions=tuple(range(len(part))), store=store)
        start += len(part)
    return of_method(Method())(_standardised(replace(data, splits=splits, trained={})), device, progress)


def without_scanners(table: Embeddings, known: Sequence[str], notes: list[str]) -> Embeddings:
    """ComBat with age, sex and diagnosis as covariates, fitted on one scan of each training subject of the known sites.

    A batch is a scanner of a site. Subjects of a batch that the fit does not know stay as they are. The covariates keep the
    fit from taking age for a scanner; applied, they are those of the mean subject, for everybody: the held-out subject's own
    age would enter the result wherever a scanner's spread is not 1, and age is what is predicted from it.

    Args:
        table: representations.
        known: the sites to fit on.
        notes: where what took no part is told.

    Raises:
        ValueError: as `core.combat.fit_combat`.
    """
    batch_N = np.char.add(np.char.add(table.site, "/"), table.scanner)
    male_N = np.where(table.sex == "", np.nan, table.sex == "M")
    patient_N = np.where(np.isin(table.diagnosis, ("control", "patient")), table.diagnosis == "patient", np.nan)
    covariates_NC = np.stack([table.age_years, male_N, patient_N], axis=1)
    wanted_N = np.isin(table.site, list(known)) & (table.split == "train") & np.isfinite(covariates_NC).all(axis=1)
    rows = np.flatnonzero(wanted_N)
    fit = rows[np.unique(table.subjects[rows], return_index=True)[1]]
    names, code_n = np.unique(batch_N[fit], return_inverse=True)
    inside_nC = covariates_NC[fit] - np.stack([covariates_NC[fit][code_n == c].mean(axis=0) for c in code_n])
    varies_C = np.abs(inside_nC).max(axis=0) > 1e-9
    for name, varies in zip(("age", "sex", "diagnosis"), varies_C, strict=True):
        if not varies:
            _note(notes, f"combat: {name} does not vary inside any scanner and is no covariate")
    covariates_nC = torch.from_numpy(covariates_NC[fit][:, varies_C])
    combat = pooled_combat(torch.from_numpy(table.h_NF[fit]), torch.from_numpy(code_n), covariates_nC)
    fitted = {str(names[code]) for _, code in combat.batches}
    unknown = sorted({str(name) for name in batch_N[np.isin(table.site, list(known))]} - fitted)
    if unknown:
        _note(notes, f"combat: scanners without 2 training subjects of known age, sex and diagnosis stay: {', '.join(unknown)}")
    code_of = {str(name): code for code, name in enumerate(names)}
    index_N = combat.indices("pooled", torch.tensor([code_of.get(str(name), -1) for name in batch_N]))
    mean_NC = covariates_nC.mean(dim=0).expand(len(table), -1)
    return replace(table, h_NF=combat(torch.from_numpy(table.h_NF), index_N, mean_NC).numpy())


BASELINES: Mapping[str, Baseline] = {
    "raw": raw,
    "untrained": untrained,
    "local_only": local_only,
    "pooled": pooled,
    "fedavg": of_method(Method()),
    "fedprox": of_method(FedProx()),
    "fedbn": of_method(FedBN()),
    "feddapl": of_method(FedDAPL()),
    "fedharmony": of_method(FedHarmony()),
    "combat_raw": combat_raw,
    "combat_h": combat_h,
    "combat_input": combat_input,
}
"""In the order of the study's table."""

GRIDS: Mapping[str, Sequence[Method]] = {
    "fedprox": [FedProx(proximal_weight=weight) for weight in (0.01, 0.1, 1.0)],
    "feddapl": [FedDAPL(weight=weight) for weight in (0.1, 0.3, 1.0)],
    "fedharmony": [FedHarmony(weight=weight) for weight in (1.0, 5.0, 20.0)],
}
"""Settings of a baseline to choose among, on what `SitesData.for_validation` gives; those of `BASELINES` are one of them."""


@dataclass(frozen=True, eq=False)
class JoinedStore:
    """The inputs of several sites as one store, in the order of the sites and of each site's scans."""

    parts: tuple[SiteData, ...]

    @property
    def num_inputs(self) -> int:
        """As at each site."""
        return self.parts[0].store.num_inputs

    @property
    def shape(self) -> tuple[int, ...]:
        """As at each site."""
        return self.parts[0].store.shape

    @property
    def dtype(self) -> torch.dtype:
        """As at each site."""
        return self.parts[0].store.dtype

    @property
    def unit(self) -> float:
        """As at each site."""
        return self.parts[0].store.unit

    @property
    def signature(self) -> str:
        """As at each site."""
        return self.parts[0].store.signature

    def fill(self, target: Tensor, indices: Sequence[int]) -> None:
        """Copy the inputs of the scans with these numbers."""
        ends = list(accumulate(map(len, self.parts)))
        for row, index in zip(target, indices, strict=True):
            number = bisect_right(ends, index)
            part = self.parts[number]
            part.store.fill(row[None], [part.positions[index - ends[number] + len(part)]])


def join(parts: Sequence[SiteData]) -> SiteData:
    """The scans of several sites as those of one; subjects and scanners of two sites that share a name are not the same."""
    scans = tuple(
        replace(scan, subject=f"{part.site}/{scan.subject}", scanner=f"{part.site}/{scan.scanner}")
        for part in parts
        for scan in part.scans
    )
    return SiteData("pooled", scans, tuple(range(len(scans))), JoinedStore(tuple(parts)))


def _fresh_model(config: RunConfig, splits: Mapping[str, Mapping[str, SiteData]], directions: int = 0) -> Pretrainer:
    return build_pretrainer(
        config.encoder,
        config.embedding_size,
        config.seed,
        num_classes=config.num_classes,
        num_inputs=next(iter(splits.values()))["train"].store.num_inputs,
        spatial_dims=config.data.spatial_dims,
        num_erased=directions,
    )


def _about(held: Holdings, config: RunConfig) -> dict[str, object]:
    """The counts by which the server chooses sites."""
    train = held.splits["train"]
    return {
        "pretraining-subjects": _num_subjects(pretraining_scans(train, config)),
        "classes-in-train": num_classes(labelled(train, config.finetune.target), config.finetune.target),
        "scanners": held.num_scanners,
    }


def _standardised(data: SitesData) -> SitesData:
    """The same with the standardisation of the known sites' training rows, patients' too, and the table that this gives."""
    initial = _fresh_model(data.config, data.splits).state_dict()
    if data.config.data.kind == "table":
        policy = data.config.policy.moment_policy()
        sums = [input_sums(_inputs(data.splits[site]["train"].first_scans()), policy) for site in data.known]
        initial |= standardising(standardisation_from(sums))
    data = replace(data, initial=initial)
    return replace(data, table=data.embed(Trained(initial, {}), CPU))


def _inputs(part: SiteData) -> Tensor:
    return part.inputs(range(len(part)), CPU)


def _num_subjects(part: SiteData) -> int:
    return len({scan.subject for scan in part.scans})


def _note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)
