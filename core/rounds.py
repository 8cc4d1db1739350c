"""Rounds over sites inside one process: train, average, validate, keep; killed at any moment, they go on where they stopped."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from core.checkpoint import write_atomically
from core.training import TrainResult

State = dict[str, Tensor]
Train = Callable[[State, int], Mapping[str, TrainResult]]
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ended:
    """What the rounds of a stage gave.

    Attributes:
        state: weights of the round that is taken.
        round_number: that round; the last, or with validation the best.
        history: what each round told, in order: its number, its terms by site, its validation loss.
    """

    state: State
    round_number: int
    history: list[dict[str, Any]]


def kept(result: TrainResult) -> TrainResult:
    """The result with weights of its own: those of a model that goes on being trained change under it."""
    return replace(result, state={name: value.detach().cpu().clone() for name, value in result.state.items()})


def average(state: State, results: Mapping[str, TrainResult]) -> State:
    """The weights after a round: those trained averaged by the number of scans, in the order of the sites' names.

    The arithmetic is that of Flower's FedAvg, so that rounds here and rounds of a federation give the same bits.
    """
    ordered = [results[site] for site in sorted(results)]
    whole = sum(result.num_scans for result in ordered)
    averaged = dict(state)
    for name in ordered[0].state:
        first, *others = [result.state[name] * (result.num_scans / whole) for result in ordered]
        averaged[name] = sum(others, first)
    return averaged


def run_rounds(
    stage: str,
    state: State,
    train: Train,
    *,
    num_rounds: int,
    validate: Callable[[State], float] | None = None,
    patience: int | None = None,
    file: Path | None = None,
    tell: Tell = lambda _line: None,
) -> Ended:
    """All rounds of a stage.

    A round depends on its number and the weights alone, and the file holds both after every round, written atomically: a stage
    that was killed ends with the weights of one that was not.

    Args:
        stage: for the lines that are told.
        state: weights before the first round.
        train: every site's result of a round from its weights.
        num_rounds: at most so many.
        validate: loss of weights on subjects that no step saw; None: the last round is taken.
        patience: with ``validate``: rounds without a smaller loss after which no more follow; None: all are made.
        file: keeps the progress; None: nothing is kept.
        tell: called with each round's line.
    """
    best, history = dict(state), list[dict[str, Any]]()
    if file is not None and file.exists():
        state, best, history = _read(file)
    while not _is_over(history, num_rounds, patience):
        round_number = len(history) + 1
        results = train(state, round_number)
        state = average(state, results)
        line: dict[str, Any] = {
            "stage": stage,
            "round": round_number,
            "seconds": round(sum(result.seconds for result in results.values()), 3),
            "sites": {site: results[site].metrics for site in sorted(results)},
        }
        if any(result.privacy for result in results.values()):
            line["privacy"] = {site: results[site].privacy for site in sorted(results)}
        if validate is not None:
            line["validation_loss"] = validate(state)
        history.append(line)
        if _best_round(history) == round_number:
            best = state
        if file is not None:
            _write(file, state, best, history)
        tell(line)
    return Ended(best, _best_round(history), history)


def _best_round(history: list[dict[str, Any]]) -> int:
    """The round of the smallest validation loss, the first of equals; the last where there is none; 0 before any."""
    if not history or "validation_loss" not in history[0]:
        return len(history)
    return int(min(history, key=lambda line: line["validation_loss"])["round"])


def _is_over(history: list[dict[str, Any]], num_rounds: int, patience: int | None) -> bool:
    return len(history) >= num_rounds or (patience is not None and len(history) - _best_round(history) >= patience)


def _write(file: Path, state: State, best: State, history: list[dict[str, Any]]) -> None:
    tensors = {f"now/{name}": value.contiguous() for name, value in state.items()}
    # Weights that are the same in both are written once.
    tensors |= {f"best/{name}": value.contiguous() for name, value in best.items() if not value.equal(state[name])}
    write_atomically(file, save(tensors, {"progress": json.dumps({"history": history})}))


def _read(file: Path) -> tuple[State, State, list[dict[str, Any]]]:
    with safe_open(file, framework="pt") as opened:
        history = json.loads(opened.metadata()["progress"])["history"]
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    state = {name.removeprefix("now/"): value for name, value in tensors.items() if name.startswith("now/")}
    best = state | {name.removeprefix("best/"): value for name, value in tensors.items() if name.startswith("best/")}
    return state, best, history
