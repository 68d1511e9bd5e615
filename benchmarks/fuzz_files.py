"""Load many damaged model files: none may crash, hang, exhaust memory or pass as another model.

    python benchmarks/fuzz_files.py --count 200000 --out results/files/fuzz.json

Each case damages a file of a small model: flipped bits, bytes set, cut off, inserted, moved or filled blocks, two files
spliced, heads and numbers changed. Half of the damage is done inside a part, as a malicious author would, and lengths
and the chain of checksums are repaired; in the metadata it hits either the deflated bytes or the JSON. Then the file is
loaded, or every fourth one decoded without its model, as `atmc inspect` does. It must end

- in an `ArtifactError` or a model of finite values, and nothing else, within 2 seconds of the processor,
- under a limit of address space (RLIMIT_AS),
- and, if checksums were not repaired, never in a model whose values differ from those of the file before.

Prints and writes one JSON object with counts, and the number of each case that failed, which with the seed repeats it;
the exit status is 1 then. Any other error than an `ArtifactError` ends the program.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from atmc import models
from atmc.compress.constraints import Codebook, NonzeroBudget
from atmc.compress.factorize import compressible_parameters, cut_ranks, factorize
from atmc.models.batch_norm import make_affine
from atmc.pack import artifact
from atmc.pack.container import DICTIONARY, Reader, encode_varint, pack_parts
from atmc.training.loop import assign

LIMIT_S = 2.0
MAX_VALUES = 1 << 20  # the caller's limit in `load`
ROOM = 512 << 20  # address space beyond what is taken before the first case


class Net(nn.Module):
    """A user's own class with every kind of tensor, 200 values."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(24, num_classes)
        self.register_buffer("steps", torch.tensor([3, -1]))
        self.register_buffer("flags", torch.tensor([True, False]))


@dataclass(frozen=True)
class Base:
    """A whole file, the values that it holds, its factory, and its share of the cases."""

    name: str
    data: bytes
    state: dict[str, torch.Tensor]
    factory: Callable[..., nn.Module] | None
    share: float


@dataclass
class Counts:
    """Numbers of cases by outcome, by mutation and by file, the failures, and the longest time in seconds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    mutations: Counter[str] = field(default_factory=Counter)
    bases: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0


def compress(model: nn.Module, nonzeros: int, bits: int | None) -> nn.Module:
    """Give a model random values under a budget, with a codebook or exact in float16; in place, and returned."""
    tensors = compressible_parameters(model)
    values = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    values = NonzeroBudget(nonzeros).project(values)
    values = Codebook(bits).project(values) if bits else {name: value.half().float() for name, value in values.items()}
    assign(tensors, values)
    return model


def make_bases() -> list[Base]:
    """Return the files to damage."""
    torch.manual_seed(0)
    ranks = {"conv.weight": 2, "head.weight": 3}
    models_with_factories: list[tuple[str, nn.Module, Callable[..., nn.Module] | None, float]] = [
        ("zoo LeNet, sparse", compress(models.build("lenet", 10, seed=0), 800, 3), None, 0.01),
        ("own class, codebook", compress(Net(4), 50, 2), Net, 0.3),
        ("own class, factorized", compress(factorize(Net(4)), 60, 3), Net, 0.25),
        ("own class, low rank", compress(cut_ranks(Net(4), ranks), 70, None), Net, 0.15),
        ("own class, scale and shift", compress(make_affine(Net(4)), 40, None), Net, 0.25),
        ("own class, dense float32", Net(4), Net, 0.04),
    ]
    files = []
    for name, model, factory, share in models_with_factories:
        data = artifact.to_bytes(model, input_shape=(1, 4, 4), classes=4, threat="linf:0.1", method="atmc")
        state = dict(artifact.from_bytes(data, factory=factory).state_dict())
        files.append(Base(name, data, state, factory, share))
    return files


def flip_bits(data: bytearray, rng: Random, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_bytes(data: bytearray, rng: Random, other: bytes) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def truncate(data: bytearray, rng: Random, other: bytes) -> None:
    del data[rng.randrange(len(data)) :]


def insert(data: bytearray, rng: Random, other: bytes) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 30)))


def cut_out(data: bytearray, rng: Random, other: bytes) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 2, 4, 30))]


def fill(data: bytearray, rng: Random, other: bytes) -> None:
    at = rng.randrange(len(data))
    block = data[at : at + rng.choice((2, 8, 40))]
    data[at : at + len(block)] = bytes([rng.choice((0, 255, 85))]) * len(block)


def move_block(data: bytearray, rng: Random, other: bytes) -> None:
    at = rng.randrange(len(data))
    block = data[at : at + rng.randint(1, 40)]
    del data[at : at + len(block)]
    to = rng.randrange(len(data) + 1)
    data[to:to] = block


def splice(data: bytearray, rng: Random, other: bytes) -> None:
    del data[rng.randrange(len(data)) :]
    data += other[rng.randrange(len(other) + 1) :]


def set_head(data: bytearray, rng: Random, other: bytes) -> None:
    """Change the form, rank or a length of a part."""
    data[rng.randrange(min(4, len(data)))] = rng.choice((rng.randrange(8), rng.randrange(256)))


def change_number(data: bytearray, rng: Random, other: bytes) -> None:
    """Change a size or an option in JSON."""
    matches = list(re.finditer(rb"\d+|true|false|null", data))
    if matches:
        match = rng.choice(matches)
        data[match.start() : match.end()] = rng.choice(NUMBERS)


NUMBERS = (b"0", b"-1", b"1", b"5", b"1.5", b"300", b"70000", b"5000000", b"4294967295", b"1e400", b"null", b'"6"')
MUTATIONS = (flip_bits, set_bytes, truncate, insert, cut_out, fill, move_block, splice, set_head, change_number)


def split_parts(data: bytes) -> list[bytes]:
    """Return the parts of a whole file, metadata first."""
    reader, parts = Reader(data[6:], "file"), []
    while not reader.done:
        parts.append(reader.take(reader.take_varint()))
        reader.take(4)
    return parts


def seal(parts: Sequence[bytes]) -> bytes:
    """Return a file of these parts, whatever they hold, with valid lengths and checksums."""
    empty = pack_parts({}, [])[:6]
    data, check = empty, zlib.crc32(empty)
    for part in parts:
        check = zlib.crc32(part, check)
        data += encode_varint(len(part)) + part + check.to_bytes(4, "little")
    return data


def inflate(part: bytes) -> bytes:
    return zlib.decompressobj(-15, DICTIONARY).decompress(part)


def deflate(text: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    return packer.compress(text) + packer.flush()


def damage(base: Base, other: Base, rng: Random) -> tuple[bytes, str, bool]:
    """Return (the damaged file, the name of the mutation, whether its checksums were repaired)."""
    mutate = rng.choice(MUTATIONS)
    if rng.random() < 0.5:
        data = bytearray(base.data)
        mutate(data, rng, other.data)
        return bytes(data), mutate.__name__, False
    parts = split_parts(base.data)
    if rng.random() < 0.05:
        at, to = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(3):
            case 0:
                parts[at], parts[to] = parts[to], parts[at]
            case 1:
                parts.insert(to, parts[at])
            case _:
                del parts[at]
        return seal(parts), "parts changed", True
    at = rng.randrange(len(parts))
    text = at == 0 and rng.random() < 0.7
    part = bytearray(inflate(parts[0]) if text else parts[at])
    if not part:
        part = bytearray(1)
    mutate(part, rng, rng.choice(split_parts(other.data)))
    parts[at] = deflate(bytes(part)) if text else bytes(part)
    return seal(parts), f"{mutate.__name__} in {'JSON' if text else 'a part'}", True


def try_file(base: Base, data: bytes, repaired: bool, *, inspecting: bool) -> tuple[str, bool]:
    """Load or decode a file; return the outcome, and whether it is allowed."""
    try:
        if inspecting:
            artifact.decode(artifact.unpack(data), max_values=MAX_VALUES)
            return "decoded", repaired
        state = artifact.from_bytes(data, factory=base.factory, max_values=MAX_VALUES).state_dict()
    except artifact.ArtifactError as error:
        return type(error).__name__, True
    if state.keys() == base.state.keys() and all(torch.equal(state[key], base.state[key]) for key in state):
        return "the same model", True
    finite = all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())
    return "another model", repaired and finite


def fuzz(count: int, seed: int) -> Counts:
    """Damage and load `count` files."""
    files, counts = make_bases(), Counts()
    for case in range(count):
        rng = Random(seed * 1_000_003 + case)
        base, other = rng.choices(files, [file.share for file in files])[0], rng.choice(files)
        data, mutation, repaired = damage(base, other, rng)
        if any(data == file.data for file in files):  # a splice may change nothing
            counts.outcomes["a whole file"] += 1
            continue
        began, result = time.process_time(), ""
        try:
            result, allowed = try_file(base, data, repaired, inspecting=case % 4 == 3)
        finally:
            if not result:
                print(f"seed {seed}, case {case}, {base.name}, {mutation}: crashed", file=sys.stderr)
        took = time.process_time() - began
        counts.slowest = max(counts.slowest, took)
        counts.outcomes[("repaired: " if repaired else "damaged: ") + result] += 1
        counts.mutations[mutation] += 1
        counts.bases[base.name] += 1
        if not allowed or took > LIMIT_S:
            counts.failures.append(f"case {case}, {base.name}, {mutation}: {result}, {took:.2f} s")
    return counts


def limit_memory(room: int) -> int:
    """Limit the address space of the process to `room` bytes more than it has, and return what it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return used


def main() -> int:
    """Damage and load files, and print the counts; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fuzz(200, options.seed + 1)  # compiles and imports what is needed on first use
    artifact.from_bytes(make_bases()[0].data)
    limit_memory(ROOM)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    counts = fuzz(options.count, options.seed)
    report: dict[str, Any] = {
        "command": f"python benchmarks/fuzz_files.py --count {options.count} --seed {options.seed}",
        "files": options.count,
        "failures": counts.failures,
        "outcomes": dict(sorted(counts.outcomes.items())),
        "mutations": dict(sorted(counts.mutations.items())),
        "bases": dict(sorted(counts.bases.items())),
        "slowest_s": round(counts.slowest, 3),
        "limit_s": LIMIT_S,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rss_before_mib": before // 1024,
        "address_space_limit_mib_more": ROOM >> 20,
        "seconds": round(time.monotonic() - began, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    return 1 if counts.failures else 0


if __name__ == "__main__":
    sys.exit(main())
