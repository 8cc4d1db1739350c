"""Known truth: does the evaluation find the site effect that is there, and does erasure remove that and nothing else?

``python -m simulations.planted`` plants a site effect twice: in a table it is drawn (`planted_tables`), in images it is
counterfactual (`planted_images`); `planted_measures` holds what both are measured by.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from core.checkpoint import write_atomically
from core.report_figures import COLOURS, MARKERS, STYLE
from simulations.planted_images import ImageResult, study_images
from simulations.planted_measures import Figure3
from simulations.planted_tables import PLANS, AppsResult, Plan, TableResult, study_apps, study_table

PROBED_SHARE = 0.2
COHORT_SCALE, NUM_ANATOMIES = 1.0, 60
TABLE_RUN = "experiment=roi debias=erasure num_rounds=6"
IMAGE_RUN = "data.target_sites=[] debias=erasure debias.erase_to=all num_rounds=8"


def mean_of(values: Sequence[float | None]) -> str:
    """The mean over seeds, - where there is none."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else "-"


def holds(results: Sequence[TableResult]) -> int:
    """In how many tables the interval holds the planted share."""
    return sum(result.recovered[1] <= result.plan.share <= result.recovered[2] for result in results)


def tabulate(tables: Sequence[TableResult], apps: Sequence[AppsResult], images: Sequence[ImageResult]) -> Table:
    """Planted and recovered, and what erasure leaves of site and of all else; means over seeds."""
    found = Table(title="Share of site in the variance at equal age and sex, and what erasure does; held-out subjects")
    headings = ("planted", "recovered", "in interval", "erased", "planted left", "rest kept", "at planted rank")
    found.add_column("", no_wrap=True)
    for heading in (*headings, "age R2", "erased", "oracle", "site held-out", "erased", "floor"):
        found.add_column(heading, justify="right")
    plans = list(dict.fromkeys(result.plan for result in tables))
    for plan in plans:
        of_plan = [result for result in tables if result.plan == plan]
        probes = [result.probes for result in of_plan if result.probes is not None]
        found.add_row(
            str(plan),
            f"{plan.share:.3f}",
            mean_of([result.recovered[0] for result in of_plan]),
            f"{holds(of_plan)} of {len(of_plan)}",
            mean_of([result.erased["all"].share[0] for result in of_plan]),
            mean_of([result.erased["all"].planted_left for result in of_plan]),
            mean_of([result.erased["all"].outside_kept for result in of_plan]),
            mean_of([result.erased["planted rank"].outside_kept for result in of_plan]),
            mean_of([result.raw[0] for result in of_plan]),
            mean_of([result.erased["all"].age_r2 for result in of_plan]),
            mean_of([result.oracle[0] for result in of_plan]),
            *(mean_of([p[stage]["balanced_accuracy_heldout"] for p in probes]) for stage in ("raw", "erased", "age_sex_floor")),
        )
    found.add_section()
    for run in apps:
        found.add_row("apps: inputs", f"{run.plan.share:.3f}", f"{run.inputs[0]:.3f}", "", f"{run.inputs_erased[0]:.3f}")
        found.add_row("apps: trained h", "", f"{run.h[0]:.3f}", "", f"{run.h_erased[0]:.3f}")
    for image in images:
        found.add_row(
            f"images, {image.encoder}",
            f"{image.planted[0]:.3f}",
            f"{image.recovered[0]:.3f}",
            f"{int(image.recovered[1] <= image.planted[0] <= image.recovered[2])} of 1",
            f"{image.erased[0]:.3f}",
            f"{image.scanner_left:.3f}",
            f"{image.anatomy_kept:.3f}",
            f"{image.oracle_anatomy_kept:.3f}",
            f"{image.age_r2:.3f}",
            f"{image.age_r2_erased:.3f}",
        )
    return found


def draw(tables: Sequence[TableResult], images: Sequence[ImageResult]) -> Figure:
    """Recovered against planted share, before and behind the eraser, with 95 % intervals and the line where they agree."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.6), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        most = max([r.plan.share for r in tables] + [image.planted[0] for image in images])
        axis.plot([0, 1.15 * most], [0, 1.15 * most], color="0.6", linewidth=1, zorder=0, label="recovered = planted")
        axis.axhline(0, color="0.85", linewidth=1, zorder=0)

        def points(number: int, label: str, planted: Sequence[float], found: Sequence[Figure3], hollow: bool) -> None:
            values = np.array(found)
            errors = np.abs(values[:, 1:] - values[:, :1]).T
            axis.errorbar(
                planted,
                values[:, 0],
                yerr=errors,
                linestyle="none",
                marker=MARKERS[number % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)],
                markerfacecolor="white" if hollow else None,
                markersize=5,
                linewidth=0.8,
                label=label,
            )

        # Tables of one share stand side by side.
        places: dict[int, float] = {}
        for share in {r.plan.share for r in tables}:
            alike = [r for r in tables if r.plan.share == share]
            places |= {id(r): share + 0.008 * most * (i - 0.5 * (len(alike) - 1)) for i, r in enumerate(alike)}
        kinds = list(dict.fromkeys(str(r.plan) for r in tables))
        for number, kind in enumerate(kinds):
            of_kind = [r for r in tables if str(r.plan) == kind]
            at = [places[id(r)] for r in of_kind]
            points(number, kind, at, [r.recovered for r in of_kind], hollow=False)
            points(number, "_", at, [r.erased["all"].share for r in of_kind], hollow=True)
        for number, image in enumerate(images, start=len(kinds)):
            points(number, f"images, {image.encoder}", [image.planted[0]], [image.recovered], hollow=False)
            points(number, "_", [image.planted[0]], [image.erased], hollow=True)
            axis.plot(image.planted[1:], [image.recovered[0]] * 2, color=COLOURS[number % len(COLOURS)], linewidth=0.8)
        axis.set_xlabel("planted share of site in the variance at equal age and sex")
        axis.set_ylabel("recovered share, held-out subjects (hollow: behind the eraser)")
        axis.legend(loc="upper left")
    return figure


def main(
    output: Annotated[Path, typer.Option(help="Folder for the figure, its numbers and the phantom images.")] = Path(
        "runs/planted"
    ),
    seeds: Annotated[
        int, typer.Option(min=1, help="Tables of each kind, drawn with seeds 0, 1, ...; images are drawn once.")
    ] = 5,
) -> None:
    """Plant a site effect of known size, then ask: does the evaluation find it, does erasure remove it and nothing else?

    Tables: six sites, 40 features with curved age, sex and correlated noise, an offset a site in two known directions. The
    planted share of site in the variance at equal age and sex is set exactly; `recovered` is the evaluation's explained_variance
    on held-out subjects. `planted left` is what the eraser leaves of the planted variance (0: all gone), `rest kept` what it
    leaves of the variance outside of the planted directions (1: nothing else gone), `at planted rank` the same when it is
    told how many directions to erase (debias.erase_directions). `oracle` is age from the features without any offset. A site
    is hidden when the held-out probe is no better than `floor`, which knows age and sex alone.

    Images: every phantom anatomy is scanned on every scanner, so the share of the scanner in h is known without a model; the
    consortium, each subject on one scanner, must agree. There `planted left` is the variance between scanners that is left,
    `rest kept` that between anatomies, and `at planted rank` what erasing the true directions would keep of it.

    Prints a table and writes planted.png and planted.json; a few minutes on two cores. The same options give the same numbers.

    For a first look: --seeds 1
    """
    from simulations.cli import write_phantom

    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("isocenter").setLevel(logging.WARNING)
    started = time.monotonic()
    root = (output / "phantom").resolve()
    write_phantom(root, seed=0, scale=COHORT_SCALE)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tables", total=len(PLANS) * seeds)
        tables = []
        for plan in PLANS:
            for seed in range(seeds):
                tables.append(study_table(plan, seed, probes=plan.share == PROBED_SHARE))
                bar.advance(task)
        bar.update(task, description="tables through the apps", total=None)
        apps = [study_apps(Plan(share=PROBED_SHARE), 0, TABLE_RUN)]
        images = study_images(root, lambda text: bar.update(task, description=text), IMAGE_RUN, NUM_ANATOMIES)
    Console(width=160).print(tabulate(tables, apps, images))
    planted = [result for result in tables if result.plan.share > 0]
    typer.echo(
        f"intervals that hold the planted share: {holds(planted)} of {len(planted)}; with nothing planted "
        f"{holds(tables) - holds(planted)} of {len(tables) - len(planted)}"
    )
    gaps = [run.eraser_gap for run in apps] + [image.eraser_gap for image in images if image.eraser_gap is not None]
    typer.echo(f"projection of the runs' erasers against ours: at most {max(gaps):.1e} apart")
    output.mkdir(parents=True, exist_ok=True)
    draw(tables, images).savefig(output / "planted.png", dpi=150)
    content = {
        name: [asdict(result) for result in results] for name, results in (("tables", tables), ("apps", apps), ("images", images))
    }
    write_atomically(output / "planted.json", (json.dumps(content, indent=1) + "\n").encode())
    typer.echo(f"figure: {output / 'planted.png'}")
    typer.echo(f"figures: {output / 'planted.json'}; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
