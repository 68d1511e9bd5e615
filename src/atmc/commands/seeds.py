"""Compare runs of two methods that differ in their seeds, image by image.

Torch is loaded only when a comparison is made: other tables do without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Member = Mapping[str, Any]


def is_difference(value: Any) -> bool:
    """Return whether a value is a difference with its interval, as `compare_members` returns it."""
    return isinstance(value, Mapping) and {"difference", "ci95", "pairs"} <= value.keys()


def compare_members(members: Sequence[Member], others: Sequence[Member] | None, measure: str) -> dict[str, Any] | None:
    """Return by how much runs beat others, in accuracy, with a 95 % interval; runs of the same seed are a pair.

    Args:
        members, others: runs with `seed` and `verify`, the JSON of `atmc verify`.
        measure: "certified" or "clean".

    Returns:
        None if there are no others, or no seed is in both; see `statistics.paired_difference`.

    Raises:
        ValueError: another measure, a seed that occurs twice, a run without verdicts, or different numbers of images.
    """
    import torch

    from atmc.evaluation.statistics import paired_difference

    if measure not in ("certified", "clean"):
        raise ValueError(f"expected 'certified' or 'clean' to compare by, got {measure!r}")
    ours, theirs = _by_seed(members), _by_seed(others or [])
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    rows = [[torch.tensor(_verdicts(runs[seed], measure)) for seed in seeds] for runs in (ours, theirs)]
    sizes = {len(row) for group in rows for row in group}
    if len(sizes) > 1:
        raise ValueError(f"expected verdicts on the same images, got {' and '.join(map(str, sorted(sizes)))} images")
    return paired_difference(torch.stack(rows[0]), torch.stack(rows[1])).to_json()


def _by_seed(members: Sequence[Member]) -> dict[int, Member]:
    """Return runs by their seeds."""
    runs = {member["seed"]: member for member in members}
    if len(runs) < len(members):
        raise ValueError("expected one run per seed in every group: name in `group` whatever else differs")
    return runs


def _verdicts(member: Member, measure: str) -> list[bool]:
    """Return for each image whether it is certified, or right without an attack."""
    verify = member.get("verify")
    if not verify or "verdicts" not in verify:
        raise ValueError(f"seed {member['seed']} has no verdicts of atmc verify: join its JSON as `verify`")
    if measure == "certified":
        return [verdict == "certified" for verdict in verify["verdicts"]]
    decided = zip(verify["verdicts"], verify["decided_by"], strict=True)
    return [not (verdict == "broken" and stage == "clean") for verdict, stage in decided]
