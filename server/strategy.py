"""Rounds over named sites: Flower's FedAvg behind our order, checks, quorum, moment exchange and checkpoints."""

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from core.checkpoint import Checkpoint, save_checkpoint
from core.config import RunConfig, describe
from core.erasure import Eraser, ScannerSums, fewest_directions, fit_eraser
from core.exchange import (
    PRIVACY,
    ExchangeError,
    State,
    check_like,
    content,
    fingerprint,
    pack,
    pack_groups,
    pack_reference,
    unpack,
    unpack_groups,
    unpack_state,
)
from core.moments import GroupMoments, Reference, concatenate, reference_from
from server.sites import FORGETFUL, Answer, Node, RunError, Sites, reasons, sort_replies

log = logging.getLogger("isocenter")

NOTHING_ERASED = (
    "Covariates and scanner must be told apart: two scanners must be told, and a site large enough to tell how features change "
    "with age."
)
MIN_CONTRAST_SUBJECTS = 4
STOP_AT_ONCE = {"not_finite", "code"}
PRIVACY_NUMBERS = ("epsilon", "epsilon_rdp", "delta", "noise_multiplier", "clip_norm", "sample_rate", "steps")
NO_TERMS = {"num-examples", "seconds", "waited-seconds"}  # of a training answer's metrics; all others are terms of the loss


class StopEarly(Exception):  # noqa: N818 - nothing is wrong
    """The validation loss has not fallen for as many rounds as the run waits; `SiteRounds.best` is what is taken."""


class SiteRounds(FedAvg):
    """Weighted federated averaging over named sites.

    Replies are checked and summed in the order of the site names, so that neither arrival nor node numbers matter. A round
    without quorum, or with a loss that is not finite, stops the run with the reasons; the last checkpoint stays.

    Args:
        config: the run's.
        stage: ``pretrain`` or a stage of fine-tuning.
        sites: correspondence with them.
        nodes: site name by Flower's node number.
        template: a state with the names, shapes and dtypes that every reply must have, without constants.
        folder: where checkpoints and ``rounds.jsonl`` go.
        widths: number of features of the spaces ``h`` and ``z``, for what is exchanged about them.
        met: every site that has told about itself, in pretraining or not; who connects later may be taken in.
        own: the site whose own model it is, where each has one; part of the checkpoint's name.
        trained: names of the weights that a round trains, by its number, which is what sites send back; None: all of them.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: str,
        sites: Sites,
        nodes: Mapping[int, str],
        template: Mapping[str, Tensor],
        folder: Path,
        widths: Mapping[str, int] = MappingProxyType({}),
        met: Sequence[Node] = (),
        own: str | None = None,
        trained: Callable[[int], Collection[str]] | None = None,
    ) -> None:
        super().__init__(min_train_nodes=1, min_available_nodes=1)
        self.config = config
        self.stage = stage
        self.sites = sites
        self.nodes = dict(sorted(nodes.items(), key=lambda item: item[1]))
        self.template = template
        self.folder = folder
        self.widths = widths
        self.num_rounds = config.num_rounds if stage == "pretrain" else config.finetune.num_rounds
        self.met = list(met)
        self.trained = trained
        self.saved_as = stage if own is None else f"{stage}-{own}"
        self.patience = None if stage == "pretrain" else config.finetune.patience
        self.best: tuple[float, int, ArrayRecord] | None = None
        self.privacy: dict[str, dict[str, float]] = {}
        self.refused: set[int] = set()
        self.arrivals: dict[str, str] = {}
        self.layout = pack(template)[1]
        self.moments: dict[str, dict[str, GroupMoments]] = {}
        self.references: dict[str, Reference] = {}
        self.exchanged: dict[str, dict[str, dict[str, int]]] = {}
        self.exchange_round = 0
        self.holders: set[int] = set()
        self.round_arrays = ArrayRecord()
        self.round_started = self.started = time.monotonic()

    def task(self, round_number: int, arrays: ArrayRecord, space: str = "", **more: ArrayRecord) -> RecordDict:
        """What a site is sent for a round."""
        about = ConfigRecord({"round": round_number, "stage": self.stage, "layout": self.layout, "fingerprint": fingerprint()})
        if space:
            about["space"] = space
        return content(arrays=arrays, config=about, **more)

    @property
    def quorum(self) -> int:
        """How many sites must answer, of those that take part by now."""
        return min(self.config.strategy.min_sites or len(self.nodes), len(self.nodes))

    def admit_late(self, round_number: int) -> None:
        """Take in the sites that have connected since the run began, from this round on; who may not is named once."""
        known = {node.node_id for node in self.met} | self.refused
        new = {node: f"node {node}" for node in sorted(self.sites.grid.get_node_ids()) if node not in known}
        if not new:
            return
        task = content(config=ConfigRecord({"fingerprint": fingerprint()}))
        told, failures = self.sites.gather(new, "query.describe", task, lambda answer, _: dict(answer.config_records["config"]))
        self.arrivals = {name: f"not taken in: {text}" for name, (_, text) in failures.items()}
        arrived = [Node(node, str(told[name]["site"]), told[name]) for node, name in new.items() if name in told]
        for node in sorted(arrived, key=lambda node: node.site):
            reason = why_not_late(node, self.met, self.config)
            if reason is None:
                try:
                    self.sites.tell_constants({node.node_id: node.site})
                except RunError as error:
                    reason = str(error)
            if reason is None:
                self.met.append(node)
                self.nodes = dict(sorted({**self.nodes, node.node_id: node.site}.items(), key=lambda item: item[1]))
            self.arrivals[node.site if reason is None else f"node {node.node_id}"] = (
                "takes part from now on" if reason is None else f"not taken in: {reason}"
            )
        self.refused |= set(new) - {node.node_id for node in self.met}
        for name, text in self.arrivals.items():
            log.info("round %d: %s connected late and %s", round_number, name, text.replace("not taken", "is not taken"))

    def check_quorum(self, round_number: int, answers: int, failures: Mapping[str, tuple[str, str]]) -> None:
        """Stop the run when too few sites answered or one says that it cannot go on."""
        fatal = any(kind in STOP_AT_ONCE for kind, _ in failures.values())
        if fatal or answers < self.quorum:
            raise RunError(
                f"{self.stage}, round {round_number}: at least {self.quorum} of {len(self.nodes)} sites must answer "
                f"without a fatal error, {answers} did.{reasons(failures)}\n"
                f"Checkpoints of finished rounds are in {self.folder.name}."
            )
        for site, (_, text) in failures.items():
            log.warning("round %d goes on without %s: %s", round_number, site, text)

    def gather(
        self, round_number: int, query: str, task: RecordDict, read: Callable[[RecordDict, str], Answer]
    ) -> dict[str, Answer]:
        """What the sites answer to the same question, by site, with the quorum of a round."""
        values, failures = self.sites.gather(self.nodes, query, task, read)
        self.check_quorum(round_number, len(values), failures)
        return values

    def agree_on_reference(self, round_number: int, arrays: ArrayRecord, space: str, subjects: str) -> Reference | None:
        """The reference of a space under the round's weights, from the sums of every site that tells them.

        They are over the subjects that are told about next: of "groups" with moments, or of "scanners".
        """
        width = self.widths[space]
        task = self.task(round_number, arrays, space)
        task.config_records["config"]["subjects"] = subjects
        sums = self.gather(round_number, "query.sums", task, lambda answer, where: read_sums(answer, width, where))
        return reference_from(list(sums.values()))

    def exchange_moments(self, round_number: int, arrays: ArrayRecord, space: str) -> None:
        """Agree on a space's reference, then ask every site for its moments under it, all with the round's weights."""
        reference = self.agree_on_reference(round_number, arrays, space, "groups")
        if reference is None:
            log.warning("round %d: every site withholds its sums, no moments of %s are exchanged", round_number, space)
            return
        self.references[space] = reference
        task = self.task(round_number, arrays, space, reference=pack_reference(reference))

        def read(answer: RecordDict, where: str) -> tuple[GroupMoments, int]:
            moments = unpack_groups(GroupMoments, answer.array_records["moments"], self.widths[space], where)
            return moments, cast(int, answer.metric_records["metrics"]["withheld-scans"])

        told = self.gather(round_number, "query.moments", task, read)
        self.moments[space] = {site: moments for site, (moments, _) in told.items()}
        self.exchanged[space] = {
            site: {"groups": len(moments), "withheld_scans": withheld} for site, (moments, withheld) in told.items()
        }
        log.info(
            "round %d: moments of %s exchanged: %s",
            round_number,
            space,
            ", ".join(f"{site} {len(moments)} groups ({withheld} scans withheld)" for site, (moments, withheld) in told.items()),
        )

    def learn_eraser(self, arrays: ArrayRecord) -> Eraser | None:
        """The eraser of site and scanner behind the trained encoder, from the sums of every site."""
        reference = self.agree_on_reference(self.num_rounds, arrays, "h", "scanners")
        if reference is None:
            return None
        task = self.task(self.num_rounds, arrays, "h", reference=pack_reference(reference))
        width = self.widths["h"]
        told = self.gather(self.num_rounds, "query.scanners", task, lambda answer, where: read_scanners(answer, width, where))
        eraser = eraser_from(told, reference, self.config, "h")
        target = self.config.debias.erase_to
        if eraser is None or target == "all":
            return eraser
        # Behind an encoder that already sees inputs without site, most directions are noise: there each must be needed.
        if target == "auto" and eraser.takes_little and "input" not in self.config.erased_spaces:
            return eraser
        sums_of = {site: sums for site, (sums, _) in told.items()}
        return self.only_what_is_needed(eraser, sums_of, task, target if isinstance(target, float) else None)

    def only_what_is_needed(
        self, eraser: Eraser, told: Mapping[str, ScannerSums], task: RecordDict, target: float | None
    ) -> Eraser:
        """The eraser with the fewest directions that reach the target (None: the floor), by what sites count of themselves."""
        first_row, row = {}, 0
        for site, sums in told.items():
            first_row[site], row = row, row + len(sums.count_S)
        nodes = {node: site for node, site in self.nodes.items() if site in told and len(told[site].count_S)}
        means_SF = torch.cat([sums.mean_SF for sums in told.values()])
        candidates = {"means": means_SF, "directions": eraser.directions_KF}
        arrays = ArrayRecord({name: Array(value.double().numpy()) for name, value in candidates.items()})
        about = task.config_records["config"]
        shared = {name: task.array_records[name] for name in ("arrays", "reference")} | {"candidates": arrays}

        def question(node: int) -> RecordDict:
            return content(**shared, config=ConfigRecord({**about, "first": first_row[nodes[node]]}))

        def read(answer: RecordDict, where: str) -> Tensor:
            hits = answer.array_records["hits"]["hits"].numpy()
            shape = (len(told[where.removeprefix("site ")].count_S), len(eraser.directions_KF) + 1)
            if hits.shape != shape or not np.isfinite(hits).all() or (hits < 0).any():
                raise ExchangeError(f"{where}: hits must be {shape} finite counts, got {hits.shape}.")
            return torch.from_numpy(hits.copy())

        values, failures = self.sites.gather(nodes, "query.hits", question, read)
        self.check_quorum(self.num_rounds, len(values) + len(self.nodes) - len(nodes), failures)
        count_S = torch.cat([told[site].count_S for site in values])
        needed, course_K = fewest_directions(torch.cat(list(values.values())), count_S, target)
        log.info(
            "h: %d of %d directions needed; nearest-mean site balanced accuracy by directions erased: %s",
            *(needed, len(eraser.directions_KF), " ".join(f"{value:.2f}" for value in course_K.tolist())),
        )
        return replace(eraser, directions_KF=eraser.directions_KF[:needed])

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One task a site; with debiasing, the moments of all the other sites' groups beside it."""
        del config, grid
        self.round_started = time.monotonic()
        self.exchanged, self.arrivals = {}, {}
        if self.stage == "pretrain" and self.config.strategy.admit_late:
            self.admit_late(server_round)
        self.sites.tell_constants(self.nodes)
        if self.stage == "pretrain" and self.config.debias.exchanges_in_round(server_round):
            self.moments, self.references = {}, {}
            for space in self.config.debias.spaces:
                self.exchange_moments(server_round, arrays, space)
            self.exchange_round = server_round if self.references else 0
            self.holders.clear()
        self.round_arrays = arrays
        return self.training_tasks(server_round, self.nodes)

    def training_tasks(self, round_number: int, nodes: Mapping[int, str]) -> list[Message]:
        """One task a node; with it the moments of all the other sites' groups, where the node does not hold them yet."""
        messages = []
        for node, site in nodes.items():
            more: dict[str, ArrayRecord] = {}
            if node not in self.holders:
                more = {f"reference-{space}": pack_reference(reference) for space, reference in self.references.items()}
                for space, told in self.moments.items():
                    others = [moments for other, moments in told.items() if other != site and len(moments)]
                    if others:
                        more[f"moments-{space}"] = pack_groups(concatenate(others))
            message_type = "train.pretrain" if self.stage == "pretrain" else "train.finetune"
            record = self.task(round_number, self.round_arrays, "", **more)
            record.config_records["config"]["exchange"] = self.exchange_round
            messages.append(Message(content=record, message_type=message_type, dst_node_id=node))
        self.sites.count(messages, "to sites")
        return messages

    def ask_forgetful(self, round_number: int, replies: list[Message]) -> list[Message]:
        """The replies, in place of failures the second ones of sites that had lost what they were told."""
        _, failures = sort_replies(self.nodes, replies, 0.0)
        lost = {node: site for node, site in self.nodes.items() if failures.get(site, ("",))[0] in FORGETFUL}
        if not lost:
            return replies
        log.warning("round %d: %s had lost what they were told and are asked again", round_number, ", ".join(lost.values()))
        self.sites.forget(lost)
        self.sites.tell_constants(lost)
        self.holders.difference_update(lost)
        messages = self.training_tasks(round_number, lost)
        again = list(self.sites.grid.send_and_receive(messages, timeout=self.sites.timeout_s))
        self.sites.count(again, "from sites")
        return [reply for reply in replies if reply.metadata.src_node_id not in lost] + again

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, average in site order, keep a checkpoint, tell what happened."""
        replies = list(replies)
        self.sites.count(replies, "from sites")
        replies = self.ask_forgetful(server_round, replies)
        answers, failures = sort_replies(self.nodes, replies, time.monotonic() - self.round_started)
        names = self.template if self.trained is None else self.trained(server_round)
        expected = {name: value for name, value in self.template.items() if name in names}
        for site, answer in list(answers.items()):
            try:
                check_like(unpack_state(answer), expected, f"site {site}")
                check_metrics(answer.metric_records["metrics"], f"site {site}")
                if guarantee := read_privacy(answer.config_records["config"], f"site {site}"):
                    self.privacy[site] = guarantee
            except (ExchangeError, KeyError) as error:
                failures[site] = ("exchange", str(error))
                del answers[site]
        self.check_quorum(server_round, len(answers), failures)
        self.holders.update(node for node, site in self.nodes.items() if site in answers)
        site_of = {node: site for node, site in self.nodes.items() if site in answers}
        accepted = sorted(
            (reply for reply in replies if reply.metadata.src_node_id in site_of),
            key=lambda reply: site_of[reply.metadata.src_node_id],
        )
        averaged, metrics = super().aggregate_train(server_round, accepted)
        if averaged is None:
            raise RunError(f"{self.stage}, round {server_round}: the average must not be empty.")
        # What no site trained is what it was, bit for bit.
        state = unpack(self.round_arrays, self.layout) | unpack(restore_dtypes(averaged, accepted), pack(expected)[1])
        arrays, _ = pack(state)
        checkpoint = Checkpoint(state | self.sites.constants, self.saved_as, server_round, describe(self.config))
        save_checkpoint(self.folder / "checkpoints", checkpoint, keep=self.config.strategy.keep_checkpoints)
        validation = self.validate(server_round, arrays) if self.patience is not None else None
        told = {site: answer.metric_records["metrics"] for site, answer in answers.items()}
        self.tell(server_round, told, failures, validation)
        if validation is not None and self.best is not None and server_round - self.best[1] >= cast(int, self.patience):
            log.info("%s: no smaller validation loss since round %d, whose weights are taken", self.stage, self.best[1])
            raise StopEarly
        return arrays, metrics

    def validate(self, round_number: int, arrays: ArrayRecord) -> float | None:
        """Mean validation loss of the round's weights over the sites that may tell it; None where none may. Keeps the best."""

        def read(answer: RecordDict, where: str) -> tuple[int, float]:
            metrics = answer.metric_records["metrics"]
            subjects, loss = metrics["subjects"], metrics["loss"]
            if not isinstance(subjects, int) or subjects < 0 or not isinstance(loss, float) or not np.isfinite(loss):
                raise ExchangeError(f"{where}: a validation loss must be finite and of a number of subjects, got another.")
            return subjects, loss

        told = self.gather(round_number, "query.validation", self.task(round_number, arrays), read)
        whole = sum(subjects for subjects, _ in told.values())
        if whole == 0:
            if round_number == 1:
                log.warning("%s: no site has as many validation subjects as a group needs; no round stops early", self.stage)
            return None
        loss = sum(subjects * loss for subjects, loss in told.values()) / whole
        if self.best is None or loss < self.best[0]:
            self.best = (loss, round_number, arrays)
        return loss

    def best_state(self) -> State:
        """The weights of the smallest validation loss, whose checkpoint then is the only one of the stage."""
        assert self.best is not None
        _, round_number, arrays = self.best
        state = unpack(arrays, self.layout)
        checkpoint = Checkpoint(state | self.sites.constants, self.saved_as, round_number, describe(self.config))
        save_checkpoint(self.folder / "checkpoints", checkpoint, keep=1, taken=True)
        return state

    def tell(
        self,
        round_number: int,
        metrics: Mapping[str, MetricRecord],
        failures: Mapping[str, tuple[str, str]],
        validation: float | None = None,
    ) -> None:
        """Append the round to ``rounds.jsonl`` and log one line."""
        now = time.monotonic()
        seconds = now - self.round_started
        values = {site: {name: cast(float, v) for name, v in m.items() if name not in NO_TERMS} for site, m in metrics.items()}
        shares = [min(1.0, cast(float, m["waited-seconds"]) / max(cast(float, m["seconds"]), 1e-9)) for m in metrics.values()]
        line: dict[str, object] = {
            "stage": self.saved_as,
            "round": round_number,
            "seconds": round(seconds, 3),
            "trained_seconds": {site: round(cast(float, m["seconds"]), 3) for site, m in metrics.items()},
            "waited_share": dict(zip(metrics, (round(share, 4) for share in shares), strict=True)),
            "sites": values,
        }
        if self.exchanged:
            line["exchange"] = self.exchanged
        if self.arrivals:
            line["late"] = self.arrivals
        if self.privacy:
            line["privacy"] = dict(self.privacy)
        if validation is not None:
            line["validation_loss"] = validation
        if failures:
            line["failures"] = {site: text for site, (_, text) in failures.items()}
        with (self.folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        left = (now - self.started) / round_number * (self.num_rounds - round_number)
        losses = "  ".join(f"{site} {value['loss']:.3f}" for site, value in values.items() if "loss" in value) or "private"
        log.info(
            "%s  round %d/%d  loss  %s%s  %.1f s, steps waited %.1f %% for data, %s left",
            self.stage,
            round_number,
            self.num_rounds,
            losses,
            "" if validation is None else f"  validation {validation:.3f}",
            seconds,
            100 * max(shares, default=0.0),
            f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s",
        )

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Evaluation is a stage of its own, after the rounds."""
        del server_round, arrays, config, grid
        return []


def why_not_late(node: Node, met: Sequence[Node], config: RunConfig) -> str | None:
    """Why a site that connected after the start cannot take part in pretraining; None where it can."""
    if any(node.site == other.site for other in met):
        return "a node must have a name of its own, another has this one. Mend its node config."
    if config.data.pretrain_sites is not None:
        return "a site that joins must be one that may pretrain, data.pretrain_sites names others."
    if any(node.about["inputs"] != other.about["inputs"] for other in met):
        return "its inputs must be those of the other sites, they are others. Mend its data or data.columns."
    subjects = int(str(node.about["pretraining-subjects"]))
    if subjects < MIN_CONTRAST_SUBJECTS:
        return f"healthy training subjects must be at least {MIN_CONTRAST_SUBJECTS} to contrast, got {subjects}."
    return None


def read_sums(answer: RecordDict, features: int, where: str) -> Tensor:
    """A site's `feature_sums`, (3, D), checked."""
    sums = answer.array_records["sums"]["sums"].numpy()
    if sums.shape != (3, features) or sums.dtype != np.float64 or (sums[0] <= 0).any() or np.isinf(sums).any():
        raise ExchangeError(f"{where}: sums must be 3 rows of {features} float64 without infinities, got {sums.shape}.")
    return torch.from_numpy(sums.copy())


def read_scanners(answer: RecordDict, features: int, where: str) -> tuple[ScannerSums, int]:
    """A site's `ScannerSums`, checked, and the subjects it withholds."""
    sums = unpack_groups(ScannerSums, answer.array_records["scanners"], features, where)
    return sums, cast(int, answer.metric_records["metrics"]["withheld-subjects"])


def eraser_from(
    told: Mapping[str, tuple[ScannerSums, int]], reference: Reference, config: RunConfig, space: str
) -> Eraser | None:
    """The eraser from what the sites tell of a space; what is withheld, and why nothing is erased, in the log."""
    parts = [sums for sums, _ in told.values() if len(sums.count_S)]
    eraser = fit_eraser(parts, reference, max_directions=config.debias.erase_directions)
    withheld = ", ".join(f"{site} {count}" for site, (_, count) in told.items() if count) or "none"
    slopes = sum(part.tells_slopes for part in parts)
    if eraser is None:
        log.warning("%s: nothing is erased. %s Subjects withheld: %s", space, NOTHING_ERASED, withheld)
    else:
        log.info(
            "%s: %d directions of %d scanners erased; slopes told by %d of %d sites; subjects withheld: %s",
            *(space, len(eraser.directions_KF), sum(len(part.count_S) for part in parts), slopes, len(told), withheld),
        )
    return eraser


def check_metrics(metrics: MetricRecord, where: str) -> None:
    """Refuse metrics that are no finite numbers, or a weight that is not positive."""
    bad = [name for name, value in metrics.items() if isinstance(value, list) or not np.isfinite(value)]
    bad += [name for name in sorted(NO_TERMS) if name not in bad and not cast(float, metrics[name]) >= 0]
    if bad or metrics["num-examples"] == 0:
        raise ExchangeError(f"{where}: metrics must be finite numbers and num-examples positive, got {bad or ['num-examples']}.")


def read_privacy(about: ConfigRecord, where: str) -> dict[str, float]:
    """What DP-SGD guarantees at a site, in numbers, checked; nothing without it, no epsilon without noise."""
    told = {name.removeprefix(PRIVACY): value for name, value in about.items() if name.startswith(PRIVACY)}
    values = {name: value for name, value in told.items() if name in PRIVACY_NUMBERS and isinstance(value, int | float)}
    if len(values) < len(told) or not all(np.isfinite(value) and value >= 0 for value in values.values()):
        raise ExchangeError(f"{where}: a guarantee must be finite numbers of {list(PRIVACY_NUMBERS)}, got others.")
    return values


def restore_dtypes(averaged: ArrayRecord, replies: list[Message]) -> ArrayRecord:
    """The average in the dtypes that were sent: Flower turns integer arrays to float64, ours must agree over sites instead."""
    arrays = ArrayRecord()
    sent = [reply.content.array_records["arrays"] for reply in replies]
    for name in averaged:
        values = [record[name].numpy() for record in sent]
        if np.issubdtype(values[0].dtype, np.floating):
            arrays[name] = Array(averaged[name].numpy().astype(values[0].dtype))
        elif all(np.array_equal(value, values[0]) for value in values):
            arrays[name] = Array(values[0])
        else:
            raise RunError(f"average: {name} buffers must be equal at all sites, they differ. Keep counters out of the model.")
    return arrays
