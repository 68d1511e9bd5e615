"""Compare file sizes with the floor of information theory, general compressors, Deep Compression and NNCodec.

    python benchmarks/file_size.py --nncodec runs/nncodec/bin/python --out results/files

Writes size.json: every committed file of results/mnist-adversarial and results/cifar10, and random tensors (seed 0);
`atmc table --page results/files/README.md` makes the tables of it. NNCodec runs in an environment of its own
(`nncodec_size`); without --nncodec it is left out.

All coders get the same weights, without biases and norms. The size of this package's coder ("ours") is that of the
weights' parts in the file, with lengths and checksums; the others are not charged for their tensors' shapes (NNCodec
writes them). Codebooks are in every total. Only NNCodec rounds; the size of ours with as much rounding is reported
beside it (`size_at_error`).
"""

from __future__ import annotations

import argparse
import heapq
import json
import lzma
import math
import platform
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from atmc.compress.projections import zero_kmeans
from atmc.pack import artifact, weight_coder
from atmc.pack.container import encode_varint
from atmc.pack.inspect import inspect_file
from atmc.pack.sortable_floats import fits_float16
from atmc.pack.weight_coder import CodeLengths, Layout, entropy_bits, log2_binomial

ROOT = Path(__file__).parents[1]
ERROR, LOSSY = 0.01, "NNCodec, 1 % error"  # relative error that NNCodec may make
CODEBOOKS = (*(2, 4, 8, 12, 16, 24, 32, 40, 48), *range(64, 129, 16), *range(160, 257, 32))  # see `size_at_error`
RATIOS = (0.01, 0.005)
SHAPES = ((512, 4608), (512, 512, 3, 3), (640, 800))


@dataclass(frozen=True)
class Stored:
    """A tensor as the file stores it: its values, and its code lengths."""

    name: str
    values: np.ndarray
    lengths: CodeLengths

    @property
    def flat(self) -> NDArray[np.float32]:
        """The values in row-major order."""
        return self.values.reshape(-1)


def count_levels(values: np.ndarray) -> int:
    """Return the number of distinct nonzero values."""
    return len(np.unique(values[values != 0]))


def plain_bytes(values: np.ndarray) -> bytes:
    """Return the bytes of the values in float16 if that is exact, else in float32."""
    return values.astype("<f2" if fits_float16(values) else "<f4").tobytes()


def describe_tensor(tensor: Stored) -> dict[str, Any]:
    """Return a tensor's row: bits per nonzero without the codebook, and their ratio to log2 C(N, k) + k H(codes)."""
    nonzero = tensor.flat[tensor.flat != 0]
    k, size = len(nonzero), max(len(nonzero), 1)
    position_floor, code_floor = log2_binomial(tensor.flat.size, k), entropy_bits(nonzero)
    lengths = tensor.lengths
    row: dict[str, Any] = {"name": tensor.name, "shape": list(tensor.values.shape), "nonzeros": k}
    row |= {"levels": count_levels(tensor.flat), "codebook": lengths.codebook > 0}
    row |= {"positions": round(lengths.positions / size, 3), "codes": round(lengths.values / size, 3)}
    row |= {"position_floor": round(position_floor / size, 3), "code_floor": round(code_floor / size, 3)}
    row |= {"codebook_bytes": round(lengths.codebook / 8, 1)}
    floor, ours = position_floor + code_floor, lengths.positions + lengths.values
    row |= {
        "floor_bits": round(floor, 1),
        "our_bits": round(ours, 1),
        "ratio": round(ours / floor, 4) if floor else None,
    }
    row["position_ratio"] = round(lengths.positions / position_floor, 4) if position_floor else None
    row["target_applies"] = row["codebook"] and k > 2000 and k >= 40 * row["levels"]
    return row


def sum_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return totals of rows: the ratio to the floor of tensors with a codebook, and the positions of all."""
    coded = [row for row in rows if row["codebook"] and row["nonzeros"]]
    totals: dict[str, Any] = {"nonzeros": sum(row["nonzeros"] for row in rows)}
    k = max(totals["nonzeros"], 1)
    for name in ("positions", "codes", "position_floor"):
        totals[name] = round(sum(row[name] * row["nonzeros"] for row in rows) / k, 3)
    positions = [sum(row[name] * row["nonzeros"] for row in rows) for name in ("positions", "position_floor")]
    totals["position_ratio"] = round(positions[0] / positions[1], 4) if positions[1] else None
    totals["codebook_nonzeros"] = sum(row["nonzeros"] for row in coded)
    floor = sum(row["floor_bits"] for row in coded)
    totals["ratio"] = round(sum(row["our_bits"] for row in coded) / floor, 4) if floor else None
    return totals


def gap_symbols(places: NDArray[np.int64], largest: int) -> list[int]:
    """Return the zeros before each nonzero as symbols 0 .. largest; `largest` is that many zeros without a nonzero."""
    symbols = []
    for gap in np.diff(places, prepend=-1) - 1:
        symbols += [largest] * int(gap // largest) + [int(gap % largest)]
    return symbols


def measure_general_compressors(tensors: Sequence[Stored]) -> dict[str, Any]:
    """Return the bytes of zstd -19 and xz (preset 9e, raw LZMA2) of plain arrays, each alone or all in one."""
    indices, gaps, codes, values = b"", b"", b"", b""
    for tensor in tensors:
        places = np.flatnonzero(tensor.flat)
        nonzero = tensor.flat[places]
        if len(places) < tensor.flat.size:
            indices += places.astype("<u4").tobytes()
            gaps += bytes(gap_symbols(places, 255))
        book, numbers = np.unique(nonzero, return_inverse=True)
        if len(book) <= 256:
            codes += numbers.astype(np.uint8).tobytes()
            values += plain_bytes(book)
        else:
            values += plain_bytes(nonzero)
    xz = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    packers: dict[str, Callable[[bytes], int]] = {
        "zstd -19": lambda data: len(zstandard.ZstdCompressor(level=19, write_content_size=False).compress(data)),
        "xz -9e": lambda data: len(lzma.compress(data, lzma.FORMAT_RAW, filters=xz)),
    }
    sizes: dict[str, Any] = {}
    for name, size in packers.items():
        options = {}
        for positions, data in (("uint32 positions", indices), ("gaps in bytes", gaps)):
            options[f"{positions}, arrays apart"] = sum(size(part) for part in (data, codes, values) if part)
            options[f"{positions}, in one"] = size(data + codes + values)
        best = min(options, key=lambda option: options[option])
        sizes[name] = {"bytes": options[best], "of": best}
    return sizes


def huffman_lengths(counts: dict[int, int]) -> dict[int, int]:
    """Return the code length of each symbol."""
    if len(counts) < 2:
        return dict.fromkeys(counts, 1)
    heap = [(count, index, [symbol]) for index, (symbol, count) in enumerate(sorted(counts.items()))]
    heapq.heapify(heap)
    lengths = dict.fromkeys(counts, 0)
    serial = len(heap)
    while len(heap) > 1:
        one, two = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in one[2] + two[2]:
            lengths[symbol] += 1
        heapq.heappush(heap, (one[0] + two[0], serial, one[2] + two[2]))
        serial += 1
    return lengths


def huffman_bits(symbols: Sequence[int], width: int) -> int:
    """Return the length of symbols of `width` bits under their Huffman code, with its table, or plain if that is less.

    The table is canonical: a length of five bits for each symbol of the alphabet, or for each used one with its number.
    """
    counts = Counter(symbols)
    body = sum(counts[symbol] * length for symbol, length in huffman_lengths(counts).items())
    return min(body + min(5 << width, width + (5 + width) * len(counts)), width * len(symbols))


def measure_deep_compression(tensors: Sequence[Stored]) -> dict[str, Any]:
    """Return the bytes of Deep Compression (Han et al. 2016): Huffman codes of gaps between nonzeros and of values.

    A gap that is too long is split by filler zeros, which have a code of their own. For each tensor the better of gaps
    of 5 and of 8 bits counts. More than 256 values have no codebook here and are stored plainly.
    """
    total, used = 0, Counter[int]()
    for tensor in tensors:
        places = np.flatnonzero(tensor.flat)
        book, numbers = np.unique(tensor.flat[places], return_inverse=True)
        options = {}
        for width in (5, 8):
            gaps, codes = [], []
            for gap, number in zip(np.diff(places, prepend=-1) - 1, numbers, strict=True):
                fillers = int(gap) >> width  # a filler after 2^width - 1 zeros is itself one of the zeros
                gaps += [(1 << width) - 1] * fillers + [int(gap) & ((1 << width) - 1)]
                codes += [0] * fillers + [int(number) + 1]
            bits = huffman_bits(gaps, width) if len(places) < tensor.flat.size else 0
            depth = 16 if fits_float16(book) else 32
            if len(book) <= 256:
                bits += huffman_bits(codes, max(math.ceil(math.log2(len(book) + 1)), 1)) + depth * len(book)
            else:
                bits += depth * len(codes)
            options[width] = -(-bits // 8)
        best = min(options, key=lambda width: options[width])
        total, used[best] = total + options[best], used[best] + 1
    return {"bytes": total, "tensors_by_bits_of_gaps": {str(width): used[width] for width in sorted(used)}}


def run_nncodec(python: str | None, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Run `nncodec_size` with that Python, and return what it prints; None without a Python."""
    if python is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "weights.npz"), **arrays)  # type: ignore[arg-type]
        script = Path(__file__).with_name("nncodec_size.py")
        command = [python, str(script), str(Path(folder, "weights.npz")), str(ERROR)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def size_at_error(tensors: Sequence[Stored], limit: float) -> dict[str, Any]:
    """Return the size of ours if it may round as NNCodec does: a float16 codebook of k-means per tensor, or its values.

    The sizes of the codebooks give the fewest bytes at a relative error of all tensors together of at most `limit`, up
    to the integrality gap of equal slopes.
    """
    options = []
    for tensor in tensors:
        layout, flat = Layout.of(tensor.values.shape), tensor.flat
        nonzero = torch.from_numpy(flat[flat != 0])
        tried = [(len(weight_coder.encode_matrix(flat, layout)[0]), 0.0, 0)]
        for size in (size for size in CODEBOOKS if size < count_levels(flat)):
            rounded = flat.copy()
            rounded[flat != 0] = zero_kmeans(nonzero, size)[0].half().float().numpy()
            error = float(np.square((rounded - flat).astype(np.float64)).sum())
            tried.append((len(weight_coder.encode_matrix(rounded, layout)[0]), error, size))
        options.append(tried)
    norm = sum(float(np.square(tensor.flat.astype(np.float64)).sum()) for tensor in tensors)
    best: dict[str, Any] = {}
    low, high = 1e-9, 1e15  # bytes that a unit of relative squared error is worth
    while high > 1.01 * low:
        price = math.sqrt(low * high)
        chosen = [min(tried, key=lambda option: option[0] + price * option[1] / norm) for tried in options]
        error = math.sqrt(sum(option[1] for option in chosen) / norm)
        low, high = (low, price) if error <= limit else (price, high)
        size = sum(len(encode_varint(option[0])) + option[0] + 4 for option in chosen)
        if error <= limit and size < best.get("bytes", math.inf):
            best = {"bytes": size, "error": error, "levels": [option[2] for option in chosen]}
    return best


def compare(ours: int, tensors: Sequence[Stored], whole: dict[str, np.ndarray], python: str | None) -> dict[str, Any]:
    """Return the sizes of all coders on the same weights, and the ratio of ours to the best of the others.

    NNCodec gets the weights themselves, and, if the file stores factors, these too; the shorter counts.
    """
    coders = {"ours": {"bytes": ours}, **measure_general_compressors(tensors)}
    coders["deep compression"] = measure_deep_compression(tensors)
    parts = {tensor.name: tensor.values.astype(np.float32) for tensor in tensors}
    tried = {"weights": run_nncodec(python, whole)}
    if parts.keys() != whole.keys():
        tried["factors as stored"] = run_nncodec(python, parts)
    sizes = {name: result for name, result in tried.items() if result}
    if sizes:
        best = min(sizes, key=lambda name: int(sizes[name]["bytes"]))
        coders[LOSSY] = {**sizes[best], "of": best}
    others = {name: int(row["bytes"]) for name, row in coders.items() if name != "ours"}
    least = min(others, key=lambda name: others[name])
    comparison: dict[str, Any] = {
        "coders": coders,
        "best_rival": least,
        "ours_over_best_rival": round(ours / others[least], 4),
    }
    exact = min(size for name, size in others.items() if name != LOSSY)
    comparison["ours_over_best_exact_rival"] = round(ours / exact, 4)
    if LOSSY in others:
        comparison["ours_at_error"] = size_at_error(tensors, ERROR)
        comparison["at_error_over_nncodec"] = round(comparison["ours_at_error"]["bytes"] / others[LOSSY], 4)
    return comparison


def measure_file(path: Path, python: str | None) -> dict[str, Any]:
    """Return the figures of a model file."""
    data = path.read_bytes()
    content = artifact.unpack(data)
    decoded = artifact.decode(content)
    tensors, whole = [], {}
    for name, (weight, lengths) in decoded.weights.items():
        whole[name] = weight.value()
        for (part, values), part_lengths in zip(weight.parts.items(), lengths, strict=True):
            tensors.append(Stored(name if part == "W" else f"{name}.{part}", values, part_lengths))
    rows = [describe_tensor(tensor) for tensor in tensors]
    ours = sum(len(encode_varint(len(part))) + len(part) + 4 for part in content.parts[:-1])
    totals = inspect_file(path)["totals"]
    return {
        "file": str(path.relative_to(ROOT)),
        "bytes": len(data),
        "weights_bytes": ours,
        "biases_norms_bytes": len(content.parts[-1]) + len(encode_varint(len(content.parts[-1]))) + 4,
        "codebook_bytes": totals["codebook"],
        **sum_rows(rows),
        **compare(ours, [tensor for tensor in tensors if tensor.flat.any()], whole, python),
        "tensors": rows,
    }


def draw_tensor(kind: str, shape: Sequence[int], ratio: float, seed: int) -> NDArray[np.float32]:
    """Return a sparse tensor of exactly ratio N nonzeros, of 16 values.

    Positions are uniform, or have a density per row and per column (of a convolution: per input channel) that is
    log-normal, sigma 1. Values have magnitudes 1 + an exponential of mean 1/2 and random signs, rounded by k-means.
    """
    random = np.random.default_rng(seed)
    rows, size = shape[0], math.prod(shape)
    score = random.gumbel(size=(rows, shape[1], math.prod(shape[2:])))
    if kind == "log-normal":
        score += random.normal(size=(rows, 1, 1)) + random.normal(size=(1, shape[1], 1))
    k = int(ratio * size)
    chosen = np.sort(np.argpartition(score.reshape(-1), size - k)[size - k :])
    drawn = (1 + random.exponential(0.5, k)) * random.choice([-1.0, 1.0], k) / 16
    values, _ = zero_kmeans(torch.from_numpy(drawn.astype(np.float32)), 16)
    tensor = np.zeros(size, np.float32)
    tensor[chosen] = values.half().float().numpy()
    return tensor.reshape(tuple(shape))


def measure_random_tensor(
    kind: str, shape: Sequence[int], ratio: float, python: str | None, seed: int = 0
) -> dict[str, Any]:
    """Return the figures of a random tensor."""
    values = draw_tensor(kind, shape, ratio, seed)
    data, lengths = weight_coder.encode_matrix(values, Layout.of(shape))
    tensor = Stored("W", values, lengths)
    head = {"positions_drawn": kind, "ratio_dense": ratio, "seed": seed, "bits_a_nonzero": 0.0}
    head["bits_a_nonzero"] = round(8 * len(data) / np.count_nonzero(values), 3)
    return {**head, **describe_tensor(tensor), **compare(len(data), [tensor], {"W": values}, python)}


def describe_machine() -> dict[str, Any]:
    """Return the versions of the packages, and the processor's architecture."""
    names = ("numpy", "torch", "numba", "zstandard")
    return {"python": platform.python_version(), **{name: version(name) for name in names}, "cpu": platform.machine()}


def main() -> None:
    """Measure all files and random tensors."""
    parser = argparse.ArgumentParser(
        description="Compare the sizes of model files with those of other coders of the same weights."
    )
    parser.add_argument("--nncodec", help="the Python of NNCodec's environment")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"versions": describe_machine(), "error": ERROR, "files": [], "random": []}
    for kind in ("uniform", "log-normal"):
        for shape in SHAPES:
            for ratio in RATIOS:
                report["random"].append(measure_random_tensor(kind, shape, ratio, arguments.nncodec))
                print(kind, shape, ratio, report["random"][-1]["ours_over_best_rival"], flush=True)
    for path in sorted(ROOT.glob("results/mnist-adversarial/*/model.atmc")) + sorted(
        ROOT.glob("results/cifar10/brief-*/model.atmc")
    ):
        report["files"].append(measure_file(path, arguments.nncodec))
        print(report["files"][-1]["file"], report["files"][-1]["ours_over_best_rival"], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "size.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
