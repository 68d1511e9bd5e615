"""The model file: bit-for-bit round trips, golden bytes, and every way a file can be wrong."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from atmc import models
from atmc.compress.constraints import Codebook, NonzeroBudget
from atmc.compress.factorize import compressible, cut_ranks, factorize, fold, sites
from atmc.pack import artifact, coder
from atmc.pack.inspect import inspection
from atmc.train import assign


def squeezed(kind: str, bits: int | None = 2) -> nn.Module:
    """A LeNet with random values that satisfy a budget, in each structure a method can leave."""
    torch.manual_seed(3)
    model = models.build("lenet", 10, seed=1)
    if kind == "factorized":
        factorize(model)
    elif kind == "ranks":
        cut_ranks(model, {site.path: 1 + index for index, site in enumerate(sites(model))})
    if kind != "dense":
        tensors = compressible(model)
        values = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
        if kind != "ranks":
            values = NonzeroBudget(3000).project(values)
            values = Codebook(bits).project(values) if bits else values
        assign(tensors, values)
    return model


def same(one: nn.Module, two: nn.Module) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", ["dense", "pruned", "factorized", "ranks"])
@pytest.mark.parametrize("bits", [None, 1, 4])
def test_round_trip_is_bit_for_bit(kind, bits, tmp_path):
    model = squeezed(kind, bits)
    size = artifact.save(model, tmp_path / "m.atmc", threat="linf:0.1", method="atmc")
    loaded = artifact.load(tmp_path / "m.atmc")
    assert same(loaded, fold(model))
    assert not loaded.training
    assert size == (tmp_path / "m.atmc").stat().st_size
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(loaded(x), fold(model).eval()(x))
    stored = {entry.name: entry.values() for entry in artifact.read(tmp_path / "m.atmc").entries}
    for name, tensor in compressible(model).items():
        assert np.array_equal(stored[name], tensor.detach().numpy())
    artifact.save(loaded, tmp_path / "again.atmc")
    assert same(artifact.load(tmp_path / "again.atmc"), loaded)


@pytest.mark.parametrize("name", ["resnet18", "wrn-16-8", "mobilenetv2"])
def test_models_with_batch_norm(name):
    model = models.build(name, 10, mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3], seed=0)
    tensors = compressible(model)
    assign(tensors, NonzeroBudget(20_000).project({key: value.detach() for key, value in tensors.items()}))
    data = artifact.to_bytes(model)
    assert same(artifact.from_bytes(data), model)
    assert len(data) < 0.2 * 4 * sum(tensor.numel() for tensor in model.state_dict().values())


def test_same_values_same_bytes():
    assert artifact.to_bytes(squeezed("factorized")) == artifact.to_bytes(squeezed("factorized"))


@given(
    hnp.arrays(
        np.float32,
        st.integers(0, 700),
        elements=st.sampled_from([0.0, 0.0, 0.0, -0.0, 1.5, -2.0, 0.1, 1e-30, 3e38]),
    )
)
@settings(max_examples=200, deadline=None)
def test_any_array_round_trips(values):
    kind, data = coder.encode(values)
    decoded = coder.decode(kind, data, len(values))
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded.view(np.uint32), (values + np.float32(0)).view(np.uint32))
    parts = coder.part_sizes(kind, data, len(values))
    assert sum(parts.values()) == len(data)


@given(st.integers(1, 70_000), st.data())
@settings(max_examples=60, deadline=None)
def test_positions_far_apart_round_trip(size, data):
    where = data.draw(st.lists(st.integers(0, size - 1), max_size=20, unique=True))
    values = np.zeros(size, np.float32)
    values[where] = np.arange(1, len(where) + 1) / 3
    kind, encoded = coder.encode(values)
    assert np.array_equal(coder.decode(kind, encoded, size), values)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int32, np.uint8, np.bool_])
def test_other_number_types(dtype):
    values = np.array([0, 1, 1, 0, 1], dtype)
    kind, data = coder.encode(values)
    decoded = coder.decode(kind, data, 5)
    assert decoded.dtype == dtype
    assert np.array_equal(decoded, values)


def test_values_that_cannot_be_stored():
    with pytest.raises(ValueError, match="tensor w: expected finite values"):
        artifact.pack({}, {"w": np.array([1, np.nan], np.float32)})
    with pytest.raises(ValueError, match="tensor w: expected finite values"):
        artifact.pack({}, {"w": np.array([1, np.inf], np.float64)})
    with pytest.raises(ValueError, match="cannot store values of type complex64"):
        coder.encode(np.zeros(3, np.complex64))
    with pytest.raises(ValueError, match="at most 8 dimensions"):
        artifact.pack({}, {"w": np.zeros((1,) * 9, np.float32)})
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"tensor 0.weight: cannot store values of type {dtype}"):
            artifact.to_bytes(nn.Sequential(nn.Linear(2, 2)).to(dtype))


def test_golden_bytes():
    """Two tensors by hand; a change of these bytes is a change of the format."""
    values = np.zeros(300, np.float32)
    values[[2, 299]] = 1.0, -1.0
    packed = artifact.pack({"model": {}, "structure": {}}, {"w": values, "n": np.array([7], np.int64)})
    text = b'{"model":{},"structure":{}}'
    positions = bytes.fromhex("0200000001 03000000".replace(" ", "")) + bytes([2, 255, 41])
    codebook = bytes.fromhex("0200") + b"\x01" + np.array([-1, 1], "<f2").tobytes()
    sparse = positions + codebook + bytes([0b01])
    plain = positions + b"\x01" + np.array([1, -1], "<f2").tobytes()
    body = sparse if len(sparse) < len(plain) else plain
    kind = 2 if len(sparse) < len(plain) else 1
    expected = b"ATMC" + struct.pack("<HI", 1, len(text)) + text + struct.pack("<H", 2)
    expected += struct.pack("<H", 1) + b"w" + struct.pack("<BIBI", 1, 300, kind, len(body)) + body
    expected += struct.pack("<H", 1) + b"n" + struct.pack("<BIBI", 1, 1, 0, 9) + b"\x03" + struct.pack("<q", 7)
    assert packed == expected + hashlib.sha256(expected).digest()


def resealed(body: bytes) -> bytes:
    """A damaged body with a checksum that holds, as a malicious author would make it."""
    return body + hashlib.sha256(body).digest()


class TestWrongFiles:
    data = artifact.to_bytes(squeezed("factorized"))

    def test_not_an_artifact(self):
        for other in (b"", b"PK\x03\x04 zip", b"ATM"):
            with pytest.raises(artifact.NotAnArtifact, match="not an atmc model file"):
                artifact.unpack(other)

    def test_version_is_named(self):
        with pytest.raises(artifact.UnsupportedVersion, match="version 9; this release reads version 1"):
            artifact.unpack(b"ATMC\x09\x00" + self.data[6:])

    def test_every_truncation_and_every_damaged_byte_is_noticed(self):
        for length in range(0, len(self.data) - 1, 97):
            with pytest.raises(artifact.ArtifactError):
                artifact.from_bytes(self.data[:length])
        for place in range(0, len(self.data), 101):
            damaged = bytearray(self.data)
            damaged[place] ^= 0x40
            with pytest.raises(artifact.ArtifactError):
                artifact.from_bytes(bytes(damaged))

    @given(st.integers(6, len(data) - 33), st.integers(1, 255))
    @settings(max_examples=300, deadline=None)
    def test_damage_under_a_valid_checksum_is_an_error_or_a_model(self, place, change):
        body = bytearray(self.data[:-32])
        body[place] = (body[place] + change) % 256
        try:
            model = artifact.from_bytes(resealed(bytes(body)))
        except artifact.ArtifactError:
            return
        assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())

    def packed(self, metadata=None, **tensors):
        content = artifact.unpack(self.data)
        values = {entry.name: entry.values() for entry in content.entries}
        for name, value in tensors.items():
            if value is None:
                del values[name]
            else:
                values[name] = value
        return artifact.pack(metadata or content.metadata, values)

    @pytest.mark.parametrize(
        ("tensors", "error", "message"),
        [
            ({"conv1.bias": None}, artifact.ModelMismatch, "no tensor conv1.bias"),
            ({"fc1.weight.V": None}, artifact.ModelMismatch, r"no tensor fc1\.weight\.V"),
            ({"extra": np.zeros(3, np.float32)}, artifact.ModelMismatch, "extra, which the model has not"),
            ({"conv1.bias": np.zeros(3, np.float32)}, artifact.ModelMismatch, r"shape \(3,\), the model's is \(20,\)"),
            ({"conv1.bias": np.zeros(20, np.int64)}, artifact.ModelMismatch, "int64"),
            ({"fc1.weight.U": np.zeros((500, 500), np.int64)}, artifact.Malformed, "not made of floats"),
        ],
    )
    def test_tensors_that_do_not_fit(self, tensors, error, message):
        with pytest.raises(error, match=message):
            artifact.from_bytes(self.packed(**tensors))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"structure": {"conv1.weight": ["up", 20]}}, "no valid form"),
            ({"structure": {"conv1.weight": ["left", 0]}}, "rank 0"),
            ({"structure": {"conv1.weight": ["left", 10**9]}}, "rank 1000000000"),
            ({"model": {"name": "lenet", "num_classes": -1}}, "keys"),
            ({"structure": 3}, "no structure"),
            ({"model": 3}, "no model"),
        ],
    )
    def test_metadata_that_makes_no_sense(self, change, message):
        metadata = {**artifact.unpack(self.data).metadata, **change}
        with pytest.raises(artifact.ArtifactError, match=message):
            artifact.from_bytes(self.packed(metadata))

    def test_metadata_that_is_not_json(self):
        for text in (b"\xff\xfe", b"[" * 5000, b"3"):
            body = b"ATMC" + struct.pack("<HI", 1, len(text)) + text + b"\0\0"
            with pytest.raises(artifact.Malformed):
                artifact.unpack(resealed(body))

    def test_a_small_file_cannot_claim_a_large_tensor(self, tmp_path):
        """One value repeated 2^40 times takes a few bytes; neither `load` nor `inspect` may believe it."""
        text = b'{"model":{},"structure":{}}'
        codes = struct.pack("<H", 1) + b"\1" + b"\0\0"
        tensor = struct.pack("<H", 1) + b"w" + struct.pack("<BIIBI", 2, 2**20, 2**20, 3, len(codes)) + codes
        data = resealed(b"ATMC" + struct.pack("<HI", 1, len(text)) + text + struct.pack("<H", 1) + tensor)
        (tmp_path / "m.atmc").write_bytes(data)
        for read in (artifact.load, inspection):
            with pytest.raises(artifact.Malformed, match="1,099,511,627,776 values"):
                read(tmp_path / "m.atmc")

    def test_inspection_of_a_structure_that_makes_no_sense(self, tmp_path):
        for structure, message in (({"w": 3}, "no valid form"), ({"w": ["left", 2]}, "factors of w are missing")):
            (tmp_path / "m.atmc").write_bytes(artifact.pack({"model": {}, "structure": structure}, {}))
            with pytest.raises(artifact.Malformed, match=message):
                inspection(tmp_path / "m.atmc")

    def test_the_same_tensor_twice_and_too_many_dimensions(self):
        text = b'{"model":{},"structure":{}}'
        head = b"ATMC" + struct.pack("<HI", 1, len(text)) + text
        one = struct.pack("<H", 1) + b"w" + struct.pack("<BIBI", 1, 0, 0, 1) + b"\0"
        with pytest.raises(artifact.Malformed, match="stands twice"):
            artifact.unpack(resealed(head + b"\x02\0" + one + one))
        deep = struct.pack("<H", 1) + b"w" + bytes([9])
        with pytest.raises(artifact.Malformed, match="9 dimensions"):
            artifact.unpack(resealed(head + b"\x01\0" + deep))
        with pytest.raises(artifact.Malformed, match="not UTF-8"):
            artifact.unpack(resealed(head + b"\x01\0" + struct.pack("<H", 1) + b"\xff"))
        with pytest.raises(artifact.Malformed, match="left over"):
            artifact.unpack(resealed(head + b"\0\0" + b"x"))

    @pytest.mark.parametrize(
        ("kind", "data", "message"),
        [
            (9, b"", "unknown encoding"),
            (0, b"\x09", "unknown number type"),
            (0, b"\x00" + b"\0" * 39, "40 bytes expected"),
            (0, b"\x00" + b"\0" * 41, "left over"),
            (0, b"\x00" + b"\x00\x00\x80\x7f" * 10, "not finite"),
            (0, b"\x06" + b"\x02" * 10, "truth value"),
            (1, struct.pack("<IBI", 11, 0, 2), "11 nonzeros among 10"),
            (1, struct.pack("<IBI", 1, 0, 3) + b"\1\0\0", "a bitmap of 3 bytes"),
            (1, struct.pack("<IBI", 1, 0, 2) + b"\0\xff", "padding bits"),
            (1, struct.pack("<IBI", 2, 0, 2) + b"\1\0", "do not match"),
            (1, struct.pack("<IBI", 1, 1, 1) + b"\x0a", "do not match"),
            (1, struct.pack("<IBI", 1, 1, 1) + b"\xff", "cut off"),
            (1, struct.pack("<IBI", 1, 2, 1) + b"\xff", "cut off"),
            (1, struct.pack("<IBI", 1, 7, 1) + b"\xff", "unknown position mode"),
            (1, struct.pack("<IBI", 1, 1, 1) + b"\1\3" + b"\0" * 8, "must be floats"),
            (3, b"\0\0", "codebook of 0"),
            (3, b"\x01\x01", "codebook of 257"),
            (3, b"\x01", "2 bytes expected, 1 left"),
            (3, b"\1\0\3" + b"\0" * 8, "must be floats"),
            (3, b"\x03\0\1" + b"\0\0" * 3 + b"\xff" * 3, "padding bits|outside"),
            (3, b"\x03\0\1" + b"\0\0" * 3 + b"\xff\xff\x0f", "outside its codebook"),
        ],
    )
    def test_encodings_that_make_no_sense(self, kind, data, message):
        with pytest.raises(coder.CodingError, match=message):
            coder.decode(kind, data, 10)


class Own(nn.Module):
    """A user's own class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, num_classes)
        self.register_buffer("steps", torch.tensor(3, dtype=torch.int32))

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_a_users_class_needs_its_factory(tmp_path):
    model = Own(3)
    artifact.save(model, tmp_path / "m.atmc", input_shape=(1, 2, 2), classes=3)
    with pytest.raises(artifact.FactoryNeeded, match="give the factory"):
        artifact.load(tmp_path / "m.atmc")
    assert same(artifact.load(tmp_path / "m.atmc", factory=Own), model)
    assert artifact.read(tmp_path / "m.atmc").metadata["input_shape"] == [1, 2, 2]


def failing(num_classes: int) -> nn.Module:
    raise KeyError("width")


def wide(num_classes: int) -> nn.Module:
    model = Own(num_classes)
    model.layer = nn.Linear(9, num_classes)
    return model


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (
            failing,
            artifact.FactoryFailed,
            r"m\.atmc cannot be loaded: the factory .*:failing failed .*KeyError: 'width'$",
        ),
        (lambda num_classes: "net", artifact.FactoryFailed, "to return a torch.nn.Module, got str"),
        (lambda: Own(3), artifact.FactoryFailed, "callable with num_classes alone"),
        (
            wide,
            artifact.ModelMismatch,
            r"tensor layer\.weight has shape \(3, 4\), the model's is \(3, 9\); .*:wide is not its "
            r"factory, which was 'nets:Own'$",
        ),
        (
            lambda num_classes: Own(5),
            artifact.ModelMismatch,
            r"\(3, 4\), the model's is \(5, 4\); .*is not its factory",
        ),
        (lambda num_classes: nn.Linear(4, 3), artifact.ModelMismatch, "no tensor weight, .*; .*is not its factory"),
    ],
    ids=["fails", "no module", "no argument", "another width", "another number of classes", "other names"],
)
def test_factories_that_do_not_build_the_files_model(tmp_path, factory, error, message):
    model = Own(3)
    model.atmc_spec = {"name": "nets:Own", "num_classes": 3, "input_shape": None}
    artifact.save(model, tmp_path / "m.atmc")
    with pytest.raises(error, match=message):
        artifact.load(tmp_path / "m.atmc", factory=factory)


def test_a_factory_named_in_a_file_is_never_imported(tmp_path):
    model = Own(3)
    model.atmc_spec = {"name": "antigravity:run", "num_classes": 3, "input_shape": None}
    artifact.save(model, tmp_path / "m.atmc")
    with pytest.raises(artifact.FactoryNeeded, match="antigravity:run"):
        artifact.load(tmp_path / "m.atmc")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.atmc"
    artifact.save(squeezed("pruned"), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        artifact.save(squeezed("dense"), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.atmc"]


def test_inspection_accounts_for_every_byte(tmp_path):
    model = squeezed("factorized")
    size = artifact.save(model, tmp_path / "m.atmc")
    found = inspection(tmp_path / "m.atmc")
    assert found["file_bytes"] == size
    totals = {key: value for key, value in found["totals"].items() if key != "nonzeros"}
    assert sum(totals.values()) == size
    rows = {row["name"]: row for row in found["tensors"]}
    for name, tensor in compressible(model).items():
        assert rows[name]["nonzeros"] == int(tensor.count_nonzero())
        assert rows[name]["levels"] <= 4
    assert found["factorized"]["fc1.weight"]["form"] == "left"
    assert json.loads(json.dumps(found)) == found
