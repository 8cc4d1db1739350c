"""What training begins with: an encoder of ours, or the weights of any .safetensors under names of their own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from core.checkpoint import last_checkpoints, load_checkpoint

RANDOM = Path("random")


class StartError(ValueError):
    """A start that cannot be loaded; one line that says what to change."""


@dataclass(frozen=True)
class Start:
    """An encoder's weights.

    Attributes:
        name: what it is called in errors.
        encoder: weights by name, each beginning with ``encoder.``; none: random ones.
        config: the configuration of the run that gave it; None for weights of others.
    """

    name: str
    encoder: dict[str, Tensor]
    config: dict[str, Any] | None

    def told(self) -> dict[str, Any]:
        """What a checkpoint that began with it carries under ``begun_with``: how it was pretrained, as far as that is known."""
        if not self.encoder:
            return {}
        if self.config is None:
            return {"begun_with": {"objective": None}}
        if self.config["num_rounds"] == 0 and "begun_with" in self.config:
            return {"begun_with": self.config["begun_with"]}
        kept = {key: self.config[key] for key in ("objective", "debias", "num_rounds", "local_steps", "batch_size", "seed")}
        return {"begun_with": kept | {"pretrain_on": self.config["data"].get("pretrain_on", "controls")}}


def read_start(path: Path, keys: Sequence[str] = ()) -> Start:
    """Read the encoder of a run's folder, of a checkpoint, of an export, or of any .safetensors.

    Args:
        path: of a run the last checkpoint of pretraining is read; ``random``: random weights, none are read.
        keys: ``OLD:NEW``, what names in the file begin with and what is written in its place; without NEW they are dropped. The
            longest that fits counts. Every name of the file must be told for when any is.

    Raises:
        StartError: there is no such file, it holds no encoder, or a name is told for in no way.
    """
    if wrong := [key for key in keys if key.count(":") != 1]:
        raise StartError(f"start_keys: each must be OLD:NEW, how names begin there and here, got {wrong[0]!r}.")
    if path == RANDOM:
        return Start("random", {}, None)
    file = _file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StartError(
            f"start: {file.name} must be a readable .safetensors file, got {type(error).__name__}. Name another."
        ) from None
    config = load_checkpoint(file).config if "isocenter" in metadata else _exported_config(metadata)
    if keys:
        state = _renamed(state, dict(key.split(":", 1) for key in keys), file.name)
    encoder = {name: value for name, value in state.items() if name.startswith("encoder.")}
    if not encoder:
        names = ", ".join(sorted(state)[:3])
        raise StartError(
            f"start: {file.name} must hold weights whose names begin with encoder., got {names}, ... "
            "Say what their names begin with: 'start_keys=[\"backbone.:encoder.\"]'."
        )
    if bad := sorted(name for name, value in encoder.items() if value.is_floating_point() and not value.isfinite().all()):
        raise StartError(f"start: the weights of {file.name} must be finite, {bad[0]} and {len(bad) - 1} others are not.")
    return Start(file.name, encoder, config)


def load_start(encoder: nn.Module, start: Start) -> None:
    """Put the weights into an encoder: all of them, and no other.

    Raises:
        StartError: names or shapes are those of another architecture.
    """
    if not start.encoder:
        return
    wanted = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    missing, more = sorted(set(wanted) - set(start.encoder)), sorted(set(start.encoder) - set(wanted))
    shapes = sorted(name for name in set(wanted) & set(start.encoder) if wanted[name].shape != start.encoder[name].shape)
    if missing or more or shapes:
        told = [f"{len(names)} {what} (such as {names[0]})" for names, what in ((missing, "missing"), (more, "more")) if names]
        if shapes:
            told.append(
                f"{len(shapes)} of another shape (such as {shapes[0]}, {tuple(start.encoder[shapes[0]].shape)} "
                f"for {tuple(wanted[shapes[0]].shape)})"
            )
        raise StartError(
            f"start: {start.name} must be an encoder of the run's architecture, got one with {', '.join(told)}. "
            "Choose encoder=... as it was trained, or map names with start_keys."
        )
    encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in start.encoder.items()})


def _file(path: Path) -> Path:
    """The checkpoint that a path means."""
    if path.is_file():
        return path
    if not path.exists():
        raise StartError(f"start: {path.name} must be a run's folder or a .safetensors file, there is none. Mend the path.")
    exported = path / "encoder.safetensors"
    if exported.is_file():
        return exported
    found = last_checkpoints(path).get("pretrain")
    if found is None:
        raise StartError(
            f"start: {path.name} must hold checkpoints/pretrain-*.safetensors or encoder.safetensors, it has neither. "
            "Name a run that has pretrained, or a file."
        )
    return found


def _exported_config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    for text in metadata.values():
        try:
            about = json.loads(text)
        except ValueError:
            continue
        if isinstance(about, dict) and isinstance(about.get("config"), dict):
            config: dict[str, Any] = about["config"]
            return config
    return None


def _renamed(state: Mapping[str, Tensor], keys: Mapping[str, str], name: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        fits = [begin for begin in keys if key.startswith(begin)]
        if not fits:
            raise StartError(
                f"start_keys: they must say what becomes of every name in {name}, got none for {key}. "
                "Add its beginning, alone to drop it: 'start_keys=[\"head.:\",...]'."
            )
        begin = max(fits, key=len)
        if not keys[begin]:
            continue
        if (new := keys[begin] + key.removeprefix(begin)) in renamed:
            raise StartError(f"start_keys: two names must not become one, got {new} twice. Mend them.")
        renamed[new] = value
    return renamed
