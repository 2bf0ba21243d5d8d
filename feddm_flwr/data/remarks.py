"""What a user should hear of images before they are trained on, in counts: none of it tells what is in one."""

from __future__ import annotations

from feddm_flwr.data.images import Decoded, Images, nearly_flat
from feddm_flwr.data.source import Source

#: The share of clipped values above which it is remarked.
MANY = 0.01


def remarks_on(source: Source, decoded: Decoded, images: Images, *, whole: bool) -> dict[str, int]:
    """Returns what there is to remark on decoded images and how many there are of it; `whole`: also on what the source
    has beside them, which the nodes of a simulation have in common."""
    black, white = nearly_flat(images)
    values = decoded.values
    found = {
        "pages or frames left out": decoded.pages,
        "images nearly all black": black,
        "images nearly all white": white,
        "percent of the values are clipped by data.black or data.white": (
            round(100 * values.clipped / values.count) if values.clipped > MANY * values.count else 0
        ),
    }
    if whole:
        found |= {f"files passed over, {ending}": count for ending, count in source.passed_over} | dict(source.left_out)
        found["columns with images that are not read"] = len(source.other_columns)
    return {what: count for what, count in found.items() if count}
