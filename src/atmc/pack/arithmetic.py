"""The binary arithmetic coder and its adaptive contexts: integer arithmetic only, the same on every machine.

A decision (a bit) is coded with a probability that encoder and decoder compute from the decisions before it: that of an
online logistic regression. The log odds of a decision are the sum of the log odds that its contexts have learned (a
row's, a column's, a neighborhood's), each with its information, which tells how much it has seen. After a decision
every context moves by a damped Newton step, as in assumed-density filtering of a Bayesian logistic regression with
independent weights (Opper 1998; Graepel et al. 2010, "adPredictor"), so that a context that was used rarely stays near
its prior, 0, and costs next to nothing.

Every function serves measuring, encoding and decoding alike, so that the two sides cannot drift apart. They are plain
Python on lists; if there is much to do, `coder_run` compiles the same code with Numba, on arrays, with inner functions
inlined. docs/file-format.md specifies the decoder; every constant in this file is part of the format.

Arguments that most functions share:

    coder       the state: mode, interval, position and code length so far (the slots below)
    data        the bytes that are decoded, or room for those that are encoded
    tables      (the logistic function, the code length of each probability), see `priors`
    contexts    (theta, info, variance, due): log odds in 2^-32 nat, information in 2^-32, variance = 1 / info in 2^-22,
                and the info from which on the variance is computed again
    active      scratch space for the indices of the contexts of one decision
    p           the probability of a 1, in 2^-16
"""

from __future__ import annotations

from typing import Any

MEASURE, ENCODE, DECODE = 0, 1, 2
MODE, LOW, HIGH, CODE, AT, LENGTH = range(6)  # slots of a coder's state; LENGTH: ideal code length, in 2^-16 bits
POSITION_CLASSES = 6
PAST_END = 12  # bytes that a decoder may read past the end: four ahead, and eight zeros that an encoder may cut off


def settle(coder: Any, data: Any) -> None:
    """Shift out the leading bytes in which low and high agree: into the data, or when decoding out of the code."""
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


def code_bit(coder: Any, data: Any, lengths: Any, p: int, bit: int) -> int:
    """Code one bit whose probability of being 1 is p / 65536, 0 < p < 65536, and return it.

    The interval [low, high] of 32-bit numbers shrinks to the part of the bit; leading bytes that are settled leave it.
    A decoder reads zeros past the end; after PAST_END of them its results mean nothing.
    """
    low, high = coder[LOW], coder[HIGH]
    width = high - low
    mid = low + (width >> 16) * p + (((width & 65535) * p) >> 16)
    if coder[MODE] == DECODE:
        bit = 1 if coder[CODE] <= mid else 0
    coder[LENGTH] += lengths[p if bit else 65536 - p]
    if coder[MODE] == MEASURE:
        return bit
    if bit:
        high = mid
    else:
        low = mid + 1
    coder[LOW], coder[HIGH] = low, high
    settle(coder, data)
    return bit


def code_number(coder: Any, data: Any, lengths: Any, width: int, number: int) -> int:
    """Code an integer of `width` equally likely bits, highest bits first, and return it.

    Up to 12 bits are coded at a time, by cutting the interval into equal parts, if it is long enough for that.
    """
    coded = 0
    while width:
        low, high = coder[LOW], coder[HIGH]
        if width == 1 or high - low < 16777216 or coder[MODE] == MEASURE:
            width -= 1
            coded = (coded << 1) | code_bit(coder, data, lengths, 32768, (number >> width) & 1)
            continue
        size = min(width, 12)
        width -= size
        part = (high - low + 1) >> size
        value = (number >> width) & ((1 << size) - 1)
        if coder[MODE] == DECODE:
            value = (coder[CODE] - low) // part
            if value >> size:  # above the last part, which no encoder reaches: treated as read past the end
                value = (1 << size) - 1
                coder[CODE] = low + value * part
                coder[AT] = len(data) + PAST_END + 1
        coded = (coded << size) | value
        coder[LENGTH] += size << 16
        coder[LOW] = low + value * part
        coder[HIGH] = low + value * part + part - 1
        settle(coder, data)
    return coded


def decide(coder: Any, data: Any, tables: Any, contexts: Any, active: Any, count: int, bit: int) -> int:
    """Code one bit under the first `count` active contexts, let each of them learn from it, and return it.

    Divisions are slow: a context's variance is stored, and computed again only when its information has grown by 1/32.
    """
    logistic, lengths = tables
    theta, info, variance, due = contexts
    x = 0
    spread = 0
    for i in range(count):
        x += theta[active[i]]
        spread += variance[active[i]]
    p = logistic[min(max(x >> 22, -11264), 11264) + 11264]
    bit = code_bit(coder, data, lengths, p, bit)
    gained = p * (65536 - p)
    damping = (gained * spread) >> 38
    step = ((bit << 16) - p) << 6  # in 2^-22
    if damping > 255:
        step = (step << 16) // (65536 + damping)
    for i in range(count):
        k = active[i]
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
    stride: int,
    classes: Any,
    contexts: Any,
    active: Any,
    above: Any,
) -> None:
    """Code which entries of a (rows, columns) matrix are nonzero: flags, one per entry, row after row; in place.

    Entries are taken in groups of `group` along a row (a convolution's kernel, for example). First comes whether a
    group holds any nonzero, under the contexts of the whole matrix, of its row, its group of columns, the groups to the
    left and above, and its class. Then, in a group that does, comes each entry, under its place and the number of
    nonzeros before it in the group, its row, its column, and its neighbors to the left, `stride` earlier, and above.

    Args:
        classes: one number below POSITION_CLASSES for each group of columns: what is known of it beforehand.
        contexts: as `priors.position_contexts` returns them.
        active: room for 5 indices.
        above: zeros, one for each group of columns.
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
                return  # the results mean nothing any more, and a short file must not take long
            first = base + column * group
            size = min(group, columns - column * group)
            nonzeros = 0
            if coder[MODE] != DECODE:
                for i in range(size):
                    nonzeros += flags[first + i]
            active[0] = 0
            active[1] = by_row + row
            active[2] = by_column + column
            active[3] = by_near + 3 * min(left, 2) + min(above[column], 2)
            active[4] = by_class + classes[column]
            some = decide(coder, data, tables, contexts, active, 5, 1 if nonzeros else 0)
            seen = 0
            if some and size == 1:
                flags[first] = seen = 1
            elif some:
                for i in range(size):
                    bit = flags[first + i]
                    if i == size - 1 and seen == 0:
                        bit = 1
                    else:
                        near = flags[first + i - 1] if i % stride else 0
                        if i >= stride:
                            near += 2 * flags[first + i - stride]
                        if row:
                            near += 4 * flags[first + i - columns]
                        some_seen = min(seen, 2)
                        active[0] = by_place + 3 * i + some_seen
                        active[1] = by_seen + some_seen
                        active[2] = member_row + row
                        active[3] = member_column + column * group + i
                        active[4] = member_near + near
                        bit = decide(coder, data, tables, contexts, active, 5, bit)
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
    contexts: Any,
    active: Any,
    near: int,
    row: int,
    channel: int,
) -> int:
    """Code a symbol of `depth` bits below levels as a path through a binary tree of decisions, and return it.

    The first `modelled` bits are decided with a context for each node of the tree, the others are equally likely (and
    levels is 2^depth then). If the upper half of a node lies beyond the number of symbols, there is nothing to decide.

    Args:
        near, row, channel: where further contexts begin: a tree of them for the neighbors, and the first three bits of
            one for the row and for the input channel; near is 0 if there are none.
    """
    rest = depth - modelled
    node = 1
    for shift in range(depth - 1, rest - 1, -1):
        bit = (symbol >> shift) & 1
        if (((node << 1) | 1) << shift) - (1 << depth) >= levels:
            bit = 0
        else:
            active[0] = node
            count = 1
            if near:
                active[1] = near + node
                count = 2
                if node < 8:
                    active[2] = row + node
                    active[3] = channel + node
                    count = 4
            bit = decide(coder, data, tables, contexts, active, count, bit)
        node = (node << 1) | bit
    if rest:
        node = (node << rest) | code_number(coder, data, tables[1], rest, symbol & ((1 << rest) - 1))
    return node - (1 << depth)


def code_symbols(
    coder: Any, data: Any, tables: Any, symbols: Any, depth: int, modelled: int, contexts: Any, active: Any
) -> None:
    """Code all symbols but the last entry, which is the number of levels, each by `code_symbol`; in place."""
    levels = symbols[len(symbols) - 1]
    for i in range(len(symbols) - 1):
        if coder[MODE] == DECODE and coder[AT] > len(data) + PAST_END:
            return
        symbols[i] = code_symbol(
            coder, data, tables, symbols[i], levels, depth, modelled, contexts, active, 0, 0, 0
        )  # fmt: skip


def code_symbols_with_neighbors(
    coder: Any,
    data: Any,
    tables: Any,
    symbols: Any,
    depth: int,
    modelled: int,
    contexts: Any,
    active: Any,
    places: Any,
    shape: Any,
    kinds: Any,
    row_kinds: Any,
) -> None:
    """Code symbols as `code_symbols` does, of values at places of a matrix, under more contexts; in place.

    A decision is made under its node in the tree, and: the node together with the kinds of the entry to the left (in
    the same row of the kernel, or in any column if there is no kernel) and of the entry `stride` columns back (in the
    same kernel); for the first three bits also the nodes of the row and those of the input channel (or column). A zero
    and an entry outside are of kind 0.

    Args:
        places: where the values are, ascending.
        shape: (rows, columns, kernel, width, stride), see `weight_coder.Layout`.
        kinds: 1 to 4 for each symbol, or for each value of the leading bits if there are fewer kinds than symbols.
        contexts: as `priors.neighbor_contexts` returns them.
        row_kinds: zeros, one for each column.
    """
    rows, columns, kernel, width, stride = shape[0], shape[1], shape[2], shape[3], shape[4]
    levels = symbols[len(symbols) - 1]
    by_row = 1 << modelled
    by_channel = by_row + 8 * rows
    by_near = by_channel + 8 * (columns // kernel)
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
                row_kinds[places[j] % columns] = 0
            begun = i
            row = place // columns
        column = place % columns
        inside = column % kernel if kernel > 1 else column
        near = row_kinds[column - 1] if inside % width or (kernel == 1 and column) else 0
        if inside >= stride:
            near += 5 * row_kinds[column - stride]
        symbol = code_symbol(
            coder, data, tables, symbols[i], levels, depth, modelled, contexts, active,
            by_near + (near << modelled), by_row + 8 * row, by_channel + 8 * (column // kernel),
        )  # fmt: skip
        symbols[i] = symbol
        row_kinds[column] = kinds[symbol >> shift]


def code_ascending(coder: Any, data: Any, tables: Any, numbers: Any, contexts: Any, active: Any) -> None:
    """Code strictly ascending integers from 0 to 2^32 - 1 by their gaps; in place.

    The number of bits of a gap is adaptive, under the contexts of a tree; its bits after the first are equally likely.
    """
    last = -1
    for i in range(len(numbers)):
        gap = numbers[i] - last - 1
        size = 0
        while size < 33 and gap >> size:
            size += 1
        node = 1
        for shift in range(5, -1, -1):
            active[0] = node
            bit = decide(coder, data, tables, contexts, active, 1, (size >> shift) & 1)
            node = (node << 1) | bit
        size = min(node - 64, 33)
        if size > 1:
            low = gap & ((1 << (size - 1)) - 1)
            gap = (1 << (size - 1)) | code_number(coder, data, tables[1], size - 1, low)
        else:
            gap = size
        last += gap + 1
        numbers[i] = last
