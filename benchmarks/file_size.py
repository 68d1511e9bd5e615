"""How small the files are: against the floor of information theory, general compressors, Deep Compression and NNCodec.

    python benchmarks/file_size.py --nncodec runs/nncodec/bin/python --out results/files

Writes size.json: every committed file of results/mnist and results/cifar10, and random tensors (seed 0). NNCodec has an
environment of its own (`nncodec_size`); without --nncodec it is left out. `results/files/table.py` makes the tables.

All coders get the same weights, no biases and no norms. Ours is what the weights' parts take in the file, with lengths
and checksums; the others get their tensors' shapes for nothing (NNCodec writes them). Codebooks are in every total.
NNCodec alone rounds; what ours takes where it may round as much, too, stands beside it (`at_error`).
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
from atmc.pack.container import varint
from atmc.pack.inspect import inspection
from atmc.pack.weight_coder import Matrix, Spent, entropy_bits, log2_binomial

ROOT = Path(__file__).parents[1]
ERROR, LOSSY = 0.01, "NNCodec, 1 % error"  # relative error that NNCodec may make
CODEBOOKS = (2, 4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # sizes tried in `at_error`
RATIOS = (0.01, 0.005)
SHAPES = ((512, 4608), (512, 512, 3, 3), (640, 800))


@dataclass(frozen=True)
class Stored:
    """A tensor as the file stores it: its values, and what ours spends on it, in bits."""

    name: str
    values: np.ndarray
    spent: Spent

    @property
    def flat(self) -> NDArray[np.float32]:
        """The values in order."""
        return self.values.reshape(-1)


def levels(values: np.ndarray) -> int:
    """Distinct nonzero values."""
    return len(np.unique(values[values != 0]))


def is_half(values: np.ndarray) -> bool:
    """Whether float16 holds every value."""
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())


def plain_bytes(values: np.ndarray) -> bytes:
    """The values in float16 where that is exact, else in float32."""
    return values.astype("<f2" if is_half(values) else "<f4").tobytes()


def figures(tensor: Stored) -> dict[str, Any]:
    """One tensor's row: bits a nonzero, and the ratio to the floor log2 C(N, k) + k H(codes), codebooks apart."""
    nonzero = tensor.flat[tensor.flat != 0]
    k, size = len(nonzero), max(len(nonzero), 1)
    position_floor, code_floor = log2_binomial(tensor.flat.size, k), entropy_bits(nonzero)
    spent = tensor.spent
    row: dict[str, Any] = {"name": tensor.name, "shape": list(tensor.values.shape), "nonzeros": k}
    row |= {"levels": levels(tensor.flat), "codebook": spent.codebook > 0}
    row |= {"positions": round(spent.positions / size, 3), "codes": round(spent.values / size, 3)}
    row |= {"position_floor": round(position_floor / size, 3), "code_floor": round(code_floor / size, 3)}
    row |= {"codebook_bytes": round(spent.codebook / 8, 1)}
    floor, ours = position_floor + code_floor, spent.positions + spent.values
    row |= {
        "floor_bits": round(floor, 1),
        "our_bits": round(ours, 1),
        "ratio": round(ours / floor, 4) if floor else None,
    }
    row["position_ratio"] = round(spent.positions / position_floor, 4) if position_floor else None
    row["target_applies"] = row["codebook"] and k > 2000 and k >= 40 * row["levels"]
    return row


def summed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals of rows: tensors with a codebook against their floor, and the positions of all."""
    coded = [row for row in rows if row["codebook"] and row["nonzeros"]]
    found: dict[str, Any] = {"nonzeros": sum(row["nonzeros"] for row in rows)}
    k = max(found["nonzeros"], 1)
    for name in ("positions", "codes", "position_floor"):
        found[name] = round(sum(row[name] * row["nonzeros"] for row in rows) / k, 3)
    positions = [sum(row[name] * row["nonzeros"] for row in rows) for name in ("positions", "position_floor")]
    found["position_ratio"] = round(positions[0] / positions[1], 4) if positions[1] else None
    found["codebook_nonzeros"] = sum(row["nonzeros"] for row in coded)
    floor = sum(row["floor_bits"] for row in coded)
    found["ratio"] = round(sum(row["our_bits"] for row in coded) / floor, 4) if floor else None
    return found


def gap_bytes(where: NDArray[np.int64], most: int) -> list[int]:
    """Zeros before each nonzero, in symbols of 0 .. most; symbol `most` stands for so many zeros and no nonzero."""
    symbols = []
    for gap in np.diff(where, prepend=-1) - 1:
        symbols += [most] * int(gap // most) + [int(gap % most)]
    return symbols


def general(tensors: Sequence[Stored]) -> dict[str, Any]:
    """zstd -19 and xz (preset 9e, raw LZMA2) of plain arrays, each alone or all in one: bytes, and of which."""
    indices, gaps, codes, values = b"", b"", b"", b""
    for tensor in tensors:
        where = np.flatnonzero(tensor.flat)
        nonzero = tensor.flat[where]
        if len(where) < tensor.flat.size:
            indices += where.astype("<u4").tobytes()
            gaps += bytes(gap_bytes(where, 255))
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
    found: dict[str, Any] = {}
    for name, size in packers.items():
        options = {}
        for positions, data in (("uint32 positions", indices), ("gaps in bytes", gaps)):
            options[f"{positions}, arrays apart"] = sum(size(part) for part in (data, codes, values) if part)
            options[f"{positions}, in one"] = size(data + codes + values)
        best = min(options, key=lambda option: options[option])
        found[name] = {"bytes": options[best], "of": best}
    return found


def huffman_lengths(counts: dict[int, int]) -> dict[int, int]:
    """Code length of each symbol."""
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
    """Symbols of so many bits under their Huffman code, with its table; or as they are, where that is shorter.

    The table is canonical: a length of five bits for each symbol of the alphabet, or for each used one with its number.
    """
    counts = Counter(symbols)
    body = sum(counts[symbol] * length for symbol, length in huffman_lengths(counts).items())
    return min(body + min(5 << width, width + (5 + width) * len(counts)), width * len(symbols))


def deep_compression(tensors: Sequence[Stored]) -> dict[str, Any]:
    """Han et al. 2016: positions relative, a filler zero where a gap is too long, Huffman codes of gaps and of values.

    For each tensor the better of gaps of 5 and of 8 bits; the filler is a code of its own. More than 256 values have no
    codebook here: plain.
    """
    total, used = 0, Counter[int]()
    for tensor in tensors:
        where = np.flatnonzero(tensor.flat)
        book, numbers = np.unique(tensor.flat[where], return_inverse=True)
        options = {}
        for width in (5, 8):
            gaps, codes = [], []
            for gap, number in zip(np.diff(where, prepend=-1) - 1, numbers, strict=True):
                fillers = int(gap) >> width  # a filler after 2^width - 1 zeros is itself one of the zeros
                gaps += [(1 << width) - 1] * fillers + [int(gap) & ((1 << width) - 1)]
                codes += [0] * fillers + [int(number) + 1]
            bits = huffman_bits(gaps, width) if len(where) < tensor.flat.size else 0
            depth = 16 if is_half(book) else 32
            if len(book) <= 256:
                bits += huffman_bits(codes, max(math.ceil(math.log2(len(book) + 1)), 1)) + depth * len(book)
            else:
                bits += depth * len(codes)
            options[width] = -(-bits // 8)
        best = min(options, key=lambda width: options[width])
        total, used[best] = total + options[best], used[best] + 1
    return {"bytes": total, "tensors_by_bits_of_gaps": {str(width): used[width] for width in sorted(used)}}


def nncodec(python: str | None, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """What `nncodec_size` finds."""
    if python is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "weights.npz"), **arrays)  # type: ignore[arg-type]
        script = Path(__file__).with_name("nncodec_size.py")
        command = [python, str(script), str(Path(folder, "weights.npz")), str(ERROR)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def at_error(tensors: Sequence[Stored], most: float) -> dict[str, Any]:
    """Ours where it may round as NNCodec does: a codebook of ZeroKmeans in float16 a tensor, or its values as they are.

    The sizes of the codebooks are those of the fewest bytes for a relative error of all tensors together of at most
    `most`, up to the integrality gap of equal slopes.
    """
    options = []
    for tensor in tensors:
        matrix, flat = Matrix.of(tensor.values.shape), tensor.flat
        nonzero = torch.from_numpy(flat[flat != 0])
        tried = [(len(weight_coder.write_weight(flat, matrix)[0]), 0.0, 0)]
        for size in (size for size in CODEBOOKS if size < levels(flat)):
            rounded = flat.copy()
            rounded[flat != 0] = zero_kmeans(nonzero, size)[0].half().float().numpy()
            error = float(np.square((rounded - flat).astype(np.float64)).sum())
            tried.append((len(weight_coder.write_weight(rounded, matrix)[0]), error, size))
        options.append(tried)
    norm = sum(float(np.square(tensor.flat.astype(np.float64)).sum()) for tensor in tensors)
    best: dict[str, Any] = {}
    low, high = 1e-9, 1e15  # bytes that a unit of relative squared error is worth
    while high > 1.01 * low:
        price = math.sqrt(low * high)
        chosen = [min(tried, key=lambda option: option[0] + price * option[1] / norm) for tried in options]
        error = math.sqrt(sum(option[1] for option in chosen) / norm)
        low, high = (low, price) if error <= most else (price, high)
        size = sum(len(varint(option[0])) + option[0] + 4 for option in chosen)
        if error <= most and size < best.get("bytes", math.inf):
            best = {"bytes": size, "error": error, "levels": [option[2] for option in chosen]}
    return best


def compared(ours: int, tensors: Sequence[Stored], whole: dict[str, np.ndarray], python: str | None) -> dict[str, Any]:
    """All coders on the same weights, and ours over the best of them.

    NNCodec gets the weights themselves, and, where the file stores factors, these too; the shorter counts.
    """
    coders = {"ours": {"bytes": ours}, **general(tensors), "deep compression": deep_compression(tensors)}
    parts = {tensor.name: tensor.values.astype(np.float32) for tensor in tensors}
    tried = {"weights": nncodec(python, whole)}
    if parts.keys() != whole.keys():
        tried["factors as stored"] = nncodec(python, parts)
    sizes = {name: found for name, found in tried.items() if found}
    if sizes:
        best = min(sizes, key=lambda name: int(sizes[name]["bytes"]))
        coders[LOSSY] = {**sizes[best], "of": best}
    rivals = {name: int(row["bytes"]) for name, row in coders.items() if name != "ours"}
    least = min(rivals, key=lambda name: rivals[name])
    found: dict[str, Any] = {
        "coders": coders,
        "best_rival": least,
        "ours_over_best_rival": round(ours / rivals[least], 4),
    }
    exact = min(size for name, size in rivals.items() if name != LOSSY)
    found["ours_over_best_exact_rival"] = round(ours / exact, 4)
    if LOSSY in rivals:
        found["ours_at_error"] = at_error(tensors, ERROR)
        found["at_error_over_nncodec"] = round(found["ours_at_error"]["bytes"] / rivals[LOSSY], 4)
    return found


def of_file(path: Path, python: str | None) -> dict[str, Any]:
    """A file's figures."""
    data = path.read_bytes()
    content = artifact.unpack(data)
    decoded = artifact.decode(content)
    tensors, whole = [], {}
    for name, (weight, lengths) in decoded.weights.items():
        whole[name] = weight.value()
        for (part, values), spent in zip(weight.parts.items(), lengths, strict=True):
            tensors.append(Stored(name if part == "W" else f"{name}.{part}", values, spent))
    rows = [figures(tensor) for tensor in tensors]
    ours = sum(len(varint(len(part))) + len(part) + 4 for part in content.parts[:-1])
    totals = inspection(path)["totals"]
    return {
        "file": str(path.relative_to(ROOT)),
        "bytes": len(data),
        "weights_bytes": ours,
        "biases_norms_bytes": len(content.parts[-1]) + len(varint(len(content.parts[-1]))) + 4,
        "codebook_bytes": totals["codebook"],
        **summed(rows),
        **compared(ours, [tensor for tensor in tensors if tensor.flat.any()], whole, python),
        "tensors": rows,
    }


def random_tensor(kind: str, shape: Sequence[int], ratio: float, seed: int) -> NDArray[np.float32]:
    """A sparse tensor: exactly ratio N nonzeros, 16 values.

    Positions uniform, or with a density of each row and each column (of a convolution: input channel) that is
    log-normal, sigma 1. Values: magnitudes 1 + an exponential of mean 1/2, random signs, through our k-means.
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


def of_random(kind: str, shape: Sequence[int], ratio: float, python: str | None, seed: int = 0) -> dict[str, Any]:
    """A random tensor's figures."""
    values = random_tensor(kind, shape, ratio, seed)
    data, spent = weight_coder.write_weight(values, Matrix.of(shape))
    tensor = Stored("W", values, spent)
    head = {"positions_drawn": kind, "ratio_dense": ratio, "seed": seed, "bits_a_nonzero": 0.0}
    head["bits_a_nonzero"] = round(8 * len(data) / np.count_nonzero(values), 3)
    return {**head, **figures(tensor), **compared(len(data), [tensor], {"W": values}, python)}


def machine() -> dict[str, Any]:
    """Versions and machine."""
    names = ("numpy", "torch", "numba", "zstandard")
    return {"python": platform.python_version(), **{name: version(name) for name in names}, "cpu": platform.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Sizes of the files, and of what others make of the same weights.")
    parser.add_argument("--nncodec", help="the Python of NNCodec's environment")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"versions": machine(), "error": ERROR, "files": [], "random": []}
    for kind in ("uniform", "log-normal"):
        for shape in SHAPES:
            for ratio in RATIOS:
                report["random"].append(of_random(kind, shape, ratio, arguments.nncodec))
                print(kind, shape, ratio, report["random"][-1]["ours_over_best_rival"], flush=True)
    for path in sorted(ROOT.glob("results/mnist/*/model.atmc")) + sorted(
        ROOT.glob("results/cifar10/brief-*/model.atmc")
    ):
        report["files"].append(of_file(path, arguments.nncodec))
        print(report["files"][-1]["file"], report["files"][-1]["ours_over_best_rival"], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "size.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
