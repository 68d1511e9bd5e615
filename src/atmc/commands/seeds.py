"""Compare runs of two methods that differ in their seeds, image by image.

Torch is loaded only when a comparison is made: other tables do without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from atmc.core.errors import unknown

Member = Mapping[str, Any]


def is_difference(value: Any) -> bool:
    """Return whether a value is a difference with its interval, as `compare_members` returns it."""
    return isinstance(value, Mapping) and {"difference", "ci95", "pairs"} <= value.keys()


def compare_members(members: Sequence[Member], others: Sequence[Member] | None, measure: str) -> dict[str, Any] | None:
    """Return by how much runs beat others, in accuracy, with a 95 % interval; runs of the same seed are a pair.

    Args:
        members, others: runs with `seed`, and `verify` or `evaluation`, the JSON of the command of this name.
        measure: "certified", "clean", an attack of the evaluations, or "worst_case" of all their attacks.

    Returns:
        None if there are no others, or no seed is in both; see `statistics.paired_difference`.

    Raises:
        ValueError: a run without a seed or without verdicts of this measure, a seed that occurs twice, or other data,
            another threat or another number of images.
    """
    import torch

    from atmc.evaluation.statistics import paired_difference

    ours, theirs = _by_seed(members), _by_seed(others or [])
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    pairs = [(_document(ours[seed], measure), _document(theirs[seed], measure)) for seed in seeds]
    _check_comparable([document for pair in pairs for document in pair], measure)
    rows = [[torch.tensor(_verdicts(document, measure)) for document in group] for group in zip(*pairs, strict=True)]
    sizes = {len(row) for group in rows for row in group}
    if len(sizes) > 1:
        raise ValueError(f"expected verdicts on the same images, got {' and '.join(map(str, sorted(sizes)))} images")
    return paired_difference(torch.stack(rows[0]), torch.stack(rows[1])).to_json()


def _by_seed(members: Sequence[Member]) -> dict[int, Member]:
    """Return runs by their seeds."""
    if any("seed" not in member for member in members):
        raise ValueError("expected runs with a seed to compare, got a result without one")
    runs = {member["seed"]: member for member in members}
    if len(runs) < len(members):
        raise ValueError("expected one run per seed in every group: name in `group` whatever else differs")
    return runs


def _document(member: Member, measure: str) -> Mapping[str, Any]:
    """Return the JSON that holds a run's verdicts: of atmc verify for proofs, and for clean images if it is there."""
    by_proof = measure == "certified" or (measure == "clean" and bool(member.get("verify")))
    name, key = ("verify", "verdicts") if by_proof else ("evaluation", "wrong")
    document = member.get(name)
    if not document or key not in document:
        raise ValueError(
            f"seed {member['seed']} has no verdicts for {measure!r}: join the JSON of atmc "
            f"{'verify' if by_proof else 'evaluate'} as `{name}`"
        )
    return cast("Mapping[str, Any]", document)


def _check_comparable(documents: Sequence[Mapping[str, Any]], measure: str) -> None:
    """Refuse verdicts on other data or, but for clean images, under another threat."""
    for name in ["data"] if measure == "clean" else ["data", "threat"]:
        found = sorted({str(document[name]) for document in documents if name in document})
        if len(found) > 1:
            raise ValueError(f"expected verdicts for one {name}, got {' and '.join(found)}")


def _verdicts(document: Mapping[str, Any], measure: str) -> list[bool]:
    """Return for each image whether it is certified, or right, clean or under attack."""
    return _verified(document, measure) if "verdicts" in document else _evaluated(document, measure)


def _verified(verify: Mapping[str, Any], measure: str) -> list[bool]:
    """Return for each image of a verification whether it is certified, or right when clean."""
    if measure == "certified":
        return [verdict == "certified" for verdict in verify["verdicts"]]
    decided = zip(verify["verdicts"], verify["decided_by"], strict=True)
    return [not (verdict == "broken" and stage == "clean") for verdict, stage in decided]


def _evaluated(evaluation: Mapping[str, Any], measure: str) -> list[bool]:
    """Return for each image of an evaluation whether it is right, clean or under attack."""
    attacks = evaluation["attacks"]
    if measure == "worst_case":
        n, names = min(attack["n"] for attack in attacks.values()), list(attacks)
    elif measure == "clean" or measure in attacks:
        n, names = (evaluation["clean"] if measure == "clean" else attacks[measure])["n"], [measure]
    else:
        raise unknown("measure", measure, ["certified", "clean", "worst_case", *attacks])
    wrong = set().union(*(evaluation["wrong"][name] for name in names))
    return [row not in wrong for row in range(n)]
