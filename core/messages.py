"""What a site tells is a frozen dataclass of tensors: its fields are checked when it is built, and its gaps named.

A message that leaves something out says what and why in its field ``withheld``, in words that may leave the site.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_fields(where: str, message: object, shapes: Mapping[str, tuple[int, ...]], *, positive: Tensor | None = None) -> None:
    """Refuse a message with a field of another shape, a value that is not finite, or a count that is not positive.

    Args:
        where: what the message is, for the error.
        message: the dataclass.
        shapes: what shape fields must have, by name.
        positive: the counts that must be positive, where it has any.

    Raises:
        ValueError: it is refused.
    """
    fields = vars(message)
    for name, shape in shapes.items():
        if tuple(fields[name].shape) != shape:
            raise ValueError(f"{where}: {name} must have shape {shape}, got {tuple(fields[name].shape)}.")
    if not all(value.isfinite().all() for value in fields.values() if isinstance(value, Tensor)):
        raise ValueError(f"{where}: values must be finite, got some that are not. Ask the site for its log.")
    if positive is not None and (positive <= 0).any():
        raise ValueError(f"{where}: counts must be positive, got {positive.tolist()!r}. Ask the site for its log.")


def notes_of(parts: Mapping[str, Any]) -> tuple[str, ...]:
    """What the sites' messages, by site, withhold and why, each under its site's name."""
    return tuple(f"{site}: {reason}" for site in sorted(parts) for reason in parts[site].withheld)
