"""The console script `isocenter`: commands of this package, and those that others register under ``isocenter.commands``."""

import json
import logging
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from core.data.site import Source

app = typer.Typer(
    help="Contrastive pretraining of brain-image encoders across hospitals, blind to which hospital a scan came from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="What differs from the defaults, as key=value or group=choice, e.g. objective=ntxent debias=none num_rounds=50. "
        "`isocenter config` prints every key.",
        show_default=False,
    ),
]


@app.command()
def config(overrides: Overrides = None) -> None:
    """Print the configuration that a run with these overrides would have, or say what is wrong with it."""
    from core.config import describe

    typer.echo(json.dumps(describe(checked(overrides or [])), indent=2))


@app.command()
def evaluate(
    what: Annotated[
        list[Path],
        typer.Argument(help="Run folder, embeddings-<stage>.npz, or folder of *.npy and one table.", show_default=False),
    ],
    unseen: Annotated[
        list[str] | None,
        typer.Option(
            help="A site that took no part in pretraining; repeat for each. Age is then scored there as at a new hospital."
        ),
    ] = None,
    official: Annotated[
        bool,
        typer.Option("--official", help="Add the protocol and score of the OpenBHB challenge (slow: minutes with many sites)."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of folds, resamples and permutations.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics.json, differences.json, report.html and its figures.", show_default=False),
    ] = None,
) -> None:
    """Say how much of site, scanner, age, sex and diagnosis can be read from a representation, and how sure that is.

    WHAT is the folder of a run, an embeddings-<stage>.npz of one, or a folder with your own *.npy (one row a scan, one column a
    feature) beside one .csv or .tsv table. Several are compared with the first, on the same scans; of a single one with several
    representations, all are compared with its first.

    Every site probe stands beside chance and its own floor: what age and sex alone give that probe. Probes named heldout
    never see the train split, which an eraser or a harmonisation may have been fitted on. Brackets hold 95 % intervals over
    held-out subjects. With several representations of the same scans, differences come with a paired interval and a p.

    Your own table needs the columns subject and site, and may have age (years), sex (F, M), diagnosis (control, patient),
    scanner and split (train, val, test); rows are those of the .npy files. Without a split, 60 % of the subjects are train.

    Examples: isocenter evaluate runs/phantom, isocenter evaluate runs/a runs/b --output compared,
    isocenter evaluate mine/ --unseen Oslo --official
    """
    from core.evaluation.command import evaluate_and_print

    try:
        evaluate_and_print(what, unseen=unseen or [], official=official, seed=seed, output=output)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


@app.command()
def finetune(
    run: Annotated[
        Path,
        typer.Argument(
            help="What to begin with: a run's folder, a checkpoint, an export, any .safetensors, or `random`.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0; auto takes a GPU where there is one.")] = "auto",
) -> None:
    """Fine-tune an encoder on labelled scans of this machine, and score it on held-out subjects.

    RUN tells the encoder and the grid of its images; OVERRIDES tell the scans and what is learnt of them, as in `isocenter run`:

    isocenter finetune runs/phantom data=folder data.root=/data/hospital

    isocenter finetune runs/phantom data=folder data.root=/data/hospital finetune.where=local finetune.patience=5

    isocenter finetune runs/phantom data=folder data.root=/data/hospital finetune.target.kind=regression
    finetune.target.labels=[iq] data.columns.targets=[iq] finetune.target.offset=100 finetune.target.scale=15

    isocenter finetune other.safetensors encoder=resnet18 'start_keys=["net.:encoder.net.","fc.:"]' data=folder data.root=...

    Stages (finetune.stages): linear_probe, last_block, full_finetuning, frozen_then_unfrozen, from_scratch. With num_rounds=N the
    encoder is first pretrained for N rounds more on the sites' own training scans, labels unused. Several target sites train one
    model together (finetune.where=federated), or one each (local); sites in data.unseen_sites are only scored.

    Results go to runs/<name>: report.html, metrics.json, predictions-<stage>.csv (pseudonyms, no ids), checkpoints. A command
    that was stopped, or killed, goes on where it was when it is given again, and ends with the same weights.
    """
    from core.finetune_command import finetune_and_print

    try:
        finetune_and_print(run, overrides or [], device)
    except (ValueError, RuntimeError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a fine-tuning.", show_default=False)],
    stage: Annotated[
        str | None, typer.Option(help="A stage of fine-tuning, whose encoder and head are exported.", show_default="pretraining")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New folder for the export.", show_default="RUN/export")] = None,
) -> None:
    """Write what others need to use an encoder, and nothing that names a site, a path or a subject.

    encoder.safetensors (with eraser, and the head of a stage), config.json, README.md (a model card: data, objective, figures,
    privacy, limits), encoder.pt (TorchScript, needs torch alone), bundle/ (for `python -m monai.bundle run`).

    In Python: encoder = core.load_encoder("runs/phantom/export"); h = encoder(images). That needs torch and safetensors alone.

    Examples: isocenter export runs/phantom, isocenter export runs/phantom-finetuned --stage full_finetuning
    """
    from core.export import export_run

    try:
        folder = export_run(run, output, stage=stage)
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    typer.echo(f"wrote {folder}")


@app.command()
def check(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of images; or a MedMNIST .npz, or a table of features (.csv, .tsv).", show_default=False),
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")] = False,
    share: Annotated[
        Path | None,
        typer.Option(
            help="Write here what may be sent to the coordinator: rounded counts, small ones hidden; no id, path or name.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for check.json and montage.png.", show_default="check-<name of FOLDER>"),
    ] = None,
    montage: Annotated[int, typer.Option(min=0, max=200, help="Scans in the picture, the odd ones first; 0: no picture.")] = 12,
    quick: Annotated[bool, typer.Option("--quick", help="Read tables and headers only; decode nothing.")] = False,
) -> None:
    """Say what a run would find in a folder of scans, before it starts.

    What can be used, what cannot and why, what looks odd, what it costs.
    Tables and file names are joined, every header is read, then every scan
    is decoded into the cache that a run with the same settings reads, so
    nothing is decoded twice. FOLDER is not changed (choose the cache with
    ISOCENTER_CACHE), and nothing leaves this machine.

    FOLDER holds images; it may be a MedMNIST .npz or a table of features
    (.csv, .tsv) too. It chooses data=folder and data.root (experiment=medmnist,
    experiment=roi for those) of the run whose OVERRIDES follow:
    data.layout, data.suffix, data.pattern, data.participants, data.columns.*,
    data.voxel_size_mm, data.shape and the like say how it is read.

    Examples:
    isocenter check /data/hospital

    isocenter check /data/hospital --quick --share counts.json

    isocenter check /data/hospital data.voxel_size_mm=2 'data.shape=[96,112,96]'

    isocenter check /data/ms 'data.pattern="patient{subject}/study{session}_T1W.nii.gz"'

    Exit codes: 0, ready to train. 1, readable, but a run would stop: no scan
    is left, or of those listed more than the share data.max_unusable cannot
    be used. 2, not understood: no such folder, no data in it, a bad override.
    """
    from core.report_check import check_and_print

    try:
        code = check_and_print(
            folder,
            overrides or [],
            as_json_only=as_json,
            share=share,
            output=output,
            num_pictures=0 if quick else montage,
            quick=quick,
        )
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


def checked(overrides: list[str]) -> "RunConfig":  # type: ignore[name-defined] # noqa: F821
    """The configuration, or its one-line fault on standard error and exit code 2."""
    from core.config import ConfigError, load_config

    try:
        return load_config(overrides)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


def decode_first(source: "Source") -> None:
    """Decode what the cache lacks of a folder of images, with a progress bar: who opens its sites then finds it there.

    What is wrong with single scans is not told here; each site logs and counts it.
    """
    from rich.progress import Progress

    from core.data.cache import open_cache, plan_build
    from core.data.site import ImageSource

    if not isinstance(source, ImageSource):
        return
    logger = logging.getLogger("isocenter")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        manifests = [source.manifest(site) for site in source.sites()]
        plans = [plan_build(manifest, source.settings, source.cache_root) for manifest in manifests]
        missing = sum(plan.num_missing for plan in plans)
        if not missing:
            return
        megabytes = sum(plan.missing_bytes for plan in plans) / 1e6
        typer.echo(f"decoding {missing} scans, once: {megabytes:.0f} MB in {source.cache_root}")
        with Progress(transient=True) as bar:
            task = bar.add_task("decoding", total=missing)
            for manifest, plan in zip(manifests, plans, strict=True):
                before = bar.tasks[0].completed - (plan.num_images - plan.num_missing)
                move = partial(lambda before, ready, _: bar.update(task, completed=before + ready), before)
                open_cache(manifest, source.settings, source.cache_root, progress=move)
    finally:
        logger.setLevel(level)


def main() -> None:
    """Collect the commands and run the one that was asked for."""
    for entry in entry_points(group="isocenter.commands"):
        entry.load()(app)
    app()
