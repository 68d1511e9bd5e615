"""The binary arithmetic coder and its adaptive models: integer arithmetic only, the same on every machine.

A decision (a bit) is coded with a probability that both sides compute from the decisions before it. The probability is
that of an online logistic regression: the sum of the log odds that its contexts have learned (a row's, a column's, a
neighbourhood's), each with what it has seen, its information. After a decision every context moves by a damped Newton
step, as in assumed-density filtering of a Bayesian logistic regression with independent weights (Opper 1998; Graepel
et al. 2010, "adPredictor"), so that a context seen rarely stays near its prior, 0, and costs next to nothing.

Every function serves measuring, encoding and decoding alike, so that the two sides cannot drift apart. They are plain
Python on lists, and the same code compiled by Numba on arrays, inner functions inlined, where there is much to do
(`stream`).

Legend: model the contexts' theta, log odds in 2^-32 nats, their information, variance, and when to renew it; p the
probability of a 1, in 2^-16; spent the ideal code length so far, in 2^-16 bits.
"""

from __future__ import annotations

from typing import Any

MEASURE, ENCODE, DECODE = 0, 1, 2
MODE, LOW, HIGH, CODE, AT, SPENT = range(6)  # slots of a coder's state
POSITION_CLASSES = 6
PAST_END = 12  # bytes that a decoder may read past the end: four ahead, and eight zeros that an encoder may cut off


def settle(coder: Any, data: Any) -> None:
    """Leading bytes in which low and high agree leave the interval, into the data or, in decoding, out of it."""
    low, high, at = coder[LOW], coder[HIGH], coder[AT]
    while (low ^ high) < 16777216:
        if coder[MODE] == DECODE:
            coder[CODE] = ((coder[CODE] & 16777215) << 8) | (data[at] if at < len(data) else 0)
        elif at < len(data):
            data[at] = high >> 24
        at += 1
        low = (low & 16777215) << 8
        high = ((high & 16777215) << 8) | 255
    coder[LOW], coder[HIGH], coder[AT] = low, high, at


def code_bit(coder: Any, data: Any, cost: Any, p: int, bit: int) -> int:
    """Code one bit whose probability of being 1 is p / 65536, 0 < p < 65536; the bit.

    The interval [low, high] of 32-bit numbers shrinks to the part of the bit; leading bytes that are settled leave it.
    A decoder reads zeros past the end, and is of no use any more after PAST_END of them.
    """
    low, high = coder[LOW], coder[HIGH]
    width = high - low
    mid = low + (width >> 16) * p + (((width & 65535) * p) >> 16)
    if coder[MODE] == DECODE:
        bit = 1 if coder[CODE] <= mid else 0
    coder[SPENT] += cost[p if bit else 65536 - p]
    if coder[MODE] == MEASURE:
        return bit
    if bit:
        high = mid
    else:
        low = mid + 1
    coder[LOW], coder[HIGH] = low, high
    settle(coder, data)
    return bit


def code_number(coder: Any, data: Any, cost: Any, width: int, number: int) -> int:
    """Code an integer of so many bits, all equally likely, highest bits first; the integer.

    Up to 12 bits are taken at a time: the interval is cut into equal parts, where it is long enough for that.
    """
    found = 0
    while width:
        low, high = coder[LOW], coder[HIGH]
        if width == 1 or high - low < 16777216 or coder[MODE] == MEASURE:
            width -= 1
            found = (found << 1) | code_bit(coder, data, cost, 32768, (number >> width) & 1)
            continue
        size = min(width, 12)
        width -= size
        part = (high - low + 1) >> size
        value = (number >> width) & ((1 << size) - 1)
        if coder[MODE] == DECODE:
            value = (coder[CODE] - low) // part
            if value >> size:  # above all parts, where no encoder goes
                value = (1 << size) - 1
                coder[CODE] = low + value * part
                coder[AT] = len(data) + PAST_END + 1
        found = (found << size) | value
        coder[SPENT] += size << 16
        coder[LOW] = low + value * part
        coder[HIGH] = low + value * part + part - 1
        settle(coder, data)
    return found


def decide(coder: Any, data: Any, tables: Any, model: Any, contexts: Any, count: int, bit: int) -> int:
    """Code one bit under the first `count` of the contexts and let each learn from it; the bit.

    Divisions are dear: a context's variance is looked up, and computed anew when its information has grown by 1/32.
    """
    squash, cost = tables
    theta, info, variance, due = model
    x = 0
    spread = 0
    for i in range(count):
        x += theta[contexts[i]]
        spread += variance[contexts[i]]
    p = squash[min(max(x >> 22, -11264), 11264) + 11264]
    bit = code_bit(coder, data, cost, p, bit)
    gained = p * (65536 - p)
    damping = (gained * spread) >> 38
    step = ((bit << 16) - p) << 6  # in 2^-22
    if damping > 255:
        step = (step << 16) // (65536 + damping)
    for i in range(count):
        k = contexts[i]
        theta[k] += (variance[k] * step) >> 12
        grown = info[k] + gained
        info[k] = grown
        if grown >= due[k]:
            variance[k] = 18014398509481984 // grown
            due[k] = grown + (grown >> 5)
    return bit


def code_positions(
    coder: Any,
    data: Any,
    tables: Any,
    flags: Any,
    rows: int,
    columns: int,
    group: int,
    across: int,
    classes: Any,
    model: Any,
    contexts: Any,
    above: Any,
) -> None:
    """Which entries of a (rows, columns) matrix are nonzero: flags, one number an entry, row after row.

    Entries are taken in groups of `group` along a row (a convolution's kernel, say): first whether a group holds any
    nonzero, under the contexts of all, of its row, its group of columns, the groups to the left and above, and its
    class; then, in such a group, entry by entry, under its place and how many came before it, its row, its column, and
    its neighbours to the left and `across` earlier in the group, and above.

    Args:
        classes: one number below POSITION_CLASSES for each group of columns, what is known of it beforehand.
        model: as `priors.position_model` gives it.
        contexts, above: room for 5 contexts, and zeros for each group of columns.
    """
    groups = (columns + group - 1) // group
    by_row = 1
    by_column = by_row + rows
    by_near = by_column + groups
    by_class = by_near + 9
    by_place = by_class + 6
    by_seen = by_place + 3 * group
    member_row = by_seen + 3
    member_column = member_row + rows
    member_near = member_column + columns
    for row in range(rows):
        base = row * columns
        left = 0
        for column in range(groups):
            if not column & 255 and coder[MODE] == DECODE and coder[AT] > len(data) + PAST_END:
                return  # of no use any more, and a short file must not cost long
            first = base + column * group
            size = min(group, columns - column * group)
            held = 0
            if coder[MODE] != DECODE:
                for i in range(size):
                    held += flags[first + i]
            contexts[0] = 0
            contexts[1] = by_row + row
            contexts[2] = by_column + column
            contexts[3] = by_near + 3 * min(left, 2) + min(above[column], 2)
            contexts[4] = by_class + classes[column]
            some = decide(coder, data, tables, model, contexts, 5, 1 if held else 0)
            seen = 0
            if some and size == 1:
                flags[first] = seen = 1
            elif some:
                for i in range(size):
                    bit = flags[first + i]
                    if i == size - 1 and seen == 0:
                        bit = 1
                    else:
                        near = flags[first + i - 1] if i % across else 0
                        if i >= across:
                            near += 2 * flags[first + i - across]
                        if row:
                            near += 4 * flags[first + i - columns]
                        some_seen = min(seen, 2)
                        contexts[0] = by_place + 3 * i + some_seen
                        contexts[1] = by_seen + some_seen
                        contexts[2] = member_row + row
                        contexts[3] = member_column + column * group + i
                        contexts[4] = member_near + near
                        bit = decide(coder, data, tables, model, contexts, 5, bit)
                    flags[first + i] = bit
                    seen += bit
            above[column] = seen
            left = seen


def code_symbol(
    coder: Any,
    data: Any,
    tables: Any,
    symbol: int,
    levels: int,
    depth: int,
    modelled: int,
    model: Any,
    contexts: Any,
    near: int,
    row: int,
    column: int,
) -> int:
    """A symbol of `depth` bits below levels: a binary tree of decisions; the symbol.

    The first `modelled` bits are decided with a context for each node of the tree, the others are taken as equally
    likely (and levels is 2^depth then). Where the upper half of a node lies beyond the number of symbols there is
    nothing to decide.

    Args:
        near, row, column: where further contexts begin: a tree of them for what is near, and the first three bits of
            it for the row and for the group of columns; near is 0 where there are none.
    """
    rest = depth - modelled
    node = 1
    for shift in range(depth - 1, rest - 1, -1):
        bit = (symbol >> shift) & 1
        if (((node << 1) | 1) << shift) - (1 << depth) >= levels:
            bit = 0
        else:
            contexts[0] = node
            count = 1
            if near:
                contexts[1] = near + node
                count = 2
                if node < 8:
                    contexts[2] = row + node
                    contexts[3] = column + node
                    count = 4
            bit = decide(coder, data, tables, model, contexts, count, bit)
        node = (node << 1) | bit
    if rest:
        node = (node << rest) | code_number(coder, data, tables[1], rest, symbol & ((1 << rest) - 1))
    return node - (1 << depth)


def code_symbols(
    coder: Any, data: Any, tables: Any, symbols: Any, depth: int, modelled: int, model: Any, contexts: Any
) -> None:
    """Symbols below symbols[-1], which is their number and not one of them, each as `code_symbol` does it."""
    levels = symbols[len(symbols) - 1]
    for i in range(len(symbols) - 1):
        if coder[MODE] == DECODE and coder[AT] > len(data) + PAST_END:
            return
        symbols[i] = code_symbol(
            coder, data, tables, symbols[i], levels, depth, modelled, model, contexts, 0, 0, 0
        )  # fmt: skip


def code_placed(
    coder: Any,
    data: Any,
    tables: Any,
    symbols: Any,
    depth: int,
    modelled: int,
    model: Any,
    contexts: Any,
    places: Any,
    shape: Any,
    kinds: Any,
    kept: Any,
) -> None:
    """Symbols as `code_symbols` does them, of values at places of a matrix, under more contexts.

    A decision is made under its node in the tree, and: the node together with the kinds of the entry to the left (in
    the same row of the kernel, or in any column where there is no kernel) and of the entry `across` columns back (in
    the same kernel); for the first three bits the row's nodes, and those of the input channel (or column). A zero, or
    an entry outside, is of kind 0.

    Args:
        places: where the values are, ascending.
        shape: (rows, columns, kernel, width, across), see `coder.Matrix`.
        kinds: 1 to 4 for each symbol, or for each value of the leading bits where there are fewer.
        model: as `priors.placed_model` gives it.
        kept: zeros for each column.
    """
    rows, columns, kernel, width, across = shape[0], shape[1], shape[2], shape[3], shape[4]
    levels = symbols[len(symbols) - 1]
    by_row = 1 << modelled
    by_column = by_row + 8 * rows
    by_near = by_column + 8 * (columns // kernel)
    shift = 0
    while len(kinds) < levels >> shift:
        shift += 1
    begun = 0  # the first place of the row
    row = 0
    for i in range(len(symbols) - 1):
        if coder[MODE] == DECODE and coder[AT] > len(data) + PAST_END:
            return
        place = places[i]
        if place // columns != row:
            for j in range(begun, i):
                kept[places[j] % columns] = 0
            begun = i
            row = place // columns
        column = place % columns
        inside = column % kernel if kernel > 1 else column
        near = kept[column - 1] if inside % width or (kernel == 1 and column) else 0
        if inside >= across:
            near += 5 * kept[column - across]
        symbol = code_symbol(
            coder, data, tables, symbols[i], levels, depth, modelled, model, contexts,
            by_near + (near << modelled), by_row + 8 * row, by_column + 8 * (column // kernel),
        )  # fmt: skip
        symbols[i] = symbol
        kept[column] = kinds[symbol >> shift]


def code_ascending(coder: Any, data: Any, tables: Any, numbers: Any, model: Any, contexts: Any) -> None:
    """Strictly ascending integers from 0 to 2^32 - 1: each gap's number of bits under contexts, the rest plain."""
    last = -1
    for i in range(len(numbers)):
        gap = numbers[i] - last - 1
        size = 0
        while size < 33 and gap >> size:
            size += 1
        node = 1
        for shift in range(5, -1, -1):
            contexts[0] = node
            bit = decide(coder, data, tables, model, contexts, 1, (size >> shift) & 1)
            node = (node << 1) | bit
        size = min(node - 64, 33)
        if size > 1:
            low = gap & ((1 << (size - 1)) - 1)
            gap = (1 << (size - 1)) | code_number(coder, data, tables[1], size - 1, low)
        else:
            gap = size
        last += gap + 1
        numbers[i] = last
