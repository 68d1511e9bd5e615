"""The C functions that generated sources call; `select_functions` picks those that a source needs."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TABLE = """
/* A sparse matrix, read once from its first row to its last. `bytes` holds, the lowest bit first, for each nonzero: the
   number of zeros before it (quotient by 2^rice in ones, a zero, the remainder in `rice` bits), then in `bits` bits a
   code into the levels, or without levels the value itself as float16 or float32. */
typedef struct {
    const uint8_t *bytes;
    const uint16_t *halves; /* the levels that float16 holds, */
    const float *floats;    /* and the others behind them */
    int half_count, left, rice, bits, ready;
    int next; /* place of the next nonzero, counted from the row's beginning */
    uint32_t window;
} table;
"""

_WINDOW = """
typedef struct {
    int height, width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
} window;
"""

_BITS = """
static uint32_t take(table *t, int count)
{
    uint32_t bits;
    while (t->ready < count) {
        t->window |= (uint32_t)*t->bytes++ << t->ready;
        t->ready += 8;
    }
    bits = t->window & ((1u << count) - 1u);
    t->window >>= count;
    t->ready -= count;
    return bits;
}

static void advance(table *t)
{
    if (t->left == 0) {
        t->next = INT_MAX;
        return;
    }
    t->left--;
    while (take(t, 1))
        t->next += 1 << t->rice;
    t->next += (int)take(t, t->rice);
}
"""

_FLOATS = """
static float float_of(uint32_t bits)
{
    union {
        uint32_t bits;
        float value;
    } both;
    both.bits = bits;
    return both.value;
}

static float half(uint32_t bits)
{
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
    const float subnormal = (float)mantissa * 5.9604644775390625e-08f;
    if (exponent == 0)
        return sign ? -subnormal : subnormal;
    return float_of(sign | (exponent + 112u) << 23 | mantissa << 13);
}
"""

_ENTRIES = """
static table opened(const uint8_t *bytes, int count, int rice, int bits, const uint16_t *halves, int half_count,
                    const float *floats)
{
    table t;
    t.bytes = bytes;
    t.halves = halves;
    t.floats = floats;
    t.half_count = half_count;
    t.left = count;
    t.rice = rice;
    t.bits = bits;
    t.ready = 0;
    t.next = 0;
    t.window = 0;
    advance(&t);
    return t;
}

static float value(table *t)
{
    uint32_t low;
    int code;
    if (t->bits == 32) {
        low = take(t, 16);
        return float_of(low | take(t, 16) << 16);
    }
    low = take(t, t->bits);
    if (!t->halves && !t->floats)
        return half(low);
    code = (int)low;
    return code < t->half_count ? half(t->halves[code]) : t->floats[code - t->half_count];
}

static void step(table *t)
{
    t->next++;
    advance(t);
}
"""

_HELPERS = {
    "entry": """
/* The next row of a matrix of one column. */
static float entry(table *t)
{
    float entry_value = 0.0f;
    if (t->next == 0) {
        entry_value = value(t);
        step(t);
    }
    t->next--;
    return entry_value;
}
""",
    "dot": """
/* The next row times a vector. */
static float dot(table *row, int columns, const float *in)
{
    float sum = 0.0f;
    for (; row->next < columns; step(row))
        sum += value(row) * in[row->next];
    row->next -= columns;
    return sum;
}
""",
    "convolve": """
/* Adds one output channel, its filter being the next row: columns = input channels x k->height x k->width. */
static void convolve(table *row, int columns, const float *in, int height, int width, const window *k, float *out,
                     int out_height, int out_width)
{
    const int area = k->height * k->width, stride = k->stride_x;
    for (; row->next < columns; step(row)) {
        const float weight = value(row);
        const float *channel = in + row->next / area * height * width;
        const int at = row->next % area;
        const int down = at / k->width * k->dilation_y - k->padding_y;
        const int across = at % k->width * k->dilation_x - k->padding_x;
        const int first = across < 0 ? (stride - 1 - across) / stride : 0;
        int last = (width - across + stride - 1) / stride, x, y;
        if (last > out_width)
            last = out_width;
        for (y = 0; y < out_height; y++) {
            const int from = y * k->stride_y + down;
            if (from >= 0 && from < height) {
                const float *pixels = channel + from * width;
                float *sums = out + y * out_width;
                for (x = first; x < last; x++)
                    sums[x] += weight * pixels[x * stride + across];
            }
        }
    }
    row->next -= columns;
}
""",
    "fill": """
static void fill(float *plane, int size, float constant)
{
    int i;
    for (i = 0; i < size; i++)
        plane[i] = constant;
}
""",
    "copy": """
static void copy(float *plane, int size, const float *from)
{
    int i;
    for (i = 0; i < size; i++)
        plane[i] = from[i];
}
""",
    "affine": """
static void affine(float *plane, int size, float scale, float shift)
{
    int i;
    for (i = 0; i < size; i++)
        plane[i] = plane[i] * scale + shift;
}
""",
    "relu": """
static void relu(float *plane, int size)
{
    int i;
    for (i = 0; i < size; i++)
        if (plane[i] < 0.0f)
            plane[i] = 0.0f;
}
""",
    "limit": """
static void limit(float *plane, int size, float ceiling)
{
    int i;
    for (i = 0; i < size; i++)
        if (plane[i] > ceiling)
            plane[i] = ceiling;
}
""",
    "add": """
static void add(float *plane, int size, const float *other)
{
    int i;
    for (i = 0; i < size; i++)
        plane[i] += other[i];
}
""",
    "max_pool": """
static void max_pool(const float *in, int height, int width, const window *k, float *out, int out_height,
                     int out_width)
{
    int y, x, i, j;
    for (y = 0; y < out_height; y++)
        for (x = 0; x < out_width; x++) {
            float most = -FLT_MAX;
            for (i = 0; i < k->height; i++)
                for (j = 0; j < k->width; j++) {
                    const int down = y * k->stride_y - k->padding_y + i * k->dilation_y;
                    const int across = x * k->stride_x - k->padding_x + j * k->dilation_x;
                    if (down >= 0 && down < height && across >= 0 && across < width && in[down * width + across] > most)
                        most = in[down * width + across];
                }
            *out++ = most;
        }
}
""",
    "avg_pool": """
/* count_padding: the zeros around the image are counted, but not what lies beyond them. */
static void avg_pool(const float *in, int height, int width, const window *k, int count_padding, float *out,
                     int out_height, int out_width)
{
    int y, x, i, j;
    for (y = 0; y < out_height; y++)
        for (x = 0; x < out_width; x++) {
            float sum = 0.0f;
            int inside = 0, padded = 0;
            for (i = 0; i < k->height; i++)
                for (j = 0; j < k->width; j++) {
                    const int down = y * k->stride_y - k->padding_y + i;
                    const int across = x * k->stride_x - k->padding_x + j;
                    if (down < height + k->padding_y && across < width + k->padding_x)
                        padded++;
                    if (down >= 0 && down < height && across >= 0 && across < width) {
                        sum += in[down * width + across];
                        inside++;
                    }
                }
            *out++ = sum / (float)(count_padding ? padded : inside);
        }
}
""",
    "mean": """
static float mean(const float *plane, int size)
{
    float sum = 0.0f;
    int i;
    for (i = 0; i < size; i++)
        sum += plane[i];
    return sum / (float)size;
}
""",
}


def select_functions(callers: Sequence[str]) -> str:
    """Return the C text of the types and functions that the text of some functions uses."""
    calls = set(re.findall(r"\b(\w+)\(", "\n".join(callers)))
    parts = []
    if "opened" in calls:
        parts += [_TABLE, _BITS, _FLOATS, _ENTRIES]
    if calls & {"convolve", "max_pool", "avg_pool"}:
        parts.append(_WINDOW)
    parts += [text for name, text in _HELPERS.items() if name in calls]
    return "".join(parts)
