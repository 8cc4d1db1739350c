"""Failures in words that may leave a site; nothing heavy is imported here, so that a thin process can tell them too."""

import logging
import re
import secrets

log = logging.getLogger("isocenter")


class SiteError(Exception):
    """A failure at a site, in words that may leave it: no subject, no path, no value of a scan.

    Args:
        kind: a fixed word the server decides by, e.g. ``not_finite``.
        text: one sentence.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"[isocenter:{kind}] {text}")
        self.kind = kind
        self.text = text


def incident() -> SiteError:
    """What leaves of the exception that is being handled: a number, by which the site's local log tells it."""
    number = secrets.token_hex(4)
    log.exception("incident %s", number)
    return SiteError("incident", f"incident {number}: see the site's local log.")


def error_kind(reason: str) -> tuple[str, str]:
    """Kind and sentence of a failure a site reported; ``unknown`` when the text is not one of ours."""
    found = re.search(r"\[isocenter:(\w+)\] (.*)", reason, re.DOTALL)
    # Flower puts the text of an exception in <'...'>.
    return (found[1], found[2].strip().removesuffix("'>")) if found else ("unknown", reason.strip() or "no reason given")
