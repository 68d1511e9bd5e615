"""Store a weight as itself or as its factors, whichever is shorter.

W = U V + C and its forms: see `compress.factorize`. V and C of (U + I) V + C overlap: where U is zero, only V + C
matters. So a factorized weight may be written as it was trained; or "merged", as U V + C' with C' = V + C and only
those terms of U V that are not zero; or as W itself. `choose_shortest_forms` decides by coded length and changes the
model accordingly, so that what is validated afterwards is what the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

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
from atmc.pack.container import encode_varint
from atmc.pack.sortable_floats import Int64s
from atmc.pack.tensor_list import Field, list_fields
from atmc.pack.weight_coder import CodeLengths, Layout

PLAIN = "plain"
FORMS: tuple[str, ...] = (PLAIN, "left", "right", "svd", "rank")  # a form's index is its number in the file
Matrices = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Weight:
    """A weight as the file holds it.

    Args:
        form: one of FORMS.
        shape: (out, in, *kernel).
        parts: {"W"} if the form is plain, {"U", "V"} if it is rank, else {"U", "V", "C"}; W and C in shape.
    """

    form: str
    shape: tuple[int, ...]
    parts: Matrices

    @property
    def rank(self) -> int:
        """Number of columns of U; 0 for a plain weight."""
        return 0 if self.form == PLAIN else int(self.parts["U"].shape[1])

    @property
    def cost(self) -> int:
        """Approximate time of `value`, in multiply-adds."""
        return 0 if self.form == PLAIN else product_cost(self.parts["U"], self.parts["V"])

    def value(self) -> np.ndarray:
        """Return W, float32, in shape: see `factorize.compose`."""
        if self.form == PLAIN:
            return self.parts["W"].reshape(self.shape)
        form = cast(Form, self.form)
        return compose(form, self.parts["U"], self.parts["V"], self.parts.get("C")).reshape(self.shape)

    def output_counts(self) -> Int64s:
        """Return about how many nonzeros feed each output: the input counts of the next weight (part of the format)."""
        names = {PLAIN: "W", "left": "VC", "right": "UC", "svd": "UC", "rank": "U"}[self.form]
        counts = [np.count_nonzero(self.parts[name].reshape(self.shape[0], -1), axis=1) for name in names]
        total: Int64s = np.sum(counts, axis=0).astype(np.int64)
        return total


def part_layouts(form: str, shape: Sequence[int], rank: int) -> dict[str, Layout]:
    """Return the layout of each matrix of a weight, in the order of the file."""
    whole = Layout.of(shape)
    if form == PLAIN:
        return {"W": whole}
    v = Layout(rank, whole.columns, whole.kernel, whole.width)
    return {"U": Layout(whole.rows, rank), "V": v} | ({} if form == "rank" else {"C": whole})


def encode_weight(weight: Weight, input_counts: Int64s | None) -> list[tuple[bytes, CodeLengths]]:
    """Return the encoding of each matrix. input_counts: `output_counts` of the weight before, or None."""
    return [
        weight_coder.encode_matrix(weight.parts[name], layout, None if name == "U" else input_counts)
        for name, layout in part_layouts(weight.form, weight.shape, weight.rank).items()
    ]


def encode_part(weight: Weight, input_counts: Int64s | None) -> bytes:
    """Return a weight's part of the file, see `artifact`. input_counts: `output_counts` of the weight before, or None.

    Raises:
        ValueError: a value is not finite.
    """
    encoded = [data for data, _ in encode_weight(weight, input_counts)]
    rank = b"" if weight.form == PLAIN else encode_varint(weight.rank)
    lengths = [*(encode_varint(len(data)) for data in encoded[:-1]), b""]
    body = b"".join(length + data for length, data in zip(lengths, encoded, strict=True))
    return bytes([FORMS.index(weight.form)]) + rank + body


def decode_weight(
    form: str, shape: tuple[int, ...], rank: int, encoded: Sequence[bytes], input_counts: Int64s | None
) -> tuple[Weight, list[CodeLengths]]:
    """Invert `encode_weight`. Raises weight_coder.CodingError."""
    parts, lengths = {}, []
    for (name, layout), data in zip(part_layouts(form, shape, rank).items(), encoded, strict=True):
        values, part_lengths = weight_coder.decode_matrix(data, layout, None if name == "U" else input_counts)
        parts[name] = values.reshape(shape) if name in "WC" else values.reshape(layout.rows, layout.columns)
        lengths.append(part_lengths)
    return Weight(form, shape, parts), lengths


def factorized_weights(model: nn.Module) -> dict[str, Weight]:
    """Return each factorized weight by its path, with its factors as they are."""
    weights = {}
    forms = factor_structure(model)
    for weight in all_compressible_weights(model):
        if is_factorized(weight):
            parts = {name: value.detach().cpu().float().numpy() for name, value in weight_factors(weight).items()}
            weights[weight.path] = Weight(forms[weight.path][0], tuple(weight.tensor.shape), parts)
    return weights


def list_candidates(weight: Weight) -> list[Weight]:
    """Return W as trained, merged and plain (equal up to one rounding of C'), but for those that cannot be shorter."""
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


def part_bytes(weight: Weight, input_counts: Int64s | None) -> int:
    """Return the size of a weight's part in bytes, with its length, without its checksum."""
    size = len(encode_part(weight, input_counts))
    return size + len(encode_varint(size))


def choose_shortest(weight: Weight, input_counts: Int64s | None) -> tuple[Weight, int]:
    """Return the candidate of fewest bytes, and their number."""
    options = list_candidates(weight)
    sizes = [part_bytes(option, input_counts) for option in options]
    best = sizes.index(min(sizes))
    return options[best], sizes[best]


def list_weights(model: nn.Module, fields: Sequence[Field]) -> list[tuple[Field, Weight]]:
    """Return the weights among these fields of the model, in their order, factorized ones as they are."""
    state, factorized = model.state_dict(), factorized_weights(model)

    def weight_of(field: Field) -> Weight:
        if field.name in factorized:
            return factorized[field.name]
        return Weight(PLAIN, field.shape, {"W": state[field.name].detach().cpu().numpy()})

    return [(field, weight_of(field)) for field in fields if field.is_weight]


@torch.no_grad()
def choose_shortest_forms(model: nn.Module) -> nn.Module:
    """Give every factorized weight the form that takes the fewest bytes; in place, and returned.

    W changes by no more than one rounding of V + C. The form of a weight changes its output counts, under which the
    next one is coded: forms are chosen in the order of the file, and all are left as they are if together they would
    make the file longer.
    """
    if not factorized_weights(model):
        return model
    chosen: dict[str, Weight] = {}
    before = after = 0
    counts_before = counts_after = None
    for field, weight in list_weights(model, list_fields(model)):
        best, size = choose_shortest(weight, counts_after)
        after += size
        unchanged = best is weight and _same_counts(counts_before, counts_after)
        before += size if unchanged else part_bytes(weight, counts_before)
        counts_before, counts_after = weight.output_counts(), best.output_counts()
        if best is not weight:
            chosen[field.name] = best
    for path, best in chosen.items() if after <= before else ():
        parts = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in best.parts.items()}
        set_factors(model, path, best.form, parts)
    return model


def _same_counts(one: Int64s | None, other: Int64s | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))
