"""What is said of a listing that could not ask every region: to a function of the caller's, else as a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

OnUnreachable = Callable[[Sequence[str]], None]
"""Told of regions that a listing could not ask, so that what lives there is missing from it."""


class IncompleteListing(UserWarning):
    """A listing could not ask every region, and nobody was told: give it `on_unreachable`."""


def told_once(on_unreachable: OnUnreachable | None) -> Callable[[Sequence[str]], None]:
    """Returns what tells of the regions of each page that was not told of before."""
    known: set[str] = set()

    def tell(regions: Sequence[str]) -> None:
        news = [region for region in regions if region not in known]
        known.update(news)
        if not news:
            return
        if on_unreachable is not None:
            on_unreachable(news)
        else:
            text = f"could not ask {', '.join(news)}: what lives there is missing from the listing"
            warnings.warn(text, IncompleteListing, stacklevel=2)

    return tell
