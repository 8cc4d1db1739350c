"""Flower's ServerApp: a run from the first site's hello to the report, read top-down."""

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from core.checkpoint import Checkpoint, load_strictly, pseudonym_key, save_checkpoint, write_atomically
from core.config import ConfigError, RunConfig, describe, load_config
from core.erasure import Eraser
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation, write_metrics
from core.evaluation.predictions import Predictions
from core.evaluation.reading import ROLES
from core.exchange import PER_SCAN, ExchangeError, State, content, fingerprint, pack
from core.finetuning import prediction_notes, privacy_notes, trained_names
from core.log_lines import StandardStream
from core.memory import keep_freed_memory
from core.models import Classifier, Encoder, build_classifier, build_pretrainer, num_erased, ordered_constants, split_constants
from core.moments import Reference
from core.report import write_report
from core.report_record import RunRecord
from core.run_file import read_run
from core.scaling import standardisation_from, standardising
from core.settings import DpSgd
from core.stages import STAGES, StageName
from core.starts import Start, StartError, load_start, read_start
from server.average import check_enough
from server.board import Board, tell_stopped
from server.evaluation import Stages, choose_evaluation, evaluate_scans, evaluate_sums, score_counted, score_predictions
from server.grid import NOTICE_S, UNREACHABLE, PatientGrid, ask_again_soon
from server.guard import read_about
from server.resume import (
    check_begun,
    keep_begun,
    read_begun,
    read_lines,
    run_folder,
    sites_before,
    traffic_before,
    untrained_state,
)
from server.sites import Answer, Failures, Node, RunError, Sites, reasons
from server.strategy import MIN_CONTRAST_SUBJECTS, NOTHING_ERASED, SiteRounds, eraser_from, read_scanners, read_sums

log = logging.getLogger("isocenter")
app = ServerApp()


@dataclass
class Results:
    """What the evaluation of a run found, why something is missing, and which sites were excluded on the way."""

    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)

    def add(self, found: tuple[list[Evaluation], list[str]]) -> None:
        """Take in evaluations and notes."""
        self.evaluations += found[0]
        self.notes += [note for note in found[1] if note not in self.notes]

    def leave_out(self, excluded: Mapping[str, str]) -> None:
        """Note the sites that a stage excluded: they take no part in what follows, and are not called unseen."""
        self.excluded |= excluded
        self.notes += [f"{site} takes no part any more: it {text}" for site, text in excluded.items()]

    def remaining(self, nodes: Mapping[int, str]) -> dict[int, str]:
        """Those of the nodes whose site was not excluded."""
        return {node: site for node, site in nodes.items() if site not in self.excluded}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Carry out the run; what stops it is told in the log before Flower calls the run failed.

    The server's arithmetic is light, and its threads would only wait for one another where the machine has other work; with one,
    sums are the same on every machine.
    """
    speak()
    torch.set_num_threads(1)
    keep_freed_memory()
    ask_again_soon()
    try:
        carry_out(grid, context)
    except (RunError, ConfigError, ExchangeError, StartError) as error:
        log.error("stopped: %s", error)
        raise


def carry_out(grid: Grid, context: Context) -> None:
    """Pretrain, fine-tune, evaluate, report."""
    overrides = str(context.run_config.get("overrides", ""))
    config = load_config(overrides)
    start = None if config.start is None or config.resume else read_start(config.start, config.start_keys)
    if config.finetune.label_maps is not None and config.finetune.stages:
        raise RunError("finetune.label_maps: segmentation is for `isocenter finetune` alone; set it to null, or finetune=none.")
    with run_folder(config, overrides) as folder:
        try:
            carry_out_in(folder, grid, config, start)
        except UNREACHABLE:
            raise  # the run has not failed: who started it goes on with it when the SuperLink is back
        except Exception as error:
            tell_stopped(folder, str(error).partition("\n")[0])
            raise


def carry_out_in(folder: Path, grid: Grid, config: RunConfig, start: Start | None) -> None:
    """The run in its folder; one that is gone on with does again whatever it does not keep, with the same results."""
    begun = read_begun(folder) if config.resume else None
    kept = None if begun is None else untrained_state(folder, begun)
    if config.resume and kept is None and config.start is not None:
        start = read_start(config.start, config.start_keys)
    sites = Sites(PatientGrid(grid), config.strategy.round_timeout_s, config.strategy.max_message_mb)
    results = Results()
    if begun is None:
        nodes, later = wait_for_sites(sites, config), list[Node]()
    else:
        connected = wait_for_sites(sites, config, sites_before(folder, begun))
        check_begun(folder, begun, connected)
        nodes, later = ([node for node in connected if (node.site in begun.sites) is there] for there in (True, False))
        sites.traffic.update(traffic_before(folder))
        results.notes += resumed_notes(folder, config)
    board = begin_board(folder, sites, [*nodes, *later], config)
    pretraining, targets = choose_sites(nodes, config, results), choose_targets(nodes, config)
    tell_targets(targets, config, results)
    check_average(config, pretraining, targets)
    everyone = {node.node_id: node.site for node in nodes}
    evaluated = everyone if config.data.pretrain_sites is None else {**pretraining, **targets}
    num_inputs = agreed_inputs(nodes, config.data.inputs)

    begin_notes: list[str] = []
    if config.data.inputs == "table":
        if kept is None:
            begin_notes = prepare_inputs(sites, pretraining, num_inputs, config, start)
        else:
            sites.set_constants(pretraining, ordered_constants(kept))
        sites.tell_constants(evaluated)
    results.notes += begin_notes if begun is None else begun.notes
    model = build_pretrainer(
        config.encoder,
        config.embedding_size,
        config.seed,
        num_classes=config.num_classes,
        num_inputs=num_inputs,
        spatial_dims=config.data.spatial_dims,
        num_erased=num_erased(sites.constants),
    )
    if kept is not None:
        load_strictly(model, kept)
    elif start is not None:
        begin_with(model.encoder, start, sites)
    untrained, _ = split_constants({name: value.clone() for name, value in model.state_dict().items()})
    about = Checkpoint(untrained | sites.constants, "untrained", 0, describe(config))
    save_checkpoint(folder / "checkpoints", about, keep=1)
    keep_begun(folder, nodes, about.state, begin_notes, begun)
    widths = {"h": model.encoder.num_features, "z": config.embedding_size}
    strategy = SiteRounds(config, "pretrain", sites, pretraining, untrained, folder, widths, nodes, later)
    pretrained = strategy.train(untrained) if config.num_rounds else untrained
    nodes, pretraining = sorted(strategy.met, key=lambda node: node.site), strategy.nodes
    results.leave_out(strategy.excluded)
    # A site that was admitted late may be a target too.
    targets = results.remaining(choose_targets(nodes, config))
    evaluated = results.remaining(evaluated | pretraining | targets)
    eraser = erase(strategy, pretrained, folder, config, results) if "h" in config.erased_spaces else None

    if config.evaluation.name != "none":
        sites.grid.wait_until_connected(evaluated, len(evaluated), config.strategy.wait_for_sites_s)
    how, notes = choose_evaluation(nodes, evaluated, config)
    results.add(([], notes))
    stages: Stages = {"untrained": (untrained, None)} if config.num_rounds else {}
    stages["pretrained"] = (pretrained, None)
    if eraser is not None:
        stages["erased"] = (pretrained, eraser)
    maps: dict[str, Embeddings] = {}
    if how == "per_scan":
        maps, found = evaluate_scans(sites, evaluated, pretraining, stages, config)
        results.add(found)
    elif how == "sums":
        results.add(evaluate_sums(sites, evaluated, pretraining, stages, config, widths["h"]))

    predictions: dict[str, Predictions] = {}
    for stage in config.finetune.stages if targets else ():
        classifier = build_classifier(
            config.encoder,
            config.finetune.target.num_outputs,
            config.seed,
            num_inputs=num_inputs,
            spatial_dims=config.data.spatial_dims,
            num_erased=num_erased(sites.constants),
            zero_head=isinstance(config.privacy, DpSgd),
        )
        initial, _ = split_constants({name: value.clone() for name, value in classifier.state_dict().items()})
        if STAGES[stage].start == "pretrained":
            initial |= {name: value for name, value in pretrained.items() if name.startswith("encoder.")}
        finetuned = finetuned_at(targets, stage, classifier, initial, sites, folder, config, results)
        targets = results.remaining(targets)
        if how == "per_scan":
            labelled = {node.node_id: node.site for node in nodes if cast(int, node.about["classes-in-train"]) >= 2}
            asked = results.remaining(labelled) | targets
            scored, notes = score_predictions(sites, asked, targets, finetuned, stage, config)
            results.add((scored.evaluations, notes))
            if scored.predictions is not None:
                predictions[stage] = scored.predictions
        elif how == "sums":
            results.add(score_counted(sites, targets, finetuned, stage, config))

    finish(folder, config, sites, nodes, pretraining, targets, maps, predictions, results)
    board.write("finished")


class MarkedLines(logging.Formatter):
    """Every line begins with our mark, by which the launcher tells it from Flower's own."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, marked."""
        return "\n".join(f"isocenter| {line}" for line in record.getMessage().splitlines())


def speak() -> None:
    """Send our lines to standard output, where Flower picks them up for `flwr run --stream`."""
    handler = StandardStream("stdout")
    handler.setFormatter(MarkedLines())
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def wait_for_sites(sites: Sites, config: RunConfig, before: Collection[str] = ()) -> list[Node]:
    """Every connected site, in the order of their names, once as many are connected as the run needs.

    Args:
        sites: correspondence with them.
        config: the run's.
        before: of a run that is gone on with: the sites that had taken part. All are waited for, and without a quorum needed.

    Raises:
        RunError: too few connected in time, a site could not open its data, or two nodes call themselves the same.
    """
    wanted = {*(config.data.pretrain_sites or ()), *config.data.unseen_sites, *(config.data.target_sites or ())}
    needed = max(len(wanted), config.strategy.min_sites or len(before) or 1)
    deadline = time.monotonic() + config.strategy.wait_for_sites_s
    connected, told = -1, 0.0
    nodes: dict[int, Node] = {}
    while True:
        while len(node_ids := sorted(sites.grid.get_node_ids())) < needed:
            if len(node_ids) != connected or time.monotonic() - told > NOTICE_S:
                connected, told = len(node_ids), time.monotonic()
                missed = missing_of(sites, {*wanted, *before})
                log.info("waiting for sites: %d of %d connected%s, %.0f s left", connected, needed, missed, deadline - told)
            if time.monotonic() > deadline:
                raise RunError(
                    f"sites: {needed} must connect within {config.strategy.wait_for_sites_s:g} s, {len(node_ids)} did"
                    f"{missing_of(sites, {*wanted, *before})}. Start the missing SuperNodes, or name fewer in data.*_sites."
                )
            time.sleep(1)
        nodes = {node: about for node, about in nodes.items() if node in node_ids}
        if new := [node for node in node_ids if node not in nodes]:
            log.info("%d sites connected; they read and check their scans", len(node_ids))
            found, failures = describe_sites(sites, new)
            nodes |= {node.node_id: node for node in found}
        missing = {*before} - {node.site for node in nodes.values()}
        few, late = config.strategy.min_sites is None or len(nodes) < needed, time.monotonic() > deadline
        # Who was lost on the way, as by a reboot, may come back.
        final = late or any(kind != "away" for kind, _ in failures.values())
        if failures and final and (missing or (few and not before)):
            raise RunError(f"sites: every site must open its data before a run, {len(failures)} could not.{reasons(failures)}")
        if late or not (missing or (failures and few)):
            break
        if new:
            who = "the sites that took part before" if missing else "sites that were lost on the way"
            log.info("waiting for %s: %s", who, ", ".join(sorted(missing or failures)))
        time.sleep(1)
    for left_out, (_, text) in failures.items():
        log.warning("the run begins without %s: %s", left_out, text)
    names = sorted(node.site for node in nodes.values())
    if len(set(names)) < len(names):
        raise RunError(f"sites: every node must have a name of its own, got {names}. Mend --node-config.")
    if absent := (wanted | (missing if config.strategy.min_sites is None else set())) - set(names):
        raise RunError(f"sites: {sorted(absent)} must be connected, got {names}. Start them or mend data.*_sites.")
    if missing:
        log.warning("going on without sites that took part before: %s", ", ".join(sorted(missing)))
    for node in (ordered := sorted(nodes.values(), key=lambda node: node.site)):
        problems = ", ".join(cast(list[str], node.about["problems"])) or "none"
        log.info(
            "%s: %s scans of %s subjects on %s scanners, computes on %s, problems: %s",
            *(node.site, *(node.about[key] for key in ("scans", "subjects", "scanners", "device")), problems),
        )
    return ordered


def missing_of(sites: Sites, expected: Collection[str]) -> str:
    """Who of those that are expected is not connected, in words, as far as keys were registered under names."""
    names = set(sites.grid.registered().values())
    missing = sorted(set(expected) - names)
    return f", missing: {', '.join(missing)}" if missing and "" not in names else ""


def describe_sites(sites: Sites, node_ids: Collection[int]) -> tuple[list[Node], Failures]:
    """What nodes tell about themselves, and the failures of those that could not."""
    task = content(config=ConfigRecord({"fingerprint": fingerprint()}))
    registered = sites.grid.registered()
    named = {node: registered.get(node) or f"node {node}" for node in node_ids}
    answers, failures = sites.gather(named, "query.describe", task, read_about)
    nodes = [Node(node, str(answers[name]["site"]), answers[name]) for node, name in named.items() if name in answers]
    for node in nodes:
        if (name := registered.get(node.node_id)) not in ("", None, node.site):
            raise RunError(f"sites: a site must be called what its key was registered for, {name}, got {node.site}.")
    return nodes, failures


def resumed_notes(folder: Path, config: RunConfig) -> list[str]:
    """What a report must say of a run that was gone on with."""
    if not isinstance(config.privacy, DpSgd):
        return []
    return [
        f"The run was gone on with after a stop (times: {read_run(folder).resumed}), and the round that the stop cut short was "
        "trained again. Its noise was drawn anew, and the guarantee told here counts every round once; a site's audit log counts "
        "each time the run was gone on with in full."
    ]


def agreed_inputs(nodes: list[Node], kind: str) -> int:
    """The number of channels of images, or of features of a table, that all sites hold.

    Raises:
        RunError: sites hold different features, or images of different grids, channels or masks.
    """
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(str(node.about["inputs"]), []).append(node)
    if len(groups) > 1:
        told = "; ".join(f"{part[0].about['num-inputs']} at {', '.join(node.site for node in part)}" for part in groups.values())
        what, remedy = {
            "table": ("features must have the same names", "Name the common ones with data.columns.features=[...]"),
            "images": (
                "images must have the same channels, grid and mask",
                "Give every site the same file as data.mask, or none",
            ),
        }[kind]
        raise RunError(f"sites: {what} at every site, got {len(groups)} different sets: {told}. {remedy}.")
    return int(str(nodes[0].about["num-inputs"]))


def choose_sites(nodes: list[Node], config: RunConfig, results: Results) -> dict[int, str]:
    """Node numbers and names of the pretraining sites.

    Where the configuration names no pretraining sites, those with too few healthy subjects for a contrast are left out, noted,
    and count as unseen.

    Raises:
        RunError: a named pretraining site has too few healthy subjects, or no site has enough.
    """
    data = config.data
    small = [node for node in nodes if int(str(node.about["pretraining-subjects"])) < MIN_CONTRAST_SUBJECTS]
    if data.pretrain_sites is None:
        left_out = [node for node in small if node.site not in data.unseen_sites]
        pretraining = [node for node in nodes if node.site not in data.unseen_sites and node not in left_out]
        if left_out:
            told = ", ".join(f"{node.site} ({node.about['pretraining-subjects']})" for node in left_out)
            text = (
                f"Left out of pretraining, for want of {MIN_CONTRAST_SUBJECTS} healthy training subjects to contrast: {told}. "
                "They count as unseen."
            )
            log.warning("%s", text)
            results.notes.append(text)
    else:
        pretraining = [node for node in nodes if node.site in data.pretrain_sites]
        for node in small:
            if node.site in data.pretrain_sites:
                raise RunError(
                    f"site {node.site}: healthy training subjects must be at least {MIN_CONTRAST_SUBJECTS} to contrast, "
                    f"got {node.about['pretraining-subjects']}. Leave it out with data.pretrain_sites=[...]."
                )
    if not pretraining:
        raise RunError(
            f"sites: at least one must have {MIN_CONTRAST_SUBJECTS} healthy training subjects and not be in data.unseen_sites, "
            f"got none of {len(nodes)}."
        )
    if config.debias.weight > 0 and config.debias.exchange_every == 0:
        alone = [node.site for node in pretraining if node.about["scanners"] == 1]
        if alone:
            log.warning("FairKL is exactly zero at one-scanner sites without exchange: %s", ", ".join(alone))
    log.info("pretraining at %s", ", ".join(node.site for node in pretraining))
    return {node.node_id: node.site for node in pretraining}


def choose_targets(nodes: Sequence[Node], config: RunConfig) -> dict[int, str]:
    """Node numbers and names of the target sites: those the configuration names, or all that hold patients and controls.

    Raises:
        RunError: a named one that is to be fine-tuned at has one class only.
    """
    named = config.data.target_sites
    if named is None:
        return {node.node_id: node.site for node in nodes if node.about["classes-in-train"] == 2}
    targets = [node for node in nodes if node.site in named]
    for node in targets if config.finetune.stages else ():
        if node.about["classes-in-train"] != 2:
            raise RunError(
                f"site {node.site}: a target site must hold patients and controls, it has "
                f"{node.about['classes-in-train']} of these. Leave it out with data.target_sites=[...]."
            )
    return {node.node_id: node.site for node in targets}


def prepare_inputs(sites: Sites, nodes: Mapping[int, str], num_inputs: int, config: RunConfig, start: Start | None) -> list[str]:
    """Agree on the constants that an encoder of rows begins with, and tell them to the pretraining sites; what is to be noted.

    A start has its own. Otherwise mean and scale of every feature come from the sums of every site. Where site and scanner are
    erased from the inputs, the sites then tell sums of the standardised features by scanner, and at last the spread of what is
    left of each feature.

    Raises:
        RunError: a site did not answer, or no site tells enough of a feature.
    """
    if start is not None and start.encoder:
        _, own = split_constants(start.encoder)
        if {name: value.shape[-1] for name, value in own.items()} != dict.fromkeys(own, num_inputs) or not own:
            raise RunError(
                f"start: {start.name} must be an encoder of the {num_inputs} features that the sites hold, it is of others. "
                "Name the same columns with data.columns.features."
            )
        sites.set_constants(nodes, own)
        return []

    def from_all(query: str, read: Callable[[RecordDict, str], Answer]) -> dict[str, Answer]:
        about = ConfigRecord({"fingerprint": fingerprint(), "space": "input"})
        values, failures = sites.gather(nodes, query, content(config=about), read)
        if failures:
            raise RunError(f"standardisation: every site must answer, {len(failures)} did not.{reasons(failures)}")
        return values

    def standardisation() -> Reference:
        sums = from_all("query.inputs", lambda answer, where: read_sums(answer, num_inputs, where))
        withheld = [site for site, sums_3I in sums.items() if bool(sums_3I[2].isnan().all())]
        if withheld:
            log.info("standardisation without the spread of %s, who withhold it", ", ".join(withheld))
        try:
            return standardisation_from(list(sums.values()))
        except ValueError as error:
            raise RunError(str(error)) from None

    reference = standardisation()
    sites.set_constants(nodes, standardising(reference))
    if "input" not in config.erased_spaces:
        return []
    told = from_all("query.scanners", lambda answer, where: read_scanners(answer, num_inputs, where))
    eraser = eraser_from(told, reference, config, "input")
    if eraser is None:
        return [f"Nothing was erased from the inputs. {NOTHING_ERASED}"]
    sites.set_constants(nodes, standardising(reference, eraser))
    sites.set_constants(nodes, standardising(reference, eraser, standardisation()))
    return []


def check_average(config: RunConfig, pretraining: Mapping[int, str], targets: Mapping[int, str]) -> None:
    """Refuse before the first round a way to average that the sites of a later stage would be too few for."""
    fewest = config.strategy.min_sites
    if config.num_rounds:
        check_enough(config.strategy, min(fewest or len(pretraining), len(pretraining)), "pretraining")
    if config.finetune.stages and targets and config.finetune.where == "federated":
        check_enough(config.strategy, min(fewest or len(targets), len(targets)), "fine-tuning")


def tell_targets(targets: Mapping[int, str], config: RunConfig, results: Results) -> None:
    """Say where fine-tuning will be; that there is nowhere to do it is noted."""
    if not config.finetune.stages:
        return
    log.info("fine-tuning at %s", ", ".join(targets.values()) or "no site")
    if not targets:
        results.notes.append(
            f"Nothing was fine-tuned: no site has training scans of two classes of {config.finetune.target.task}."
        )


def begin_with(encoder: Encoder, start: Start, sites: Sites) -> None:
    """Put the start's weights into the encoder; the constants of an encoder of rows are those that the sites were told."""
    load_start(encoder, replace(start, encoder=start.encoder | sites.constants) if start.encoder else start)
    log.info("beginning with the encoder of %s", start.name)


def finetuned_at(
    targets: Mapping[int, str],
    stage: StageName,
    model: Classifier,
    initial: State,
    sites: Sites,
    folder: Path,
    config: RunConfig,
    results: Results,
) -> dict[int, State]:
    """The weights that a stage gives each target site that takes part to its end: the same at all, or each site's own."""

    def at(nodes: Mapping[int, str], own: str | None) -> State:
        def trained(round_number: int) -> frozenset[str]:
            return trained_names(model, stage, round_number, config)

        strategy = SiteRounds(config, stage, sites, nodes, initial, folder, own=own, trained=trained)
        state = strategy.train(initial)
        results.leave_out(strategy.excluded)
        return state

    if config.finetune.where == "federated":
        state = at(targets, None)
        return dict.fromkeys(results.remaining(targets), state)
    return {node: at({node: site}, site) for node, site in targets.items()}


def erase(strategy: SiteRounds, pretrained: State, folder: Path, config: RunConfig, results: Results) -> Eraser | None:
    """Learn the eraser behind the trained encoder and keep it as a checkpoint."""
    eraser = strategy.learn_eraser(pack(pretrained)[0])
    if eraser is None:
        results.notes.append(f"Nothing was erased from h. {NOTHING_ERASED}")
        return None
    about = Checkpoint(dict(vars(eraser)), "eraser", config.num_rounds, describe(config))
    save_checkpoint(folder / "checkpoints", about, keep=1)
    return eraser


def begin_board(folder: Path, sites: Sites, nodes: Sequence[Node], config: RunConfig) -> Board:
    """Keep in the run's folder how each site stands, from now on."""
    rounds = {"pretrain": config.num_rounds} | dict.fromkeys(config.finetune.stages, config.finetune.num_rounds)
    steps = {"pretrain": config.local_steps} | dict.fromkeys(config.finetune.stages, config.finetune.local_steps)
    board = Board(folder, sites.grid, rounds, steps)
    sites.grid.names.update({node.node_id: node.site for node in nodes})
    board.about = {node.site: {"device": node.about["device"]} for node in nodes}
    board.write("running")
    return board


def finish(
    folder: Path,
    config: RunConfig,
    sites: Sites,
    nodes: list[Node],
    pretraining: Mapping[int, str],
    targets: Mapping[int, str],
    maps: Mapping[str, Embeddings],
    predictions: Mapping[str, Predictions],
    results: Results,
) -> None:
    """Write the figures, who had which role, what crossed the wire and the report, and log the summary table."""
    write_metrics(folder / "metrics.json", results.evaluations)
    roles = {
        "pretraining": sorted(pretraining.values()),
        "target": sorted(targets.values()),
        "unseen": sorted(node.site for node in nodes if node.node_id not in pretraining and node.site not in results.excluded),
    }
    write_atomically(folder / ROLES, (json.dumps(roles, indent=1) + "\n").encode())
    traffic = traffic_by_kind(sites.traffic)
    write_atomically(folder / "traffic.json", (json.dumps(traffic, indent=1) + "\n").encode())
    for stage, embeddings in maps.items():
        embeddings.save(folder / f"embeddings-{stage}.npz")
    for stage, scored in predictions.items():
        scored.write_csv(folder / f"predictions-{stage}.csv", pseudonym_key(folder), known_sites=set(targets.values()))
    told = read_lines(folder)
    results.notes += prediction_notes(config) + privacy_notes(told)
    table = [
        {
            "name": node.site,
            "scans": node.about["scans"],
            "subjects": node.about["subjects"],
            "scanners": node.about["scanners"],
            "role": " and ".join(
                role for role, chosen in (("pretraining", pretraining), ("target", targets)) if node.node_id in chosen
            )
            or ("excluded" if node.site in results.excluded else "unseen"),
            "problems": dict(str(entry).split("=") for entry in cast(list[str], node.about["problems"])),
        }
        for node in nodes
    ]
    write_atomically(folder / "sites.json", (json.dumps(table, indent=1) + "\n").encode())
    record = RunRecord(
        name=config.name,
        config=describe(config),
        status="finished",
        sites=table,
        rounds=told,
        evaluations=results.evaluations,
        maps=dict(maps),
        predictions=dict(predictions),
        notes=results.notes,
        traffic=traffic,
    )
    report = write_report(folder, record)
    for line in summary(results.evaluations):
        log.info("%s", line)
    log.info("%s", about_traffic(traffic))
    log.info("report: %s", report)


def traffic_by_kind(traffic: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Bytes of arrays by what they are and by direction, weights first, then the most first."""
    kinds = {kind: sum(size for (of, _), size in traffic.items() if of == kind) for kind, _ in traffic}
    ordered = sorted(kinds, key=lambda kind: (kind != "weights", -kinds[kind], kind))
    return {kind: {direction: traffic.get((kind, direction), 0) for direction in ("to sites", "from sites")} for kind in ordered}


def about_traffic(traffic: Mapping[str, Mapping[str, int]]) -> str:
    """What everything but weights and results of single scans came to, beside the weights."""
    weights = sum(traffic.get("weights", {}).values())
    rest = sum(sum(sizes.values()) for kind, sizes in traffic.items() if kind not in ("weights", *PER_SCAN))
    share = f", {rest / weights:.1%} of the weights' bytes" if weights else ""
    return f"constants, exchange, erasure and probes: {rest / 1e6:.2f} MB of arrays{share}"


# What a user looks for first, in this order; the report has every figure.
SUMMARY = (
    ("site", "balanced_accuracy"),
    ("site", "balanced_accuracy_lda"),
    ("site", "balanced_accuracy_logistic"),
    ("site", "balanced_accuracy_nearest"),
    ("site", "balanced_accuracy_knn"),
    ("site", "balanced_accuracy_heldout"),
    ("site", "balanced_accuracy_boosting"),
    ("age", "mae"),
    ("age", "mae_sums"),
    ("age", "mae_unseen"),
    ("age", "mae_sums_unseen"),
    ("diagnosis", "auc"),
    ("diagnosis", "auc_lda"),
    ("diagnosis", "auc_binned"),
)


def summary(evaluations: list[Evaluation]) -> list[str]:
    """The figures over all sites that a user looks for first, as aligned lines."""
    first = [e for wanted in SUMMARY for e in evaluations if e.site == "all" and (e.task, e.metric) == wanted]
    stages = list(dict.fromkeys(e.stage for e in evaluations))
    if not first:
        return ["no figures over all sites; the report says why"]
    ordered = sorted(first, key=lambda e: ({"age_sex_floor": 1, "chance": 2}.get(e.stage, 0), stages.index(e.stage)))
    return [f"{'stage':<18}{'task':<11}{'metric':<28}{'value':>8}  95 % interval"] + [
        f"{e.stage:<18}{e.task:<11}{e.metric:<28}{e.value:>8.3f}"
        + (f"  [{e.low:.3f}, {e.high:.3f}]" if e.low is not None else "")
        for e in ordered
    ]
