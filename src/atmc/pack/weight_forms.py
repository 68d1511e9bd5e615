"""One weight in the file: as itself, or as its factors; which is shorter.

Legend: W = U V + C and its forms, see `compress.factorize`. V and C of (U + I) V + C overlap: where U is zero only
V + C matters. So a weight may be written as it is trained, or "merged", as U V + C' with C' = V + C and only those
terms of U V that are not zero, or as W itself. `shorten` decides by coded length and changes the model accordingly,
so that what is validated afterwards is what the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from atmc.compress.factorize import (
    Form,
    all_compressible_weights,
    compose,
    factor_structure,
    is_factorized,
    product_cost,
    set_factors,
    weight_factors,
)
from atmc.pack import weight_coder
from atmc.pack.container import varint
from atmc.pack.sortable_floats import Integers
from atmc.pack.tensor_list import Field, fields
from atmc.pack.weight_coder import Matrix, Spent

PLAIN = "plain"
FORMS: tuple[str, ...] = (PLAIN, "left", "right", "svd", "rank")  # their numbers in the file
Parts = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Weight:
    """A weight of shape (out, in, *kernel) as the file holds it: {"W"}, {"U", "V", "C"} or, for rank, {"U", "V"}."""

    form: str
    shape: tuple[int, ...]
    parts: Parts

    @property
    def rank(self) -> int:
        """Columns of U; 0 for a plain weight."""
        return 0 if self.form == PLAIN else int(self.parts["U"].shape[1])

    @property
    def cost(self) -> int:
        """About how long `value` takes, in multiply-adds."""
        return 0 if self.form == PLAIN else product_cost(self.parts["U"], self.parts["V"])

    def value(self) -> np.ndarray:
        """W, float32, in shape: see `factorize.compose`."""
        if self.form == PLAIN:
            return self.parts["W"].reshape(self.shape)
        form: Form = self.form  # type: ignore[assignment]
        return compose(form, self.parts["U"], self.parts["V"], self.parts.get("C")).reshape(self.shape)

    def row_counts(self) -> Integers:
        """About how many nonzeros feed each output: what the next weight's columns are likely to use."""
        names = {PLAIN: "W", "left": "VC", "right": "UC", "svd": "UC", "rank": "U"}[self.form]
        counts = [np.count_nonzero(self.parts[name].reshape(self.shape[0], -1), axis=1) for name in names]
        total: Integers = np.sum(counts, axis=0).astype(np.int64)
        return total


def layouts(form: str, shape: Sequence[int], rank: int) -> dict[str, Matrix]:
    """The matrix of each part of a weight, in the order of the file."""
    whole = Matrix.of(shape)
    if form == PLAIN:
        return {"W": whole}
    v = Matrix(rank, whole.columns, whole.kernel, whole.width)
    return {"U": Matrix(whole.rows, rank), "V": v} | ({} if form == "rank" else {"C": whole})


def write(weight: Weight, hint: Integers | None) -> list[tuple[bytes, Spent]]:
    """The encoding of each part. hint: `row_counts` of the weight before, or None."""
    return [
        weight_coder.write_weight(weight.parts[name], matrix, None if name == "U" else hint)
        for name, matrix in layouts(weight.form, weight.shape, weight.rank).items()
    ]


def to_part(weight: Weight, hint: Integers | None) -> bytes:
    """A weight's part of the file, see `artifact`. hint: `row_counts` of the weight before, or None.

    Raises:
        ValueError: a value is not finite.
    """
    encoded = [data for data, _ in write(weight, hint)]
    rank = b"" if weight.form == PLAIN else varint(weight.rank)
    lengths = [*(varint(len(data)) for data in encoded[:-1]), b""]
    body = b"".join(length + data for length, data in zip(lengths, encoded, strict=True))
    return bytes([FORMS.index(weight.form)]) + rank + body


def read(
    form: str, shape: tuple[int, ...], rank: int, data: Sequence[bytes], hint: Integers | None
) -> tuple[Weight, list[Spent]]:
    """What `write` was given. Raises weight_coder.CodingError."""
    parts, spent = {}, []
    for (name, matrix), encoded in zip(layouts(form, shape, rank).items(), data, strict=True):
        values, length = weight_coder.read_weight(encoded, matrix, None if name == "U" else hint)
        parts[name] = values.reshape(shape) if name in "WC" else values.reshape(matrix.rows, matrix.columns)
        spent.append(length)
    return Weight(form, shape, parts), spent


def weights(model: nn.Module) -> dict[str, Weight]:
    """Path of each factorized weight -> its factors as they are."""
    found = {}
    forms = factor_structure(model)
    for weight in all_compressible_weights(model):
        if is_factorized(weight):
            parts = {name: value.detach().cpu().float().numpy() for name, value in weight_factors(weight).items()}
            found[weight.path] = Weight(forms[weight.path][0], tuple(weight.tensor.shape), parts)
    return found


def candidates(weight: Weight) -> list[Weight]:
    """The same W, up to one rounding of C', as trained, merged, and plain; without those that cannot be shorter."""
    if weight.form == PLAIN:
        return [weight]
    u, v = weight.parts["U"], weight.parts["V"]
    live = u.any(axis=0) & v.any(axis=1)
    plain = Weight(PLAIN, weight.shape, {"W": weight.value()})
    if weight.form == "rank":
        kept = Weight("rank", weight.shape, {"U": u[:, live], "V": v[live]}) if live.any() else plain
        return [kept, plain]
    if not live.any():
        return [plain]
    extra = {"left": v, "right": u}.get(weight.form, np.zeros(1, np.float32))
    c = weight.parts["C"] + extra.reshape(weight.shape if weight.form in ("left", "right") else 1)
    merged = Weight("svd", weight.shape, {"U": u[:, live], "V": v[live], "C": c})
    return [merged, plain] if weight.form == "svd" else [weight, merged, plain]


def part_size(weight: Weight, hint: Integers | None) -> int:
    """Bytes of a weight's part with its length, without checksum."""
    size = len(to_part(weight, hint))
    return size + len(varint(size))


def shortest(weight: Weight, hint: Integers | None) -> tuple[Weight, int]:
    """The candidate of fewest bytes, and these."""
    options = candidates(weight)
    sizes = [part_size(option, hint) for option in options]
    best = sizes.index(min(sizes))
    return options[best], sizes[best]


def in_order(model: nn.Module, kept: Sequence[Field]) -> list[tuple[Field, Weight]]:
    """The weights among those fields of the model, factorized ones as they are."""
    state, factorized = model.state_dict(), weights(model)

    def held(field: Field) -> Weight:
        if field.name in factorized:
            return factorized[field.name]
        return Weight(PLAIN, field.shape, {"W": state[field.name].detach().cpu().numpy()})

    return [(field, held(field)) for field in kept if field.is_weight]


@torch.no_grad()
def shorten(model: nn.Module) -> nn.Module:
    """Give every factorized weight the form that takes the fewest bytes; in place, and returned.

    W changes by no more than one rounding of V + C. A weight's form is also what the next one's positions are coded
    under: forms are chosen in the order of the file, and left as they are where all together would be longer.
    """
    if not weights(model):
        return model
    chosen: dict[str, Weight] = {}
    before = after = 0
    hint_before = hint_after = None
    for field, weight in in_order(model, fields(model)):
        best, size = shortest(weight, hint_after)
        after += size
        before += size if best is weight and _same(hint_before, hint_after) else part_size(weight, hint_before)
        hint_before, hint_after = weight.row_counts(), best.row_counts()
        if best is not weight:
            chosen[field.name] = best
    for path, best in chosen.items() if after <= before else ():
        parts = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in best.parts.items()}
        set_factors(model, path, best.form, parts)
    return model


def _same(one: Integers | None, other: Integers | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
