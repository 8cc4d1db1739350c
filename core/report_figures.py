"""The figures of a report: a site looks the same in all of them."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.metrics import roc_curve

from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation, NotEvaluableError
from core.evaluation.predictions import Predictions, operating_points, reliability, subject_rows
from core.evaluation.probes import planar_map
from core.evaluation.words import LINEAR_PROBES, find, linear_probe, with_interval
from core.report_record import STAGES, RunRecord, at_known_sites, in_order, row_labels, stage_words, tuned_of
from core.stages import STAGES as TUNED_STAGES

REFERENCES = ("chance", "age_sex_floor")
# Filled: a linear probe; the floor and chance drawn are those of the probe fitted on train.
PROBE_MARKERS = {
    **dict.fromkeys(LINEAR_PROBES, "o"),
    "balanced_accuracy_knn": "o",
    "balanced_accuracy_boosting": "s",
    "balanced_accuracy_heldout": "D",
}
HOLLOW = (
    "balanced_accuracy_knn",
    "balanced_accuracy_nearest",
    "balanced_accuracy_boosting",
    "mae_unseen",
    "mae_sums_unseen",
    "auc_unseen",
)
AGE_ERRORS = ("mae", "mae_unseen", "mae_sums", "mae_sums_unseen")
AREAS = ("auc", "auc_lda", "auc_binned")
TARGET_FIGURE = "target_"
MAX_SCANS_IN_MAP = 1000
MAX_SITES_IN_LEGEND = 21
# Okabe and Ito's colours without yellow, which is too light on white; the marker tells sites apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
INK, SOFT, GRID = "#1c2530", "#5d6975", "#e2e6ea"
FROZEN = ("raw", "untrained", "pretrained", "erased")
TUNED_COLOURS = {**{str(stage): "#0072B2" for stage in TUNED_STAGES}, "from_scratch": "#D55E00", "pretrained": INK}
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": "#aab3bb",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
}


@dataclass(frozen=True)
class Look:
    """How a site is drawn, everywhere."""

    colour: str
    marker: str
    line: str


def site_looks(record: RunRecord) -> dict[str, Look]:
    """A look for each site, in the order in which the record names them."""
    named = [str(site["name"]) for site in record.sites]
    met = [site for line in record.rounds for site in line["sites"]]
    met += [site for embeddings in record.maps.values() for site in np.unique(embeddings.site).tolist()]
    met += [e.site for e in record.evaluations if e.site != "all"]
    met += [site for found in record.predictions.values() for site in np.unique(found.site).tolist()]
    sites = [*dict.fromkeys(named), *sorted(set(met) - set(named))]
    return {
        site: Look(
            COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)], LINES[i // len(COLOURS) % len(LINES)]
        )
        for i, site in enumerate(sites)
    }


def draw_figures(record: RunRecord, looks: Mapping[str, Look]) -> tuple[dict[str, bytes], list[str]]:
    """PNG by name, those for which there is something to draw, and remarks on the map."""
    tuned = tuned_of(record)
    with rc_context(STYLE):
        map_figure, map_notes = _draw_maps(record.maps, looks)
        drawn = {
            "losses_pretraining": _draw_losses(record.rounds, looks, pretraining=True),
            "losses_finetuning": _draw_losses(record.rounds, looks, pretraining=False),
            "embeddings": map_figure,
            "site_predictability": _draw_site_predictability(record.evaluations),
            "age_error": _draw_age_error([e for e in record.evaluations if not tuned.owns(e)], looks),
            **{
                "diagnosis_auc" if task == "diagnosis" else f"{TARGET_FIGURE}{number}": _draw_target(
                    [e for e in record.evaluations if e.task == task and tuned.owns(e)], looks
                )
                for number, task in enumerate(tuned.tasks, start=1)
            },
            "predictions": _draw_predictions(at_known_sites(record), looks),
        }
        return {name: _png(figure) for name, figure in drawn.items() if figure is not None}, map_notes


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=170, metadata={"Software": None})
    return content.getvalue()


def _short(name: str, length: int = 26) -> str:
    """A name for a legend, which leaves out what starts with an underscore."""
    name = " ".join(name.split())
    name = name if len(name) <= length else name[: length - 1] + "…"
    return f" {name}" if name.startswith("_") else name


def _draw_losses(rounds: Sequence[Mapping[str, Any]], looks: Mapping[str, Look], *, pretraining: bool) -> Figure | None:
    lines = [line for line in rounds if (line["stage"] == "pretrain") == pretraining]
    panels = [(stage, "loss") for stage in dict.fromkeys(line["stage"] for line in lines)]
    if any(values.get("fairkl") for line in lines for values in line["sites"].values()):
        panels += [(stage, "fairkl") for stage, _ in panels]
    if not panels:
        return None
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (stage, metric) in zip(axes, panels, strict=True):
        for site, look in looks.items():
            points = [
                (line["round"], line["sites"][site][metric])
                for line in lines
                if line["stage"] == stage and metric in line["sites"].get(site, {})
            ]
            finite = [(number, value) for number, value in points if math.isfinite(value)]
            every = max(1, len(finite) // 8)
            if finite:
                axis.plot(
                    *zip(*finite, strict=True),
                    color=look.colour,
                    linestyle=look.line,
                    marker=look.marker,
                    markersize=4,
                    markevery=every,
                )
        axis.set_title(f"{_short(stage_words(stage))}, {'FairKL' if metric == 'fairkl' else metric}")
        axis.set_xlabel("round")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y")
    present = [site for site in looks if any(site in line["sites"] for line in lines)]
    _site_legend(figure, present, looks, lines=True)
    return figure


def _site_legend(figure: Figure, sites: Sequence[str], looks: Mapping[str, Look], *, lines: bool) -> None:
    shown = sites[:MAX_SITES_IN_LEGEND]
    handles = [
        Line2D(
            [],
            [],
            color=looks[site].colour,
            marker=looks[site].marker,
            linestyle=looks[site].line if lines else "none",
            markersize=5.5,
            label=_short(site),
        )
        for site in shown
    ]
    if len(sites) > len(shown):
        handles.append(Line2D([], [], linestyle="none", label=f"and {len(sites) - len(shown)} more sites"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), columnspacing=2.2)


def _draw_maps(maps: Mapping[str, Embeddings], looks: Mapping[str, Look]) -> tuple[Figure | None, list[str]]:
    """Rows are stages, columns are site, age and diagnosis."""
    notes, rows = [], []
    for stage in sorted(maps, key=lambda stage: (*STAGES, stage).index(stage)):
        embeddings = maps[stage]
        if len(embeddings) > MAX_SCANS_IN_MAP:
            notes.append(f"{stage_words(stage)}: {MAX_SCANS_IN_MAP} of {len(embeddings)} scans are drawn, chosen at random.")
            chosen = np.random.default_rng(0).choice(len(embeddings), MAX_SCANS_IN_MAP, replace=False)
            embeddings = embeddings.select(np.sort(chosen))
        try:
            rows.append((stage, embeddings, planar_map(embeddings)))
        except NotEvaluableError as reason:
            notes.append(f"{stage_words(stage)}: {reason}")
    if not rows:
        return None, notes
    ages = np.concatenate([embeddings.age_years for _, embeddings, _ in rows])
    has_ages = bool(np.isfinite(ages).any())
    figure = Figure(figsize=(10, 3.15 * len(rows) + 0.75), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for axes_row, (stage, embeddings, place_N2) in zip(axes, rows, strict=True):
        for axis, title in zip(axes_row, ("by site", "by age", "by diagnosis"), strict=True):
            axis.set(xticks=[], yticks=[], title=f"{_short(stage_words(stage))}, {title}")
            axis.set_box_aspect(0.86)
            axis.margins(0.06)
            axis.spines[:].set(visible=True, color=GRID)
        for held_out in (False, True):
            size, opacity, edge = (30, 0.95, 0.5) if held_out else (11, 0.4, 0.0)
            common = {"s": size, "alpha": opacity, "linewidths": edge, "edgecolors": "white"}
            part = (embeddings.split == "test") == held_out
            for site in [site for site in looks if (embeddings.site[part] == site).any()]:
                at = place_N2[part & (embeddings.site == site)]
                axes_row[0].scatter(*at.T, color=looks[site].colour, marker=looks[site].marker, **common)
            unknown = part & ~np.isfinite(embeddings.age_years)
            axes_row[1].scatter(*place_N2[unknown].T, color="#c9cfd4", marker="x", s=size, alpha=opacity, linewidths=0.8)
            if has_ages:
                known = part & ~unknown
                points = axes_row[1].scatter(
                    *place_N2[known].T,
                    c=embeddings.age_years[known],
                    cmap="viridis",
                    vmin=np.nanmin(ages),
                    vmax=np.nanmax(ages),
                    **common,
                )
            for diagnosis, (colour, marker, _) in DIAGNOSIS_LOOKS.items():
                at = place_N2[part & (embeddings.diagnosis == diagnosis)]
                axes_row[2].scatter(*at.T, color=colour, marker=marker, **common)
    if has_ages:
        bar = figure.colorbar(points, cax=axes[-1, 1].inset_axes((0.12, -0.075, 0.76, 0.035)), orientation="horizontal")
        bar.outline.set_visible(False)
        bar.set_label("age, years", labelpad=1)
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=5.5, label=label)
        for diagnosis, (colour, marker, label) in DIAGNOSIS_LOOKS.items()
        if any((embeddings.diagnosis == diagnosis).any() for _, embeddings, _ in rows)
    ]
    axes[-1, 2].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=len(handles))
    present = [site for site in looks if any((embeddings.site == site).any() for _, embeddings, _ in rows)]
    _site_legend(figure, present, looks, lines=False)
    return figure, notes


DIAGNOSIS_LOOKS = {
    "": ("#c9cfd4", ".", "unknown"),
    "control": ("#56B4E9", "o", "control"),
    "patient": ("#D55E00", "^", "patient"),
}


def _draw_site_predictability(evaluations: Sequence[Evaluation]) -> Figure | None:
    panels = []
    for task in ("site", "scanner"):
        rows = in_order(
            e
            for e in evaluations
            if e.task == task and e.site == "all" and e.stage not in REFERENCES and e.metric in PROBE_MARKERS
        )
        if rows:
            panels.append((task, rows))
    if not panels:
        return None
    tallest = max(len(rows) for _, rows in panels)
    figure = Figure(figsize=(10, 1.5 + 0.3 * tallest), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (task, rows) in zip(axes, panels, strict=True):
        for stage, colour in (("chance", SOFT), ("age_sex_floor", "#009E73")):
            reference = find(evaluations, stage, task, linear_probe(evaluations))
            if reference is None:
                continue
            axis.axvline(reference.value, color=colour, linewidth=1.2, linestyle=":" if stage == "chance" else "-", zorder=1)
            if reference.low is not None:
                axis.axvspan(reference.low, reference.high, color=colour, alpha=0.1, linewidth=0, zorder=0)
        labels = row_labels(rows)
        colours = [INK if e.stage == "pretrained" else SOFT for e in rows]
        _dots(axis, rows, labels, colours, [PROBE_MARKERS[e.metric] for e in rows])
        if axis is not axes[0] and labels == row_labels(panels[0][1]):
            axis.set_yticklabels([])
        axis.set(title=f"Which {task}?", xlabel="balanced accuracy", xlim=(0, 1))
    handles = [
        Line2D([], [], color=INK, marker="o", linestyle="-", linewidth=1.2, label="linear probe"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="white", linestyle="-", linewidth=1.2, label="10-NN"),
        Line2D([], [], color=INK, marker="s", markerfacecolor="white", linestyle="-", linewidth=1.2, label="boosting"),
        Line2D([], [], color=INK, marker="D", linestyle="-", linewidth=1.2, label="linear, among held-out subjects"),
        Line2D([], [], color="#009E73", linewidth=1.2, label="floor of the linear probe: age and sex only, 95 % band"),
        Line2D([], [], color=SOFT, linewidth=1.2, linestyle=":", label="chance"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=2.2)
    return figure


def _draw_age_error(evaluations: Sequence[Evaluation], looks: Mapping[str, Look]) -> Figure | None:
    errors = [e for e in evaluations if e.task == "age" and e.metric in AGE_ERRORS]
    overall = in_order(e for e in errors if e.site == "all")
    if not overall:
        return None
    last = "pretrained" if any(e.stage == "pretrained" for e in overall) else overall[-1].stage
    single = [e for site in looks for e in errors if e.site == site and e.stage == last]
    panels = 2 if single else 1
    figure = Figure(figsize=(10, 1.2 + 0.3 * max(len(overall), len(single))), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharex=True)[0]
    unseen = {True: ", unseen sites", False: ""}
    labels = [f"{label}{unseen[e.metric.endswith('_unseen')]}" for e, label in zip(overall, row_labels(overall), strict=True)]
    _dots(axes[0], overall, labels, [INK if e.stage == "pretrained" else SOFT for e in overall])
    axes[0].set(title="All sites", xlabel="mean absolute error, years")
    if single:
        labels = [f"{_short(e.site)}{' (unseen)' if e.metric.endswith('_unseen') else ''}" for e in single]
        markers = [looks[e.site].marker for e in single]
        _dots(axes[1], single, labels, [looks[e.site].colour for e in single], markers)
        axes[1].set(title=f"{_short(stage_words(last))}, by site", xlabel="mean absolute error, years")
    axes[0].set_xlim(left=0)
    return figure


def _draw_target(evaluations: Sequence[Evaluation], looks: Mapping[str, Look]) -> Figure | None:
    """AUC, or the mean absolute error, of a task that is fine-tuned: by stage, and by site of the last stage but from scratch."""
    areas = any(e.metric in AREAS and e.site == "all" for e in evaluations)
    metrics, unseen = (AREAS, "auc_unseen") if areas else (("mae",), "mae_unseen")
    rows = in_order(e for e in evaluations if e.site == "all" and e.metric in (*metrics, unseen))
    if not rows:
        return None
    by_site = [e for site in looks for e in evaluations if e.site == site and e.metric in (*metrics, unseen)]
    stages = [e.stage for e in rows if any(e.stage == single.stage for single in by_site)]
    last = next((stage for stage in reversed(stages) if stage != "from_scratch"), stages[-1] if stages else None)
    single = [e for e in by_site if e.stage == last and e.regime == by_site[-1].regime]
    figure = Figure(figsize=(10, 1.1 + 0.32 * max(len(rows), len(single))), layout="constrained")
    axes = figure.subplots(1, 2 if single else 1, squeeze=False, sharex=True)[0]
    labels = [
        f"{label}{', frozen' if e.stage in FROZEN[:3] else ''}{', unseen sites' if e.metric == unseen else ''}"
        for e, label in zip(rows, row_labels(rows), strict=True)
    ]
    _dots(axes[0], rows, labels, [TUNED_COLOURS.get(e.stage, SOFT) for e in rows])
    if single:
        labels = [f"{_short(e.site)}{' (unseen)' if e.metric == unseen else ''}" for e in single]
        _dots(axes[1], single, labels, [looks[e.site].colour for e in single], [looks[e.site].marker for e in single])
        axes[0].set_title("All sites")
        axes[1].set_title(f"{_short(stage_words(str(last)))}, by site")
    for axis in axes:
        if areas:
            low = min(0.4, *(e.value if e.low is None else e.low for e in [*rows, *single]))
            axis.axvline(0.5, color=SOFT, linewidth=1.2, linestyle=":", zorder=1)
            axis.set(xlabel="area under the ROC curve (dotted: 0.5, a coin)", xlim=(max(0.0, low - 0.03), 1))
        else:
            axis.set_xlabel(f"mean absolute error{', years' if rows[0].task == 'age' else ''}")
            axis.set_xlim(left=0)
    return figure


def _draw_predictions(known: Mapping[str, Predictions], looks: Mapping[str, Look]) -> Figure | None:
    """By stage, of held-out subjects: the ROC curve, how often scores come true, or predicted against true numbers."""
    panels: dict[str, list[str]] = {}
    for stage, found in known.items():
        if len(subject_rows(found, "test").truth_M):
            kinds = {"regression": ("scatter",), "binary": ("roc", "reliability")}.get(found.target.kind, ("reliability",))
            for kind in kinds:
                panels.setdefault(kind, []).append(stage)
    if not panels:
        return None
    most = max(map(len, panels.values()))
    grid = (
        [[(kind, stage) for kind in panels for stage in panels[kind]]]
        if most == 1
        else [[(kind, stage) for stage in stages] for kind, stages in panels.items()]
    )
    columns = max(3, *map(len, grid))
    figure = Figure(figsize=(10, (10 / columns + 0.35) * len(grid) + 0.5), layout="constrained")
    axes = figure.subplots(len(grid), columns, squeeze=False)
    draw = {"roc": _draw_roc, "reliability": _draw_reliability}
    for axes_row, row in zip(axes, grid, strict=True):
        for axis, place in zip(axes_row, [*row, *[None] * (columns - len(row))], strict=True):
            if place is None:
                axis.set_axis_off()
                continue
            kind, stage = place
            axis.set_box_aspect(1)
            axis.grid()
            if kind == "scatter":
                _draw_scatter(axis, known[stage], looks)
            else:
                draw[kind](axis, known[stage], TUNED_COLOURS.get(stage, SOFT))
                axis.plot((0, 1), (0, 1), color=SOFT, linewidth=1.2, linestyle=":", zorder=1)
                axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axis.set_title(_short(stage_words(stage)))
            if axis is not axes_row[0] and kind == row[0][0]:
                axis.set_ylabel("")
    if "scatter" in panels:
        present = [site for site in looks if any((found.site == site).any() for found in known.values())]
        _site_legend(figure, present, looks, lines=False)
        return figure
    handles = [
        Line2D([], [], color=INK, marker="o", markersize=7, linestyle="-", label="ROC curve, operating point"),
        Line2D([], [], color=INK, marker="s", markersize=5, linestyle="-", linewidth=1.2, label="share that came true, 95 %"),
        Line2D(
            [],
            [],
            color=SOFT,
            linewidth=1.2,
            linestyle=":",
            label=f"{'a coin; ' if 'roc' in panels else ''}scores that mean what they say",
        ),
    ]
    figure.legend(handles=handles if "roc" in panels else handles[1:], loc="outside lower center", ncols=3, columnspacing=2.2)
    return figure


def _draw_roc(axis: Any, found: Predictions, colour: str) -> None:
    """The curve of held-out subjects, and where the operating point chosen on val lies on it."""
    rows = subject_rows(found, "test")
    axis.set(xlabel="1 - specificity", ylabel="sensitivity")
    positive_M, score_M = rows.truth_M == 1, rows.score_MK[:, 0]
    if positive_M.all() or not positive_M.any():
        axis.text(0.5, 0.5, "one class only", ha="center", va="center", color=SOFT)
        return
    false, true, _ = roc_curve(positive_M, score_M)
    axis.plot(false, true, color=colour, zorder=2)
    threshold = operating_points(found)[0][0]
    sensitivity, specificity = (score_M[positive_M] >= threshold).mean(), (score_M[~positive_M] < threshold).mean()
    axis.plot(1 - specificity, sensitivity, marker="o", color=colour, markersize=7, zorder=3)
    lines = (f"from score {threshold:.2f}", f"sensitivity {sensitivity:.2f}", f"specificity {specificity:.2f}")
    axis.text(0.97, 0.05, "\n".join(lines), ha="right", va="bottom", fontsize=8, color=SOFT, linespacing=1.4)


def _draw_reliability(axis: Any, found: Predictions, colour: str) -> None:
    """How often scores come true."""
    bins = reliability(found)
    what = "probability of the class told" if found.target.kind == "multiclass" else "predicted probability"
    axis.set(xlabel=what, ylabel="share that came true")
    if not bins:
        axis.text(0.5, 0.5, "too few subjects", ha="center", va="center", color=SOFT)
        return
    for place in bins:
        axis.plot([place.mean_score] * 2, [place.low, place.high], color=colour, linewidth=1.2, alpha=0.55, zorder=2)
    axis.plot(
        [place.mean_score for place in bins],
        [place.frequency for place in bins],
        color=colour,
        marker="s",
        markersize=4.5,
        linewidth=1.2,
        zorder=3,
    )


def _draw_scatter(axis: Any, found: Predictions, looks: Mapping[str, Look]) -> None:
    """Predicted against true numbers of held-out subjects, by site."""
    rows = subject_rows(found, "test")
    for site in [site for site in looks if (rows.site_M == site).any()]:
        at = rows.site_M == site
        common = {"color": looks[site].colour, "marker": looks[site].marker, "s": 20, "alpha": 0.75, "linewidths": 0.4}
        axis.scatter(rows.truth_M[at], rows.score_MK[at, 0], edgecolors="white", zorder=2, **common)
    low, high = (limit(rows.truth_M.tolist() + rows.score_MK[:, 0].tolist()) for limit in (min, max))
    margin = 0.05 * (high - low) or 1.0
    axis.plot((low, high), (low, high), color=SOFT, linewidth=1.2, linestyle=":", zorder=1)
    unit = ", years" if found.target.task == "age" else ""
    limits = (low - margin, high + margin)
    axis.set(xlabel=_short(f"true {found.target.task}{unit}"), ylabel=_short(f"predicted{unit}"), xlim=limits, ylim=limits)


def _dots(
    axis: Any,
    rows: Sequence[Evaluation],
    labels: Sequence[str],
    colours: Sequence[str],
    markers: Sequence[str] | None = None,
) -> None:
    """One line a figure, from the top: the value as a dot, hollow for the second probe or set, its interval, the number."""
    for place, (e, colour, marker) in enumerate(zip(rows, colours, markers or ["o"] * len(rows), strict=True)):
        hollow = e.metric in HOLLOW
        if e.low is not None:
            axis.plot([e.low, e.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="round", zorder=2)
        axis.plot(
            e.value,
            place,
            marker=marker,
            color=colour,
            markersize=7,
            markerfacecolor="white" if hollow else colour,
            markeredgewidth=1.6,
            zorder=3,
        )
        axis.annotate(
            with_interval(e),
            (1.015, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
            color=colour if colour == INK else SOFT,
        )
    axis.set_yticks(range(len(rows)), [_short(label, 40) for label in _once(labels)])
    axis.tick_params(axis="y", labelcolor=INK)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)


def _once(labels: Sequence[str]) -> list[str]:
    """Labels without what repeats the line above."""
    return ["" if i and label == labels[i - 1] else label for i, label in enumerate(labels)]
