"""Rounds over named sites: Flower's FedAvg behind our order, checks, quorum, moment exchange and checkpoints."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

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
    MAX_SUBJECTS,
    PRIVACY,
    ExchangeError,
    State,
    content,
    fingerprint,
    pack,
    pack_groups,
    pack_reference,
    received,
    tensor,
    unpack,
    unpack_groups,
    unpack_state,
)
from core.moments import GroupMoments, Reference, concatenate, reference_from
from server.average import aggregator, cap_weights, check_enough
from server.grid import Debt, Pace, Rule
from server.guard import NO_TERMS, UpdateGuard, opposed, read_about, read_count, read_update, scaled, update_norm
from server.resume import TAKES_PART, Resumed, StageState, keep_round, last_round
from server.sites import FORGETFUL, Answer, Failures, Node, RunError, Sites, reasons

log = logging.getLogger("isocenter")

NOTHING_ERASED = (
    "Covariates and scanner must be told apart: two scanners must be told, and a site large enough to tell how features change "
    "with age."
)
MIN_CONTRAST_SUBJECTS = 4
STOP_AT_ONCE = {"not_finite", "code"}
ALONE = {"aggregate": "mean", "max_weight_share": None}
RETRIED = {"incident", "unknown", "worker", "unsent"}
"""Kinds of failure that may pass: a site that fails so is asked once more in the same round."""
WAITED_FOR = {"away", "busy"}
"""Kinds of failure that may pass, if late: a site that fails so is waited for, and asked again, where too few others answered."""
EARLIER = 0.8  # share of a round's deadline after which a site ends its steps, so that its update arrives in time
PRIVACY_NUMBERS = ("epsilon", "epsilon_rdp", "delta", "noise_multiplier", "clip_norm", "sample_rate", "steps")


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
        later: of a run that is gone on with: who is connected and was not at its beginning.
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
        later: Sequence[Node] = (),
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
        self.later = list(later)
        self.trained = trained
        self.saved_as = stage if own is None else f"{stage}-{own}"
        self.patience = None if stage == "pretrain" else config.finetune.patience
        self.best: tuple[float, int, ArrayRecord] | None = None
        # Each site's own model is averaged with no other.
        self.averaging = config.strategy if own is None else config.strategy.model_copy(update=ALONE)
        check_enough(self.averaging, self.quorum, stage)
        self.aggregator = aggregator(self.averaging)
        self.guard = UpdateGuard(config.strategy)
        self.clipped: dict[str, float] = {}
        self.against: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.privacy: dict[str, dict[str, float]] = {}
        self.refused: set[int] = set()
        self.admitted: list[str] = []
        self.turned_away: list[str] = []
        self.arrivals: dict[str, str] = {}
        self.layout = pack(template)[1]
        self.moments: dict[str, dict[str, GroupMoments]] = {}
        self.references: dict[str, Reference] = {}
        self.exchanged: dict[str, dict[str, dict[str, int]]] = {}
        self.exchange_round = 0
        self.holders: set[int] = set()
        self.round_arrays = ArrayRecord()
        self.pace = Pace(config.strategy.deadline_factor, config.strategy.deadline_floor_s)
        self.failed_rounds: Counter[str] = Counter()
        self.excluded: dict[str, str] = {}
        self.bases: dict[int, ArrayRecord] = {}
        self.late: dict[str, str] = {}
        self.round_number = 0
        self.rounds_before = 0
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

    def train(self, initial: State) -> State:
        """All rounds of the stage; the weights that are taken: the last round's, or the best on validation subjects.

        Of a run that is gone on with, the rounds that are not finished.
        """
        arrays, grid = pack(initial)[0], self.sites.grid
        rounds = range(1, self.num_rounds + 1)
        keep = self.config.strategy.keep_checkpoints
        if self.config.resume and (kept := last_round(self.folder, self.saved_as, self.num_rounds, self.patience, keep)):
            arrays = self.take_up(kept)
            rounds = range(kept.round_number + 1, 1 if kept.over else self.num_rounds + 1)
        try:
            for round_number in rounds:
                messages = self.configure_train(round_number, arrays, ConfigRecord(), grid.grid)
                averaged, _ = self.aggregate_train(round_number, self.sites.post(messages))
                assert averaged is not None
                arrays = averaged
        except StopEarly:
            return self.best_state()
        finally:
            grid.rule = Rule()
        return unpack(arrays, self.layout) if self.best is None else self.best_state()

    def state_after(self, round_number: int) -> StageState:
        """What the next round depends on, beside the weights."""
        debias = self.config.debias
        needed = self.stage == "pretrain" and round_number < self.num_rounds and not debias.exchanges_in_round(round_number + 1)
        best = None
        if self.best is not None:
            loss, number, arrays = self.best
            best = (loss, number, None if number == round_number else unpack(arrays, self.layout))
        return StageState(
            late=self.admitted,
            refused=self.turned_away,
            excluded=self.excluded,
            failed_rounds=dict(self.failed_rounds),
            guard=self.guard.state(),
            best=best,
            privacy=self.privacy,
            exchange_round=self.exchange_round,
            moments=self.moments if needed else {},
            references=self.references if needed else {},
            seconds=list(self.pace.seconds),
            traffic=self.sites.traffic,
        )

    def take_up(self, kept: Resumed) -> ArrayRecord:
        """Be as after a finished round, at the sites that are connected now; its weights."""
        weights = {name: kept.weights[name] for name in self.template}
        arrays, self.rounds_before = pack(weights)[0], kept.round_number
        log.info("%s: %d of %d rounds were finished before", self.stage, kept.round_number, self.num_rounds)
        state = kept.state
        if state is not None:
            self.admitted, self.turned_away, self.excluded = state.late, state.refused, state.excluded
            back = [node for node in self.later if node.site in state.late]
            self.met += back
            self.refused |= {node.node_id for node in self.later if node.site in state.refused}
            nodes = {**self.nodes, **{node.node_id: node.site for node in back}}
            nodes = {node: site for node, site in nodes.items() if site not in state.excluded}
            self.nodes = dict(sorted(nodes.items(), key=lambda item: item[1]))
            self.failed_rounds = Counter(state.failed_rounds)
            self.guard.restore(state.guard)
            self.privacy = state.privacy
            self.exchange_round, self.moments, self.references = state.exchange_round, state.moments, state.references
            for seconds in state.seconds:
                self.pace.learn(seconds)
        if kept.best is not None:
            other = None if kept.over or state is None or state.best is None else state.best[2]
            self.best = (*kept.best, arrays if other is None else pack({name: other[name] for name in self.template})[0])
        return arrays

    def wait_for_quorum(self, round_number: int) -> None:
        """Wait for as many sites to be connected as a round needs.

        Raises:
            RunError: they do not come back in time.
        """
        grid, limit_s = self.sites.grid, self.config.strategy.wait_for_sites_s
        connected = grid.wait_until_connected(self.nodes, self.quorum, limit_s)
        if len(connected) < self.quorum:
            missing = sorted(site for node, site in self.nodes.items() if node not in connected)
            raise RunError(
                f"{self.stage}, round {round_number}: {self.quorum} of {len(self.nodes)} sites must be connected, missing for "
                f"{limit_s:.0f} s: {', '.join(missing)}. Finished rounds are kept: start the sites, then `isocenter resume`."
            )

    def rule(self, round_number: int) -> Rule:
        """How long a round waits: for everybody, or with a smaller quorum until a deadline learned from earlier rounds."""
        few = self.quorum < len(self.nodes)
        return Rule(
            enough=self.quorum if few else None,
            deadline_s=self.pace.deadline_s() if few else None,
            round_number=round_number,
            stage=self.saved_as,
        )

    def admit_late(self, round_number: int) -> None:
        """Take in the sites that have connected since the run began, from this round on; who may not is named once."""
        known = {node.node_id for node in self.met} | self.refused
        connected = self.sites.grid.registered()
        new = {node: connected[node] or f"node {node}" for node in sorted(connected) if node not in known}
        if not new:
            return
        task = content(config=ConfigRecord({"fingerprint": fingerprint()}))
        told, failures = self.sites.gather(new, "query.describe", task, read_about)
        self.arrivals = {name: f"not taken in: {text}" for name, (_, text) in failures.items()}
        arrived = [Node(node, str(told[name]["site"]), told[name]) for node, name in new.items() if name in told]
        for node in sorted(arrived, key=lambda node: node.site):
            reason = why_not_late(node, connected[node.node_id], self.met, self.config)
            if reason is None:
                try:
                    self.sites.tell_constants({node.node_id: node.site})
                except RunError as error:
                    reason = str(error)
            if reason is None:
                self.met.append(node)
                self.sites.grid.names[node.node_id] = node.site
                self.admitted.append(node.site)
                self.nodes = dict(sorted({**self.nodes, node.node_id: node.site}.items(), key=lambda item: item[1]))
            elif all(node.site != other.site for other in self.met):
                self.turned_away.append(node.site)
            self.arrivals[node.site if reason is None else new[node.node_id]] = (
                TAKES_PART if reason is None else f"not taken in: {reason}"
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
                f"Checkpoints of finished rounds are in {self.folder.name}; `isocenter resume` goes on after them."
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
            return moments, read_count(answer.metric_records["metrics"], "withheld-scans", where)

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
            hits_SK = tensor(answer.array_records["hits"]["hits"], f"{where}: the hits", ndim=2)
            shape = (len(told[where.removeprefix("site ")].count_S), len(eraser.directions_KF) + 1)
            if tuple(hits_SK.shape) != shape or not hits_SK.isfinite().all() or (hits_SK < 0).any():
                raise ExchangeError(f"{where}: hits must be {shape} finite counts, got {tuple(hits_SK.shape)}.")
            return hits_SK

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
        self.exchanged, self.arrivals, self.late = {}, {}, {}
        self.sites.grid.names.update(self.nodes)
        self.wait_for_quorum(server_round)
        self.sites.grid.rule = self.rule(server_round)
        if self.stage == "pretrain" and self.config.strategy.admit_late:
            self.admit_late(server_round)
        self.sites.tell_constants(self.nodes, self.quorum)
        if self.stage == "pretrain" and self.config.debias.exchanges_in_round(server_round):
            self.moments, self.references = {}, {}
            for space in self.config.debias.spaces:
                self.exchange_moments(server_round, arrays, space)
            self.exchange_round = server_round if self.references else 0
            self.holders.clear()
        self.round_arrays = self.bases[server_round] = arrays
        self.round_number = server_round
        # One update a site and round: who has sent one late counts with that, and is asked again in the next round.
        self.sites.grid.rule = replace(self.sites.grid.rule, late=self.late_updates)
        return self.training_tasks(server_round, self.nodes)

    def late_updates(self) -> dict[int, tuple[Debt, Message]]:
        """Updates of earlier rounds of this stage that came too late for them and may be taken; by node.

        They are of the weights that the present round trains.
        """
        if self.config.strategy.late_updates == "drop":
            return {}
        return {
            node: (debt, reply)
            for node, (debt, reply) in self.sites.grid.late.items()
            if node in self.nodes
            and debt.stage == self.saved_as
            and debt.round_number in self.bases
            and set(self.names_in(debt.round_number)) == set(self.names_in(self.round_number))
        }

    def names_in(self, round_number: int) -> Collection[str]:
        """Names of the weights that a round trains."""
        return self.template if self.trained is None else self.trained(round_number)

    def take_late(self, answers: dict[str, RecordDict], failures: Failures) -> tuple[list[Message], dict[str, int]]:
        """The late updates that count in this round, which join the answers, and the rounds that they are of, by site.

        What is dropped is told.
        """
        taken: list[Message] = []
        rounds: dict[str, int] = {}
        chosen = self.late_updates()
        self.sites.count((reply for _, reply in self.sites.grid.late.values()), "from sites")
        for node, (debt, reply) in self.sites.grid.late.items():
            site = self.nodes.get(node) or self.sites.grid.name(node)
            self.late[site] = f"{debt.words}: dropped"
            if node in chosen and site not in answers:
                read, unread = self.sites.sort({node: site}, [reply])
                answers |= read
                failures |= unread
                if site in read:
                    taken.append(reply)
                    rounds[site] = cast(int, debt.round_number)
                    self.late[site] = f"{debt.words}: taken"
            log.info("%s had answered late, its answer to %s", site, self.late[site])
        self.sites.grid.late.clear()
        return taken, rounds

    def rebase(self, reply: RecordDict, state: State, round_number: int) -> State:
        """Put this round's weights plus a late update in place of the weights that an earlier round's training gave."""
        then, now = (unpack(arrays, self.layout) for arrays in (self.bases[round_number], self.round_arrays))
        moved = {
            name: (now[name].double() + (value.double() - then[name].double())).to(value.dtype)
            if value.is_floating_point()
            else value
            for name, value in state.items()
        }
        reply.array_records["arrays"] = pack(moved)[0]
        return moved

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
            if (deadline_s := self.sites.grid.rule.deadline_s) is not None:
                record.config_records["config"]["deadline-s"] = EARLIER * deadline_s
            messages.append(Message(content=record, message_type=message_type, dst_node_id=node))
        return messages

    def ask_again(self, round_number: int, replies: list[Message]) -> tuple[list[Message], Failures]:
        """The replies, in place of failures that may pass the second ones, and the failures that remain.

        A site that was lost, or is busy with an earlier round, is waited for, unless enough others have answered.
        """
        grid = self.sites.grid
        answers, failures = self.sites.sort(self.nodes, replies)
        lacking = self.quorum - len(answers) - len(self.late_updates())
        passing = FORGETFUL | RETRIED | (WAITED_FOR if lacking > 0 else set())
        failed = {node: site for node, site in self.nodes.items() if failures.get(site, ("",))[0] in passing}
        if not failed or any(kind in STOP_AT_ONCE for kind, _ in failures.values()):
            return replies, failures
        for site in failed.values():
            log.warning("round %d: %s failed and is asked again: %s", round_number, site, failures[site][1])
        if lacking > 0:
            grid.wait_until_connected(failed, lacking, self.config.strategy.wait_for_sites_s)
        if grid.rule.enough is not None:
            # With who has answered, or has sent an earlier update in the meantime.
            grid.rule = replace(grid.rule, enough=max(0, self.quorum - len(answers)))
        self.sites.forget(failed)
        self.sites.tell_constants(failed, 0)
        self.holders.difference_update(failed)
        again = self.sites.post(self.training_tasks(round_number, failed))
        _, failed_again = self.sites.sort(failed, again)
        kept = [reply for reply in replies if grid.node_of(reply) not in failed]
        remaining = {site: failure for site, failure in failures.items() if site not in failed.values()} | failed_again
        return kept + again, remaining

    def exclude(self, round_number: int, failures: Failures) -> None:
        """Count the rounds in a row that a site failed in; who fails too often takes no part any more, with notice.

        A site that still works on an earlier round has not failed in this one, as long as an answer may take.
        """
        grid, limit = self.sites.grid, self.config.strategy.exclude_after
        for node, site in list(self.nodes.items()):
            if site not in failures:
                self.failed_rounds[site] = 0
            elif failures[site][0] != "busy" or grid.owes_s(node) >= self.sites.timeout_s:
                self.failed_rounds[site] += 1
            if self.failed_rounds[site] >= limit and self.quorum < len(self.nodes):
                text = f"failed in {limit} rounds in a row, last in {self.stage} round {round_number}: {failures[site][1]}"
                log.warning("%s takes no part any more: it %s", site, text)
                self.excluded[site] = text
                del self.nodes[node]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check, average in site order, keep a checkpoint, tell what happened."""
        quorum_s = self.sites.grid.quorum_s
        replies, failures = self.ask_again(server_round, list(replies))
        answers, _ = self.sites.sort(self.nodes, replies)
        late, since = self.take_late(answers, failures)
        self.sites.grid.rule = self.rule(server_round)
        if quorum_s is not None and not late:
            self.pace.learn(quorum_s)
        replies += late
        answers = dict(sorted(answers.items()))
        failures = {site: failure for site, failure in failures.items() if site not in answers}
        names = self.names_in(server_round)
        expected = {name: value for name, value in self.template.items() if name in names}
        before, norms, updates = unpack(self.round_arrays, self.layout), dict[str, float](), dict[str, State]()
        for site, answer in list(answers.items()):
            try:
                update = read_update(answer, expected, self.stage, f"site {site}")
                if site in since:
                    update = self.rebase(answer, update, since[site])
                norms[site], updates[site] = update_norm(update, before), update
                if guarantee := read_privacy(answer.config_records["config"], f"site {site}"):
                    self.privacy[site] = guarantee
            except ExchangeError as error:
                failures[site] = ("exchange", str(error))
                del answers[site]
        refused, self.clipped = self.guard.judge(server_round, {site: norms[site] for site in answers}, names)
        for site, text in refused.items():
            failures[site] = ("exchange", text)
            del answers[site]
        self.against = opposed({site: updates.pop(site) for site in answers}, before)
        for site, cosine in self.against.items():
            log.warning("round %d: the update of %s points against most others, cosine %.2f", server_round, site, cosine)
        self.check_quorum(server_round, len(answers), failures)
        self.holders.update(node for node, site in self.nodes.items() if site in answers and site not in since)
        owed = {debt.round_number for debt in self.sites.grid.debts.values() if debt.stage == self.saved_as}
        self.bases = {number: arrays for number, arrays in self.bases.items() if number in owed}
        site_of = {node: site for node, site in self.nodes.items() if site in answers}
        accepted = sorted(
            (reply for reply in replies if self.sites.grid.node_of(reply) in site_of and not reply.has_error()),
            key=lambda reply: site_of[self.sites.grid.node_of(reply)],
        )
        for site, factor in self.clipped.items():
            answers[site].array_records["arrays"] = pack(scaled(unpack_state(answers[site]), before, factor))[0]
        cap = self.averaging.max_weight_share
        self.shares = {} if cap is None else cap_weights(answers, cap)
        # Flower's robust averages take the arrays out of the messages.
        sent = [dict(reply.content.array_records["arrays"]) for reply in accepted]
        averaged, metrics = self.aggregator.aggregate_train(server_round, accepted)
        if averaged is None:
            raise RunError(f"{self.stage}, round {server_round}: the average must not be empty.")
        # What no site trained is what it was, bit for bit.
        state = before | unpack(restore_dtypes(averaged, sent), pack(expected)[1])
        arrays, _ = pack(state)
        validation = self.validate(server_round, arrays) if self.patience is not None else None
        metrics_of = {site: answer.metric_records["metrics"] for site, answer in answers.items()}
        before_round = set(self.excluded)
        self.exclude(server_round, failures)
        line = self.line(server_round, metrics_of, failures, validation)
        if excluded := {site: text for site, text in self.excluded.items() if site not in before_round}:
            line["excluded"] = excluded
        checkpoint = Checkpoint(state | self.sites.constants, self.saved_as, server_round, describe(self.config))
        keep_round(self.folder, checkpoint, self.state_after(server_round), line, self.config.strategy.keep_checkpoints)
        self.tell(line)
        if validation is not None and self.best is not None and server_round - self.best[1] >= cast(int, self.patience):
            log.info("%s: no smaller validation loss since round %d, whose weights are taken", self.stage, self.best[1])
            raise StopEarly
        return arrays, metrics

    def validate(self, round_number: int, arrays: ArrayRecord) -> float | None:
        """Mean validation loss of the round's weights over the sites that may tell it; None where none may. Keeps the best."""

        def read(answer: RecordDict, where: str) -> tuple[int, float]:
            metrics = answer.metric_records["metrics"]
            subjects, loss = read_count(metrics, "subjects", where), metrics["loss"]
            if not isinstance(loss, float) or not np.isfinite(loss):
                raise ExchangeError(f"{where}: a validation loss must be a finite number, got another.")
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

    def line(
        self,
        round_number: int,
        metrics: Mapping[str, MetricRecord],
        failures: Mapping[str, tuple[str, str]],
        validation: float | None = None,
    ) -> dict[str, Any]:
        """What ``rounds.jsonl`` tells of the round."""
        seconds = time.monotonic() - self.round_started
        values = {site: {name: cast(float, v) for name, v in m.items() if name not in NO_TERMS} for site, m in metrics.items()}
        shares = [min(1.0, cast(float, m["waited-seconds"]) / max(cast(float, m["seconds"]), 1e-9)) for m in metrics.values()]
        line: dict[str, Any] = {
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
        if self.late:
            line["late_updates"] = self.late
        planned = self.config.local_steps if self.stage == "pretrain" else self.config.finetune.local_steps
        if early := {site: int(cast(int, m["steps"])) for site, m in metrics.items() if cast(int, m["steps"]) < planned}:
            line["ended_early"] = early
        if self.clipped:
            line["clipped"] = {site: round(factor, 4) for site, factor in self.clipped.items()}
        if self.against:
            line["against"] = self.against
        if self.shares:
            line["shares"] = {site: round(share, 4) for site, share in self.shares.items()}
        if self.privacy:
            line["privacy"] = dict(self.privacy)
        if validation is not None:
            line["validation_loss"] = validation
        if failures:
            line["failures"] = {site: text for site, (_, text) in failures.items()}
        return line

    def tell(self, line: Mapping[str, Any]) -> None:
        """Log a round in one line, and a second where sites ended early."""
        round_number, validation = line["round"], line.get("validation_loss")
        if early := line.get("ended_early"):
            planned = self.config.local_steps if self.stage == "pretrain" else self.config.finetune.local_steps
            log.info("round %d: ended early, at the deadline: %s", round_number, steps_of(early, planned))
        done = round_number - self.rounds_before
        left = (time.monotonic() - self.started) / done * (self.num_rounds - round_number)
        losses = "  ".join(f"{site} {value['loss']:.3f}" for site, value in line["sites"].items() if "loss" in value) or "private"
        log.info(
            "%s  round %d/%d  loss  %s%s  %.1f s, steps waited %.1f %% for data, %s left",
            self.stage,
            round_number,
            self.num_rounds,
            losses,
            "" if validation is None else f"  validation {validation:.3f}",
            line["seconds"],
            100 * max(line["waited_share"].values(), default=0.0),
            f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s",
        )

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Evaluation is a stage of its own, after the rounds."""
        del server_round, arrays, config, grid
        return []


def why_not_late(node: Node, registered: str, met: Sequence[Node], config: RunConfig) -> str | None:
    """Why a site that connected after the start cannot take part in pretraining; None where it can."""
    if registered not in ("", node.site):
        return "a site must call itself what its key was registered for, it has another name. Mend its site.yaml."
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
    sums_3D = tensor(answer.array_records["sums"]["sums"], f"{where}: the sums", dtypes=("<f8",), ndim=2)
    shape = tuple(sums_3D.shape)
    if shape != (3, features) or (sums_3D[0] <= 0).any() or (sums_3D[0] > MAX_SUBJECTS).any() or sums_3D.isinf().any():
        raise ExchangeError(
            f"{where}: sums must be 3 rows of {features} float64 without infinities, of a number of subjects, got {shape}."
        )
    return sums_3D


def read_scanners(answer: RecordDict, features: int, where: str) -> tuple[ScannerSums, int]:
    """A site's `ScannerSums`, checked, and the subjects it withholds."""
    sums = unpack_groups(ScannerSums, answer.array_records["scanners"], features, where)
    return sums, read_count(answer.metric_records["metrics"], "withheld-subjects", where)


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


def steps_of(early: Mapping[str, int], planned: int) -> str:
    """Who did how many steps.

    >>> steps_of({"hill": 3}, 6)
    'hill 3 of 6 steps'
    """
    return ", ".join(f"{site} {steps} of {planned} steps" for site, steps in early.items())


def read_privacy(about: ConfigRecord, where: str) -> dict[str, float]:
    """What DP-SGD guarantees at a site, in numbers, checked; nothing without it, no epsilon without noise."""
    told = {name.removeprefix(PRIVACY): value for name, value in about.items() if name.startswith(PRIVACY)}
    values = {name: value for name, value in told.items() if name in PRIVACY_NUMBERS and isinstance(value, int | float)}
    if len(values) < len(told) or not all(np.isfinite(value) and value >= 0 for value in values.values()):
        raise ExchangeError(f"{where}: a guarantee must be finite numbers of {list(PRIVACY_NUMBERS)}, got others.")
    return values


def restore_dtypes(averaged: ArrayRecord, sent: Sequence[Mapping[str, Array]]) -> ArrayRecord:
    """The average in the dtypes that were sent: Flower turns integer arrays to float64, ours must agree over sites instead."""
    arrays = ArrayRecord()
    for name in averaged:
        values = [received(record[name], name) for record in sent]
        if np.issubdtype(values[0].dtype, np.floating):
            arrays[name] = Array(received(averaged[name], name).astype(values[0].dtype))
        elif all(np.array_equal(value, values[0]) for value in values):
            arrays[name] = Array(values[0])
        else:
            raise RunError(f"average: {name} buffers must be equal at all sites, they differ. Keep counters out of the model.")
    return arrays
