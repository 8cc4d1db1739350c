"""What `isocenter finetune` does: fine-tune an encoder on one machine's labelled scans, go on where it was killed, score it.

The rounds are those of a federated run without messages: every target site trains from the round's weights and the results are
averaged, or each site trains a model of its own.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from core import __version__
from core.checkpoint import Checkpoint, load_strictly, pseudonym_key, save_checkpoint, write_atomically
from core.cli import decode_first
from core.config import ConfigError, ImageData, RunConfig, compose_plain, describe, load_config, quoted
from core.data.holdings import Holdings, open_holdings
from core.data.label_maps import LabelMaps, read_label_maps
from core.data.site import SiteData, default_cache_root, join_splits
from core.evaluation.intervals import Evaluation, write_metrics
from core.evaluation.predictions import Predictions, evaluate_predictions
from core.finetuning import (
    finetune,
    labelled,
    num_classes,
    predict,
    prediction_notes,
    privacy_notes,
    training_scans,
    validation_loss,
)
from core.models import (
    Classifier,
    Pretrainer,
    Segmenter,
    build_classifier,
    build_pretrainer,
    build_segmenter,
    num_erased,
    split_constants,
)
from core.report import write_report
from core.report_record import RunRecord
from core.report_segmentation import draw_examples
from core.rounds import State, kept, run_rounds
from core.scaling import input_sums, standardisation_from, standardising
from core.segmentation import (
    TASK,
    DiceScores,
    Example,
    SegmentationError,
    dice_scores,
    evaluate_dice,
    example,
    segment,
    segmentation_scans,
    segmentation_validation_loss,
)
from core.settings import DpSgd, MomentPolicy
from core.stages import STAGES, StageName
from core.starts import Start, load_start, read_start
from core.targets import TargetError
from core.training import TrainResult, choose_device, pretrain, pretraining_scans

Say = Callable[[str], None]
CPU = torch.device("cpu")
OWN_DEFAULTS = ("num_rounds=0", "warmup_rounds=0", "debias=none", "data.pretrain_on=all")
GRID = ("voxel_size_mm", "shape", "normalisation", "stored")
ABOUT = "finetune.json"


class FinetuneError(ValueError):
    """Fine-tuning that cannot be done as asked; one line that says what to change."""


def finetuning_config(run: Path, start: Start, overrides: Sequence[str]) -> RunConfig:
    """The configuration of fine-tuning from a start: its encoder and grid, no pretraining, then the overrides.

    Raises:
        ConfigError: as `load_config`.
    """
    named = compose_plain(list(overrides))["name"]
    chosen = [f"start={quoted(str(run))}", f"name={named}-finetuned", *OWN_DEFAULTS]
    if start.config is not None:
        encoder = dict(start.config["encoder"])
        chosen.append(f"encoder={encoder.pop('name')}")
        chosen += [f"encoder.{key}={json.dumps(value)}" for key, value in encoder.items()]
        chosen.append(f"embedding_size={start.config['embedding_size']}")
        data, kind = start.config["data"], compose_plain([*chosen, *overrides])["data"].get("kind")
        if data.get("kind") == kind == "images":
            chosen += [f"data.{key}={json.dumps(data[key])}" for key in GRID]
    return load_config([*chosen, *overrides])


@dataclass(frozen=True)
class Job:
    """What there is to fine-tune.

    Attributes:
        config: the run's.
        start: what it begins with.
        held: what each site holds, by name.
        targets: the sites that fine-tune.
        folder: where results go.
        device: where to compute.
        say: one line of progress.
        label_maps: of each site's scans, by name, where the run segments; else none.
    """

    config: RunConfig
    start: Start
    held: Mapping[str, Holdings]
    targets: tuple[str, ...]
    folder: Path
    device: torch.device
    say: Say
    label_maps: Mapping[str, LabelMaps] = field(default_factory=dict)

    @property
    def store_inputs(self) -> int:
        """Channels of an image, or features of a row."""
        return next(iter(self.held.values())).store.num_inputs

    def classifier(self, state: State) -> Classifier:
        """Encoder and head with these weights, on the device."""
        model = build_classifier(
            self.config.encoder,
            self.config.finetune.target.num_outputs,
            self.config.seed,
            num_inputs=self.store_inputs,
            spatial_dims=self.config.data.spatial_dims,
            num_erased=num_erased(state),
            zero_head=isinstance(self.config.privacy, DpSgd),
        )
        if state:
            load_strictly(model, state)
        return model.to(self.device)

    def segmenter(self, state: State) -> Segmenter:
        """Encoder and decoder with these weights, on the device."""
        num_classes = next(iter(self.label_maps.values())).num_classes
        model = build_segmenter(self.config.encoder, num_classes, self.config.seed, num_inputs=self.store_inputs)
        if state:
            load_strictly(model, state)
        return model.to(self.device)


def open_job(config: RunConfig, start: Start, folder: Path, device: torch.device, say: Say) -> Job:
    """Open the sites' scans and say who fine-tunes.

    Raises:
        FinetuneError: no data, a target site that is not there, or none that shows two classes.
        ValueError: a site cannot open its data.
    """
    if config.data.root is None:
        raise FinetuneError(f"finetune: data.{config.data.PLACES[0]} must name the scans, got null. Add it to the overrides.")
    source = config.data.source(default_cache_root(), config.data.places)
    data = config.data
    held = {
        site: open_holdings(
            site, data.source_at(site, default_cache_root(), data.places), data.max_unusable, data.split_seed, data.fractions
        )
        for site in sorted(source.sites())
    }
    signatures = {one.store.signature for one in held.values()}
    if len(signatures) > 1:
        raise FinetuneError(f"finetune: inputs must mean the same at every site, got {len(signatures)} kinds. Mend data.columns.")
    if missing := {*(data.target_sites or ()), *data.unseen_sites} - set(held):
        raise FinetuneError(f"finetune: sites must be among {', '.join(held)}, got {', '.join(sorted(missing))}.")
    if config.finetune.label_maps is not None:
        return _segmentation_job(config, start, held, folder, device, say)
    target = config.finetune.target
    classes: dict[str, int] = {}
    reason = ""
    for site, one in held.items():
        try:
            classes[site] = num_classes(labelled(one.splits["train"], target), target)
        except TargetError as error:
            classes[site], reason = 0, str(error).rstrip(".")
    named = data.target_sites if data.target_sites is not None else tuple(held)
    targets = tuple(site for site in sorted(named) if classes[site] >= 2 and site not in data.unseen_sites)
    if data.target_sites is not None and set(targets) != set(named):
        alone = ", ".join(sorted(set(named) - set(targets)))
        raise FinetuneError(
            f"finetune: target sites must show two classes of {target.task} in training and not be unseen, {alone} cannot. "
            f"{reason or 'Leave them out of data.target_sites'}."
        )
    if not targets:
        reason = reason or f"no site has training scans of two classes of {target.task}"
        raise FinetuneError(f"finetune: {reason}. Check the labels with `isocenter check`, or name others in finetune.target.")
    for site in targets:
        training_scans(held[site].splits["train"], config)
    return Job(config, start, held, targets, folder, device, say)


def _segmentation_job(
    config: RunConfig, start: Start, held: Mapping[str, Holdings], folder: Path, device: torch.device, say: Say
) -> Job:
    choice, data, chosen = config.finetune.label_maps, config.data, config.finetune
    assert choice is not None
    if not isinstance(data, ImageData):
        raise FinetuneError("finetune.label_maps: data must be a folder of images, got another. Set finetune.label_maps=null.")
    if chosen.label_fraction != 1.0:
        raise FinetuneError(f"finetune.label_fraction must be 1 with label maps, got {chosen.label_fraction:g}.")
    root, settings = data.places["root"], data.volumes(data.places)
    assert root is not None
    maps = {}
    for site, one in held.items():
        scans = [scan for part in one.splits.values() for scan in part.scans]
        maps[site] = read_label_maps(scans, settings, choice, root)
    targets = []
    for site in sorted(data.target_sites if data.target_sites is not None else held):
        if site in data.unseen_sites:
            continue
        try:
            segmentation_scans(held[site].splits["train"], maps[site])
        except SegmentationError:
            if data.target_sites is not None:
                raise
        else:
            targets.append(site)
    if not targets:
        raise FinetuneError(
            "finetune.label_maps: training scans must show a class at one site or more, got none. The log names the scans; mend "
            "the pattern, suffix or codes."
        )
    return Job(config, start, held, tuple(targets), folder, device, say, maps)


def begun(job: Job) -> tuple[Pretrainer, State]:
    """The encoder with the start's weights, a projector beside it, and all weights by name.

    Raises:
        StartError: the start is of another architecture.
    """
    config = job.config
    constants: State = split_constants(job.start.encoder)[1]
    if config.data.inputs == "table" and not constants:
        rows = [job.held[site].splits["train"].first_scans() for site in job.targets]
        policy = MomentPolicy(min_group=1, diagonal_subjects=1, covariance_subjects_per_feature=0, round_counts_to=1)
        sums = [input_sums(data.inputs(range(len(data)), CPU), policy) for data in rows]
        constants = standardising(standardisation_from(sums))
    model = build_pretrainer(
        config.encoder,
        config.embedding_size,
        config.seed,
        num_inputs=job.store_inputs,
        spatial_dims=config.data.spatial_dims,
        num_erased=num_erased(constants),
    )
    load_start(model.encoder, job.start)
    return model, {name: value.detach().clone() for name, value in model.state_dict().items()} | constants


def first_encoder(job: Job) -> State:
    """The encoder's weights and constants that fine-tuning begins with: the start's, pretrained again where the run says so."""
    config = job.config
    model, state = begun(job)
    if config.num_rounds == 0:
        return {name: value for name, value in state.items() if name.startswith("encoder.")}

    def train(weights: State, round_number: int) -> dict[str, TrainResult]:
        results = {}
        for site in job.targets:
            load_strictly(model, weights)
            data = pretraining_scans(job.held[site].splits["train"], config)
            result = kept(pretrain(model.to(job.device), data, config, round_number=round_number, device=job.device))
            # What no one trains is no average.
            results[site] = replace(result, state=split_constants(result.state)[0])
        return results

    told = _teller(job, "pretrain", config.num_rounds)
    ended = run_rounds("pretrain", state, train, num_rounds=config.num_rounds, file=_progress(job, "pretrain"), tell=told)
    about = Checkpoint(ended.state, "pretrain", ended.round_number, describe(config) | job.start.told())
    save_checkpoint(job.folder / "checkpoints", about, keep=1)
    return {name: value for name, value in ended.state.items() if name.startswith("encoder.")}


def finetune_stage(
    job: Job, stage: StageName, encoder: State, sites: Sequence[str], saved_as: str
) -> tuple[State, list[dict[str, Any]]]:
    """All rounds of a stage over some target sites; the weights that are taken, and what each round told."""
    config, target, maps = job.config, job.config.finetune.target, job.label_maps
    build: Callable[[State], Classifier | Segmenter] = job.segmenter if maps else job.classifier
    fresh = {name: value.detach().cpu().clone() for name, value in build({}).state_dict().items()}
    begin = encoder if STAGES[stage].start == "pretrained" else split_constants(encoder)[1]
    state = fresh | begin
    model = build(state)
    splits_at = {site: job.held[site].splits for site in sites}
    train_at, val_at = {}, {}
    for site, splits in splits_at.items():
        train_at[site] = segmentation_scans(splits["train"], maps[site]) if maps else training_scans(splits["train"], config)
        val_at[site] = maps[site].labelled(splits["val"]) if maps else labelled(splits["val"], target)
    val_at = {site: data for site, data in val_at.items() if len(data)}
    if config.finetune.validate_by == "figure" and not maps:
        val_at = {site: data for site, data in val_at.items() if num_classes(data, target) >= 2}

    def train(weights: State, round_number: int) -> dict[str, TrainResult]:
        results = {}
        for site, data in train_at.items():
            load_strictly(model, weights)
            if isinstance(model, Segmenter):
                result = segment(model, data, maps[site], config, stage=stage, round_number=round_number, device=job.device)
            else:
                result = finetune(model, data, config, stage=stage, round_number=round_number, device=job.device)
            results[site] = kept(result)
        return results

    def validate(weights: State) -> float:
        load_strictly(model, weights)
        losses = {}
        for site, data in val_at.items():
            if isinstance(model, Segmenter):
                losses[site] = segmentation_validation_loss(model, data, maps[site], job.device)
            else:
                losses[site] = validation_loss(model, data, config, job.device)
        return sum(losses[site] * len(val_at[site]) for site in losses) / sum(len(val_at[site]) for site in losses)

    patience = config.finetune.patience
    if patience is not None and not val_at:
        raise FinetuneError(
            f"finetune.patience: it needs labelled validation scans at {', '.join(sites)}, there are none. "
            "Set data.fractions, or finetune.patience=null."
        )
    ended = run_rounds(
        saved_as,
        state,
        train,
        num_rounds=config.finetune.num_rounds,
        validate=None if patience is None else validate,
        patience=patience,
        file=_progress(job, saved_as),
        tell=_teller(job, saved_as, config.finetune.num_rounds),
    )
    about = Checkpoint(ended.state, saved_as, ended.round_number, describe(config) | job.start.told())
    save_checkpoint(job.folder / "checkpoints", about, keep=1, taken=True)
    return ended.state, ended.history


def _progress(job: Job, name: str) -> Path:
    return job.folder / "progress" / f"{name}.safetensors"


def _teller(job: Job, name: str, num_rounds: int) -> Callable[[dict[str, Any]], None]:
    def tell(line: dict[str, Any]) -> None:
        losses = "  ".join(f"{site} {metrics['loss']:.3f}" for site, metrics in line["sites"].items() if metrics) or "private"
        validation = f"  validation {line['validation_loss']:.3f}" if "validation_loss" in line else ""
        job.say(f"{name}  round {line['round']}/{num_rounds}  loss  {losses}{validation}  {line['seconds']:.1f} s")

    return tell


def _cohort_digest(held: Mapping[str, Holdings]) -> str:
    """SHA-256 of who is in which split with which labels: the scans of a run must stay the same."""
    rows = [
        (site, split, scan.subject, scan.session, scan.path.name, scan.age_years, scan.sex, scan.diagnosis, scan.targets)
        for site, one in held.items()
        for split, data in one.splits.items()
        for scan in data.scans
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _start_digest(start: Start) -> str:
    digest = hashlib.sha256()
    for name in sorted(start.encoder):
        digest.update(name.encode() + start.encoder[name].double().numpy().tobytes())
    return digest.hexdigest()


def claim_folder(job: Job) -> bool:
    """Make the folder this job's, or find that it is already; whether there is something to go on with.

    Raises:
        FinetuneError: the folder holds something else.
    """
    about = {
        "config": describe(job.config),
        "start": _start_digest(job.start),
        "cohort": _cohort_digest(job.held),
        "label maps": {site: maps.digest() for site, maps in job.label_maps.items()},
        "device": job.device.type,
        "version": __version__,
    }
    about = json.loads(json.dumps(about))
    path = job.folder / ABOUT
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before == about:
            return True
        if [other.name for other in job.folder.iterdir()] == [ABOUT]:  # nothing was made of it
            write_atomically(path, (json.dumps(about, indent=1) + "\n").encode())
            return False
        changed = ", ".join(key for key in about if before.get(key) != about[key])
        raise FinetuneError(
            f"finetune: the folder {job.folder.name} holds a fine-tuning of another {changed}. Nothing was changed; choose "
            "another name=..., or remove the folder."
        )
    if job.folder.is_dir() and any(job.folder.iterdir()):
        raise FinetuneError(
            f"finetune: the folder {job.folder.name} holds other files. Nothing was changed; choose another name=..."
        )
    write_atomically(path, (json.dumps(about, indent=1) + "\n").encode())
    return False


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning gave.

    Attributes:
        evaluations: figures on held-out subjects.
        notes: what was left out, and why; what is guaranteed of privacy.
        lines: what every round told.
        predictions: of the held-out scans, by stage.
        examples: of segmentation, one held-out scan a site, by stage.
    """

    evaluations: list[Evaluation]
    notes: list[str]
    lines: list[dict[str, Any]]
    predictions: dict[str, Predictions]
    examples: dict[str, list[Example]] = field(default_factory=dict)


def tune(job: Job) -> Tuned:
    """Fine-tune in every stage, keep checkpoints, and score on held-out scans; what an earlier call began is gone on with."""
    config = job.config
    begun(job)  # what cannot begin claims no folder
    if claim_folder(job):
        job.say(f"going on in {job.folder}")
    alone = config.finetune.where == "local"
    encoder = first_encoder(job)
    groups = [(site,) for site in job.targets] if alone else [job.targets]
    tuned = Tuned([], [], [], {})
    for stage in config.finetune.stages:
        parts = []
        scores, examples = list[DiceScores](), list[Example]()
        for sites in groups:
            saved_as = f"{stage}-{sites[0]}" if alone else stage
            state, history = finetune_stage(job, stage, encoder, sites, saved_as)
            tuned.lines.extend(history)
            held_out = held_out_scans(job, sites, alone=alone, notes=tuned.notes)
            for site, splits in held_out.items():
                if job.label_maps:
                    segmenter, maps = job.segmenter(state), job.label_maps[site]
                    scores.append(dice_scores(segmenter, {"test": splits["test"]}, maps, job.device))
                    shown = example(segmenter, splits["test"], maps, job.device)
                    examples += [shown] if shown is not None else []
                else:
                    parts.append(predict(job.classifier(state), splits, config, job.device))
        regime, known = "local-only" if alone else "federated", set(job.targets)
        if job.label_maps:
            told = DiceScores.concatenate(scores)
            found, more = evaluate_dice(told, stage=stage, regime=regime, seed=config.seed, known_sites=known)
            tuned.examples[stage] = examples
        else:
            tuned.predictions[stage] = Predictions.concatenate(parts)
            found, more = evaluate_predictions(
                tuned.predictions[stage], stage=stage, regime=regime, seed=config.seed, known_sites=known
            )
        tuned.evaluations.extend(found)
        tuned.notes.extend(note for note in more if note not in tuned.notes)
    tuned.notes.extend(prediction_notes(config) + privacy_notes(tuned.lines))
    return tuned


def write_results(job: Job, tuned: Tuned) -> None:
    """Write figures, predictions, rounds and the report to the job's folder."""
    key = pseudonym_key(job.folder)
    for stage, predictions in tuned.predictions.items():
        predictions.write_csv(job.folder / f"predictions-{stage}.csv", key, known_sites=set(job.targets))
    write_metrics(job.folder / "metrics.json", tuned.evaluations)
    write_atomically(job.folder / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in tuned.lines).encode())
    for stage, examples in tuned.examples.items():
        if examples:
            write_atomically(job.folder / "figures" / f"segmentation-{stage}.png", draw_examples(examples))
    sites = [_about_site(site, one, job.targets, job.label_maps.get(site)) for site, one in job.held.items()]
    write_atomically(job.folder / "sites.json", (json.dumps(sites, indent=1) + "\n").encode())
    record = RunRecord(
        name=job.config.name,
        config=describe(job.config),
        status="finished",
        sites=sites,
        rounds=tuned.lines,
        evaluations=tuned.evaluations,
        notes=tuned.notes,
        predictions=tuned.predictions,
    )
    write_report(job.folder, record)


def held_out_scans(job: Job, sites: Sequence[str], *, alone: bool, notes: list[str]) -> dict[str, dict[str, SiteData]]:
    """The held-out scans that a model is scored on, by site: where it was trained, and elsewhere unless each site has its own.

    Elsewhere a site must show two classes. Of a site that is called unseen every scan is held out.
    """
    target = job.config.finetune.target
    found = {site: {split: job.held[site].splits[split] for split in ("val", "test")} for site in sites}
    for site, held in job.held.items() if not alone else ():
        if site in sites:
            continue
        splits = ("train", "val", "test") if site in job.config.data.unseen_sites else ("val", "test")
        scans = join_splits([held.splits[split] for split in splits])
        if job.label_maps:
            if len(job.label_maps[site].labelled(scans)):
                found[site] = {"test": scans}
            continue
        try:
            if num_classes(labelled(scans, target), target) >= 2:
                found[site] = {"test": scans}
                continue
            reason = f"its held-out scans do not show two classes of {target.task}"
        except TargetError as error:
            reason = str(error).rstrip(".")
        note = f"{site}: not scored: {reason}."
        notes += [note] if note not in notes else []
    return found


def _about_site(site: str, held: Holdings, targets: Sequence[str], maps: LabelMaps | None) -> dict[str, object]:
    return {
        "name": site,
        "scans": held.num_scans,
        "subjects": held.num_subjects,
        "scanners": held.num_scanners,
        "role": "target" if site in targets else "unseen",
        "problems": held.problem_counts | (maps.problem_counts() if maps else {}),
    }


def prepared(run: Path, overrides: Sequence[str]) -> tuple[RunConfig, Start]:
    """Start and configuration of a fine-tuning, checked, before any scan is read.

    Raises:
        ConfigError, StartError: one line that says what to change.
    """
    keys = [str(key) for key in compose_plain(list(overrides))["start_keys"]]
    start = read_start(run, keys)
    config = finetuning_config(run, start, overrides)
    if not config.finetune.stages:
        raise ConfigError("finetune.stages must name one stage or more, got none. Leave finetune=none out.")
    if config.debias.name != "none":
        raise ConfigError(
            f"debias must be none in `isocenter finetune`, got {config.debias.name!r}: "
            "sites exchange moments in `isocenter run` alone."
        )
    return config, start


def finetune_and_print(run: Path, overrides: Sequence[str], device: str) -> None:
    """Fine-tune, with progress and the figures on the screen.

    Raises:
        ValueError: what was asked for cannot be done; one line that says what to change.
        NotFiniteError: a loss was NaN or infinite; the rounds before it are kept.
    """
    config, start = prepared(run, overrides)
    folder = (config.output or Path("runs")).resolve() / config.name
    chosen = choose_device(device)
    if config.data.root is not None:
        decode_first(config.data.source(default_cache_root(), config.data.places))
    job = open_job(config, start, folder, chosen, typer.echo)
    typer.echo(f"{start.name}: fine-tuning at {', '.join(job.targets)} on {chosen}; results go to {folder}")
    tuned = tune(job)
    write_results(job, tuned)
    print_figures(tuned.evaluations, config)
    for note in tuned.notes:
        typer.echo(f"note  {note}")
    typer.echo(f"open {folder / 'report.html'}")


# What the screen shows of each kind of target; the report and metrics.json have every figure.
SHOWN = ("dice", "auc", "balanced_accuracy", "accuracy", "ece", "mae", "r2")


def print_figures(evaluations: Sequence[Evaluation], config: RunConfig) -> None:
    """A table of the main figures over all sites, those that trained and the others apart."""
    overall = {(e.stage, e.metric): e for e in evaluations if e.site == "all"}
    shown = [metric for metric in SHOWN if any(found == metric for _, found in overall)]
    task = config.finetune.target.task if config.finetune.label_maps is None else TASK
    table = Table(title=f"{task}, held-out subjects, 95 % intervals", title_justify="left")
    for heading in ("stage", "sites", "subjects", *shown):
        table.add_column(heading)
    for stage in config.finetune.stages:
        for sites, suffix in (("target", ""), ("others", "_unseen")):
            row = [overall.get((stage, f"{metric}{suffix}")) for metric in shown]
            if subjects := [e.num_subjects for e in row if e is not None]:
                table.add_row(stage, sites, str(max(subjects)), *("-" if e is None else _with_interval(e) for e in row))
    console = Console()
    console.width = max(130, console.width)
    console.print(table)


def _with_interval(e: Evaluation) -> str:
    return f"{e.value:.3f}" if e.low is None or e.high is None else f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"
