"""The evaluation stage: from single scans where sites share them, else from sums alone; who asks whom, no arithmetic."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from core.config import RunConfig
from core.erasure import Eraser
from core.evaluation.age_sums import AgeErrors, FoldMoments, RidgeCandidates, fit_ridge
from core.evaluation.class_sums import ClassCounts, ClassMoments, LogisticGradient, SiteProbe
from core.evaluation.embeddings import Embeddings
from core.evaluation.federated_server import (
    Scorer,
    check_codes,
    fit_classes,
    gathered,
    group_directions,
    num_seen,
    refused,
)
from core.evaluation.federated_site import FLOORS, SITE_PROBES, GroupMeans, ProbeErrors, ProbeMoments
from core.evaluation.intervals import Evaluation, NotEvaluableError
from core.evaluation.outcomes import Results
from core.evaluation.predictions import Predictions, evaluate_predictions
from core.evaluation.probes import chance_and_floor, evaluate
from core.evaluation.score_sums import SCORE_BINS, ScoreCounts
from core.evaluation.sums import random_directions
from core.exchange import (
    ExchangeError,
    State,
    content,
    fingerprint,
    of_message,
    pack,
    pack_eraser,
    pack_message,
    unpack_embeddings,
    unpack_message,
    unpack_predictions,
)
from core.moments import Reference, reference_from
from server.sites import Failures, Node, RunError, Sites, reasons
from server.strategy import read_sums

log = logging.getLogger("isocenter")

Read = TypeVar("Read")
How = Literal["per_scan", "sums", "none"]
Stages = dict[str, tuple[State, Eraser | None]]
"""What is evaluated: weights, and what is done to their h, by stage as in `Evaluation`."""


def choose_evaluation(nodes: list[Node], evaluated: Mapping[int, str], config: RunConfig) -> tuple[How, list[str]]:
    """What the evaluation is made of, and a note where sites leave no choice."""
    name = config.evaluation.name
    if name != "auto":
        return name, ["Nothing was evaluated: evaluation=none."] if name == "none" else []
    alone = [node.site for node in nodes if node.node_id in evaluated and not node.about["share-per-scan"]]
    if not alone:
        return "per_scan", []
    each = f"{', '.join(alone)}: {'each ' if len(alone) > 1 else ''}keeps the results of single scans at home"
    return "sums", [f"{each} (share-per-scan is not true), so all figures are from sums and none is of a single scan."]


# From single scans.


def evaluate_scans(
    sites: Sites, evaluated: Mapping[int, str], known: Mapping[int, str], stages: Stages, config: RunConfig
) -> tuple[dict[str, Embeddings], Results]:
    """Probe the representations that sites share: site, scanner and age at the known sites, age at the others."""
    maps: dict[str, Embeddings] = {}
    evaluations: list[Evaluation] = []
    notes: list[str] = []
    names = set(known.values())
    shared: Embeddings | None = None
    for stage, (state, eraser) in stages.items():
        log.info("evaluating the %s encoder on held-out subjects", stage)
        if eraser is None:
            shared, refused_by = collect_embeddings(sites, evaluated, state)
            notes += refused_by
        if shared is None:
            continue
        # An eraser is of the stage before it.
        embeddings = shared if eraser is None else replace(shared, h_NF=eraser(torch.from_numpy(shared.h_NF)).numpy())
        maps[stage] = embeddings
        results = [evaluate(embeddings, stage=stage, regime="federated", seed=config.seed, known_sites=names)]
        if stage == "pretrained":
            seen = embeddings.select(np.isin(embeddings.site, sorted(names)))
            results.append(chance_and_floor(seen, regime="federated", seed=config.seed))
        for found, remarks in results:
            evaluations += found
            notes += remarks
    return maps, (evaluations, notes)


def collect_embeddings(sites: Sites, nodes: Mapping[int, str], state: State) -> tuple[Embeddings | None, list[str]]:
    """Representations from the sites that share them, and notes that name the others."""
    arrays, layout = pack(state)
    task = content(arrays=arrays, config=ConfigRecord({"fingerprint": fingerprint(), "layout": layout}))
    answers, failures = sites.ask(nodes, "query.embed", lambda _: task)
    parts = []
    for site, answer in answers.items():
        parts.append(unpack_embeddings(of_message(answer.array_records, "embeddings", f"site {site}"), f"site {site}"))
        if set(parts[-1].site.tolist()) != {site}:
            raise RunError(f"site {site}: embeddings must be its own, got another site's name. Ask the site for its log.")
    return Embeddings.concatenate(parts) if parts else None, refusals(failures)


@dataclass(frozen=True)
class Scored:
    """What a stage of fine-tuning told on held-out scans: the figures, and the predictions they are of."""

    evaluations: list[Evaluation]
    predictions: Predictions | None


def score_predictions(
    sites: Sites, nodes: Mapping[int, str], targets: Mapping[int, str], states: Mapping[int, State], stage: str, config: RunConfig
) -> tuple[Scored, list[str]]:
    """Score fine-tuned classifiers on the held-out scans of the sites that share them, at other sites than the targets too.

    A model of one site alone is scored there; what all target sites have learnt together is scored everywhere.
    """
    alone = config.finetune.where == "local"
    shared = next(iter(states.values()))

    def task_of(node: int) -> RecordDict:
        arrays, layout = pack(states.get(node, shared))
        # No scan of a site that is called unseen has been trained on.
        unseen = node not in targets and nodes[node] in config.data.unseen_sites
        return content(arrays=arrays, config=about(layout=layout, unseen=unseen))

    answers, failures = sites.ask(targets if alone else nodes, "query.predict", task_of)
    notes = refusals(failures)
    if not answers:
        return Scored([], None), notes
    target = config.finetune.target
    parts = []
    for site, answer in answers.items():
        record = of_message(answer.array_records, "predictions", f"site {site}")
        parts.append(unpack_predictions(record, target, f"site {site}"))
        if set(parts[-1].site.tolist()) - {site}:
            raise RunError(f"site {site}: predictions must be its own, got another site's name. Ask the site for its log.")
    joined = Predictions.concatenate(parts)
    regime = "local-only" if alone else "federated"
    known = set(targets.values())
    found, more = evaluate_predictions(joined, stage=stage, regime=regime, seed=config.seed, known_sites=known)
    return Scored(found, joined), notes + more


def refusals(failures: Failures) -> list[str]:
    """A site that keeps its scans' results at home is noted; any other failure stops the run."""
    broken = {site: failure for site, failure in failures.items() if failure[0] != "policy"}
    if broken:
        raise RunError(f"evaluation: every site must answer, {len(broken)} did not.{reasons(broken)}")
    return [f"{site}: {text}" for site, (_, text) in failures.items()]


# From sums.


def about(**more: str | bool | int | list[str]) -> ConfigRecord:
    """The settings of a question."""
    return ConfigRecord({"fingerprint": fingerprint(), **more})


def ask_all(
    sites: Sites,
    nodes: Mapping[int, str],
    query: str,
    task_of: Callable[[int], RecordDict],
    read: Callable[[RecordDict, str], Read],
) -> dict[str, Read]:
    """What sites answer, read; a site that cannot answer stops the run."""
    answers, failures = sites.ask(nodes, query, task_of)
    values: dict[str, Read] = {}
    for site, answer in answers.items():
        try:
            values[site] = read(answer, site)
        except (ExchangeError, KeyError, ValueError) as error:
            failures[site] = ("exchange", str(error))
    if failures:
        raise RunError(f"evaluation: every site must answer, {len(failures)} did not.{reasons(failures)}")
    return values


@dataclass(frozen=True)
class SumsEvaluation:
    """One stage of an encoder, evaluated from sums.

    Attributes:
        sites: correspondence with them.
        known: the sites that pretrained, by node: those that site, scanner and age are probed at.
        unseen: the other evaluated sites.
        config: the run's.
        features: width of h.
        stage: as in `Evaluation`.
    """

    sites: Sites
    known: Mapping[int, str]
    unseen: Mapping[int, str]
    config: RunConfig
    features: int
    stage: str

    @property
    def nodes(self) -> dict[int, str]:
        """Every evaluated site."""
        return {**self.known, **self.unseen}

    def run(self, state: State, eraser: Eraser | None = None, *, references: bool = False) -> Results:
        """Every figure that the sites' policies allow, and notes on the others.

        Args:
            state: the encoder's weights.
            eraser: what is done to h before the probes see it.
            references: whether chance and the floor of age and sex are wanted too.
        """
        notes: list[str] = []
        try:
            reference, columns = self.embed(state, eraser)
            directions_KF = self.choose_directions(reference)
        except NotEvaluableError as reason:
            return [], [f"Not evaluated: {self.stage}: {reason}"]
        seen = num_seen(columns, len(directions_KF))
        names = ["age", *SITE_PROBES, *(FLOORS if references else ()), "diagnosis"]
        if seen == 0:
            names = [name for name in names if "nearest" in name]
            told_columns = ", ".join(f"{site} {count}" for site, count in sorted(columns.items()))
            notes.append(
                "Not evaluated: age, diagnosis and discriminants of site: at least two sites must have the subjects that a "
                f"covariance of one direction and age needs, got columns that sites can tell: {told_columns}."
            )
        wanted = dict.fromkeys(self.known, names)
        wanted |= {node: ["diagnosis"] for node in self.unseen if seen}
        told = self.project(reference, directions_KF, seen, wanted)
        candidates: RidgeCandidates | None = None
        probes: dict[str, SiteProbe] = {}
        for name in names:
            parts = {site: moments[name] for site, moments in told.items() if name in moments}
            try:
                if name == "age":
                    candidates = fit_ridge(cast(dict[str, FoldMoments], parts))
                else:
                    probes[name] = self.fit(name, cast(dict[str, ClassMoments], parts))
            except NotEvaluableError as reason:
                notes += refused(name, reason, list(told))
        errors = self.count_errors(candidates, probes, told)
        evaluations: list[Evaluation] = []
        for name in (*(["age"] if candidates is not None else []), *probes):
            parts_of = {site: found[name] for site, found in errors.items() if name in found}
            try:
                found, more = self.score(name, probes.get(name), parts_of, references)
            except NotEvaluableError as reason:
                notes += refused(name, reason, list(told))
                continue
            evaluations += found
            fitted = candidates.notes if name == "age" and candidates is not None else probes[name].notes
            notes += gathered(name, [*fitted, *more], list(told))
        if evaluations:
            notes.append(self.about_directions(seen, len(directions_KF)))
        return evaluations, notes

    def embed(self, state: State, eraser: Eraser | None) -> tuple[Reference, dict[str, int]]:
        """Have every site embed its scans; what probes standardise by, and the columns of a covariance by known site."""
        arrays, layout = pack(state)
        more = {} if eraser is None else {"eraser": pack_eraser(eraser)}

        def task_of(node: int) -> RecordDict:
            return content(arrays=arrays, config=about(layout=layout, known=node in self.known), **more)

        def read(answer: RecordDict, site: str) -> tuple[Tensor, int]:
            columns = answer.metric_records["metrics"]["columns"]
            if not isinstance(columns, int) or not 0 <= columns <= self.features + 1:
                raise ExchangeError(f"site {site}: columns must be a number of at most {self.features + 1}, got {columns!r}.")
            return read_sums(answer, self.features, f"site {site}"), columns

        told = ask_all(self.sites, self.nodes, "query.features", task_of, read)
        at_known = {site: told[site] for site in self.known.values()}
        reference = reference_from([sums for sums, _ in at_known.values()])
        if reference is None:
            raise NotEvaluableError("probes from sums: at least one site must tell the sums of its representations, got none.")
        return reference, {site: columns for site, (_, columns) in at_known.items()}

    def choose_directions(self, reference: Reference) -> Tensor:
        """The directions that probes see, from the sites' group means, those that differ most first, or drawn."""
        count = min(self.config.evaluation.features, self.features)
        if self.config.evaluation.directions == "random":
            return random_directions(self.features, count, seed=self.config.seed)
        task = content(config=about(), **{"probes-reference": pack_message(reference)})

        def read(answer: RecordDict, site: str) -> GroupMeans:
            record = answer.array_records["probes-groups"]
            return unpack_message(GroupMeans, record, f"site {site}", mean_GF=(None, self.features))

        groups = ask_all(self.sites, self.nodes, "query.groups", lambda _: task, read)
        return group_directions(groups, set(self.known.values()), count)

    def project(
        self, reference: Reference, directions_KF: Tensor, seen: int, wanted: Mapping[int, list[str]]
    ) -> dict[str, dict[str, ProbeMoments]]:
        """Have the sites keep what the probes see, and tell the moments of the probes asked of each."""
        records = {
            "probes-reference": pack_message(reference),
            "probes-directions": ArrayRecord({"directions": Array(directions_KF.contiguous().numpy())}),
        }
        nodes = {node: site for node, site in self.nodes.items() if node in wanted}
        names_at = {site: wanted[node] for node, site in nodes.items()}

        def read(answer: RecordDict, site: str) -> dict[str, ProbeMoments]:
            found: dict[str, ProbeMoments] = {}
            for name in names_at[site]:
                record, where = answer.array_records[f"probes-{name}"], f"site {site}"
                if name == "age":
                    found[name] = unpack_message(FoldMoments, record, where, mean_GD=(None, seen + 1))
                else:
                    width = None if name in FLOORS else len(directions_KF) if "nearest" in name else seen
                    found[name] = unpack_message(ClassMoments, record, where, mean_CF=(None, width))
                check_codes(found[name], site)
            return found

        def task_of(node: int) -> RecordDict:
            return content(config=about(probes=wanted[node], seen=seen), **records)

        return ask_all(self.sites, nodes, "query.probes", task_of, read)

    def fit(self, name: str, parts: Mapping[str, ClassMoments]) -> SiteProbe:
        """A probe of classes; a logistic one of site or scanner asks the sites that tell its classes, once a step."""
        if self.config.evaluation.site_probe == "lda" or name == "diagnosis" or "nearest" in name:
            return fit_classes(name, parts, None)
        nodes = {node: site for node, site in self.known.items() if site in parts and len(parts[site].scanner_C)}

        def ask(probe: SiteProbe, class_weight_K: Tensor) -> dict[str, LogisticGradient]:
            weights = ArrayRecord({"weights": Array(class_weight_K.numpy())})
            task = content(config=about(), **{f"probes-{name}": pack_message(probe), "probes-weights": weights})
            shape = (len(probe.classes), probe.weight_KF.shape[1] + 1)

            def read(answer: RecordDict, site: str) -> LogisticGradient:
                part = unpack_message(LogisticGradient, answer.array_records["probes-gradient"], f"site {site}")
                if len(part.gradient_KD) and tuple(part.gradient_KD.shape) != shape:
                    raise ExchangeError(f"site {site}: gradient must have shape {shape}, got {tuple(part.gradient_KD.shape)}.")
                return part

            return ask_all(self.sites, nodes, "query.gradient", lambda _: task, read)

        return fit_classes(name, {site: part for site, part in parts.items() if site in nodes.values()}, ask)

    def count_errors(
        self,
        candidates: RidgeCandidates | None,
        probes: Mapping[str, SiteProbe],
        told: Mapping[str, Mapping[str, ProbeMoments]],
    ) -> dict[str, dict[str, ProbeErrors]]:
        """The probes' errors at the sites; of a diagnosis where both labels are told."""

        def scored(node: int) -> dict[str, SiteProbe]:
            labels = cast(ClassMoments | None, told.get(self.nodes[node], {}).get("diagnosis"))
            both = labels is not None and len(labels.scanner_C) == 2
            return {n: p for n, p in probes.items() if (both if n == "diagnosis" else node in self.known)}

        nodes = {node: site for node, site in self.nodes.items() if candidates is not None or scored(node)}
        node_of = {site: node for node, site in nodes.items()}
        age = {} if candidates is None else {"probes-age": pack_message(candidates)}
        packed = {name: pack_message(probe) for name, probe in probes.items()}

        def task_of(node: int) -> RecordDict:
            asked = {f"probes-{name}": packed[name] for name in scored(node)}
            return content(config=about(known=node in self.known), **age, **asked)

        def read(answer: RecordDict, site: str) -> dict[str, ProbeErrors]:
            found: dict[str, ProbeErrors] = {}
            where, records = f"site {site}", answer.array_records
            if candidates is not None:
                folds, alphas = len(candidates.folds), len(candidates.alpha_A)
                found["age"] = unpack_message(AgeErrors, records["probes-age"], where, fold_absolute_LA=(folds, alphas))
            for name, probe in scored(node_of[site]).items():
                if name == "diagnosis":
                    found[name] = read_scores(answer, site)
                else:
                    shape = (None, len(probe.classes))
                    found[name] = unpack_message(ClassCounts, records[f"probes-{name}"], where, count_CK=shape)
                    check_codes(found[name], site, probe)
            return found

        return ask_all(self.sites, nodes, "query.errors", task_of, read) if nodes else {}

    def score(self, name: str, probe: SiteProbe | None, parts: Mapping[str, ProbeErrors], references: bool) -> Results:
        """The figures of a probe from its errors at the sites."""
        scorer = Scorer(stage="age_sex_floor" if name in FLOORS else self.stage, seed=self.config.seed)
        if probe is None:
            errors = cast(dict[str, AgeErrors], parts)
            known, unseen = ({s: errors[s] for s in nodes.values()} for nodes in (self.known, self.unseen))
            return scorer.age(known, unseen)
        if name == "diagnosis":
            return scorer.diagnosis("auc_lda", cast(dict[str, ScoreCounts], parts))
        chance = references and name in SITE_PROBES
        metric = f"balanced_accuracy_{'nearest' if 'nearest' in name else self.config.evaluation.site_probe}"
        return scorer.classes(name.partition("_")[0], metric, probe, cast(dict[str, ClassCounts], parts), chance=chance)

    def about_directions(self, seen: int, count: int) -> str:
        """What the probes saw, as a note."""
        chosen = {
            "between_groups": "in which means of groups of scans (one scanner, neighbouring ages, one diagnosis) differ most",
            "random": "drawn at random without data",
        }[self.config.evaluation.directions]
        covariances = f"; those that need a covariance see the first {seen}, of which two sites can tell one" if seen else ""
        return (
            f"{self.stage}: probes from sums see {count} of {self.features} directions of the representation "
            f"(evaluation.features={self.config.evaluation.features}), those {chosen}{covariances}."
        )


def evaluate_sums(
    sites: Sites, evaluated: Mapping[int, str], known: Mapping[int, str], stages: Stages, config: RunConfig, features: int
) -> Results:
    """Every stage from sums, chance and floor beside the pretrained one."""
    evaluations: list[Evaluation] = []
    notes: list[str] = []
    unseen = {node: site for node, site in evaluated.items() if node not in known}
    for stage, (state, eraser) in stages.items():
        log.info("evaluating the %s encoder on held-out subjects, from sums", stage)
        of_stage = SumsEvaluation(sites, known, unseen, config, features, stage)
        found, remarks = of_stage.run(state, eraser, references=stage == "pretrained")
        evaluations += found
        notes += remarks
    return evaluations, notes


def score_counted(sites: Sites, nodes: Mapping[int, str], states: Mapping[int, State], stage: str, config: RunConfig) -> Results:
    """Score fine-tuned classifiers of two classes from histograms of their scores at the sites."""
    target = config.finetune.target
    if target.kind != "binary":
        return [], [
            f"Not evaluated: {stage}: from sums a target must be of two classes, {target.task} is {target.kind}. Its figures "
            "need sites that share the results of single scans."
        ]

    def task_of(node: int) -> RecordDict:
        arrays, layout = pack(states[node])
        return content(arrays=arrays, config=about(layout=layout))

    counts = ask_all(sites, nodes, "query.scores", task_of, read_scores)
    scorer = Scorer(stage=stage, seed=config.seed)
    try:
        found, notes = scorer.diagnosis("auc_binned", counts)
    except NotEvaluableError as reason:
        return [], [f"Not evaluated: {stage}: {reason}"]
    found += scorer.accuracy("balanced_accuracy_binned", counts)
    regime = "local-only" if config.finetune.where == "local" else "federated"
    return [replace(e, task=target.task, regime=regime) for e in found], gathered("diagnosis", notes, list(counts))


def read_scores(answer: RecordDict, site: str) -> ScoreCounts:
    """A site's histogram of scores; of no bins where it withholds them."""
    counts = unpack_message(ScoreCounts, answer.array_records["probes-diagnosis"], f"site {site}", count_2E=(2, None))
    if counts.count_2E.shape[1] not in (0, SCORE_BINS):
        raise ExchangeError(f"site {site}: scores must be in {SCORE_BINS} bins, got {counts.count_2E.shape[1]}.")
    return counts
