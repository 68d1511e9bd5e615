"""Model files: round trips bit for bit, golden bytes, and a named error for every way in which a file can be wrong."""

import json
import struct
import zlib
from pathlib import Path

import golden_files
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from atmc import models
from atmc.compress.constraints import Codebook, NonzeroBudget
from atmc.compress.factorize import (
    compressible_parameters,
    compressible_weights,
    cut_ranks,
    factor_structure,
    factorize,
    fold,
)
from atmc.core import files
from atmc.models import batch_norm
from atmc.pack import artifact, weight_coder
from atmc.pack.container import DICTIONARY, MAX_METADATA, Reader, encode_varint, pack_parts
from atmc.pack.inspect import inspect_file
from atmc.training.loop import assign


def random_lenet(kind: str, bits: int | None = 2) -> nn.Module:
    """Build a LeNet with random values that satisfy a budget, in each structure that a method can leave."""
    torch.manual_seed(3)
    model = models.build("lenet", 10, seed=1)
    if kind in ("identity", "svd"):
        factorize(model, start=kind)
    elif kind == "ranks":
        cut_ranks(model, {weight.path: 1 + index for index, weight in enumerate(compressible_weights(model))})
    if kind != "dense":
        tensors = compressible_parameters(model)
        values = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
        if kind != "ranks":
            values = NonzeroBudget(3000).project(values)
            values = Codebook(bits).project(values) if bits else values
        assign(tensors, values)
    return model


def same(one: nn.Module, two: nn.Module) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def parts_of(data: bytes) -> list[bytes]:
    """Return the parts of a whole file, metadata first."""
    reader, parts = Reader(data[6:], "file"), []
    while not reader.done:
        parts.append(reader.take(reader.take_varint()))
        reader.take(4)
    return parts


def seal(parts: list[bytes]) -> bytes:
    """Return a file of these parts with valid checksums, as a malicious author would make it."""
    data = b"ATMC\x03\x00"
    check = zlib.crc32(data)
    for part in parts:
        check = zlib.crc32(part, check)
        data += encode_varint(len(part)) + part + struct.pack("<I", check)
    return data


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("pruned", None), ("pruned", 1), ("identity", 4), ("svd", 2), ("ranks", None)],
)
def test_round_trip_is_bit_for_bit(kind, bits, tmp_path):
    model = random_lenet(kind, bits)
    size = artifact.save(model, tmp_path / "m.atmc", threat="linf:0.1", method="atmc")
    loaded = artifact.load(tmp_path / "m.atmc")
    assert same(loaded, fold(model))
    assert not loaded.training
    assert size == (tmp_path / "m.atmc").stat().st_size
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(loaded(x), fold(model).eval()(x))
    content = artifact.read(tmp_path / "m.atmc")
    assert content.metadata["threat"] == "linf:0.1"
    weights = artifact.decode(content).weights
    matrices = {f"{name}.{part}": x for name, (weight, _) in weights.items() for part, x in weight.parts.items()}
    for name, tensor in compressible_parameters(model).items():
        stored = matrices[name if name in matrices else f"{name}.W"]
        assert np.array_equal(stored.reshape(-1), tensor.detach().numpy().reshape(-1))
    assert same(artifact.from_bytes(artifact.to_bytes(loaded)), loaded)
    assert artifact.to_bytes(model, threat="linf:0.1", method="atmc") == (tmp_path / "m.atmc").read_bytes()


@pytest.mark.parametrize("kind", ["identity", "ranks", "pruned"])
def test_open_gives_model_factors_and_metadata_of_one_decoding(kind, tmp_path):
    model = random_lenet(kind)
    artifact.save(model, tmp_path / "m.atmc", threat="linf:0.1")
    loaded = artifact.open(tmp_path / "m.atmc")
    assert same(loaded.model, artifact.load(tmp_path / "m.atmc"))
    assert loaded.metadata == artifact.read(tmp_path / "m.atmc").metadata
    assert loaded.input_shape == (1, 28, 28)
    assert loaded.source == str(tmp_path / "m.atmc")
    assert {name: (weight.form, weight.rank) for name, weight in loaded.factors.items()} == factor_structure(model)
    for name, weight in loaded.factors.items():
        assert np.array_equal(weight.value(), loaded.model.state_dict()[name].numpy())


@pytest.mark.parametrize("shape", [[3], [1, 2, 0], [1, 2, 2.0], "none", [1, 2, True]])
def test_an_invalid_input_shape_is_refused(shape, tmp_path):
    artifact.save(Own(3), tmp_path / "m.atmc", classes=3)
    assert artifact.open(tmp_path / "m.atmc", factory=Own).input_shape is None
    metadata = {**artifact.read(tmp_path / "m.atmc").metadata, "input_shape": shape}
    (tmp_path / "m.atmc").write_bytes(pack_parts(metadata, parts_of((tmp_path / "m.atmc").read_bytes())[1:]))
    with pytest.raises(artifact.Malformed, match="its images have no valid shape"):
        artifact.open(tmp_path / "m.atmc", factory=Own).input_shape  # noqa: B018 (a property that checks)


@pytest.mark.parametrize("name", ["wrn-10-1", "mobilenetv2"])
@pytest.mark.parametrize("affine", [False, True])
def test_models_with_batch_norm(name, affine):
    model = models.build(name, 10, mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3], seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
    tensors = compressible_parameters(model)
    assign(tensors, NonzeroBudget(2_000).project({key: value.detach() for key, value in tensors.items()}))
    unfolded = len(artifact.to_bytes(model))
    if affine:
        batch_norm.make_affine(model)
    data = artifact.to_bytes(model)
    assert same(artifact.from_bytes(data), model)
    assert (len(data) < unfolded) == affine
    assert artifact.unpack(data).metadata["norms"] == affine


@pytest.mark.parametrize("name", golden_files.MODELS)
def test_golden_bytes(name, monkeypatch):
    """The files were written once by tests/golden_files.py; a change of these bytes is a change of the format."""
    monkeypatch.setattr(artifact, "__version__", golden_files.TOOL)
    data = (golden_files.FOLDER / f"{name}.atmc").read_bytes()
    assert golden_files.to_bytes(name) == data
    loaded = artifact.from_bytes(data, factory=golden_files.FACTORIES[name])
    assert same(loaded, fold(golden_files.MODELS[name]()))


def test_golden_values():
    """The golden files decode to values that are computed here without the format's own code."""
    read = {
        name: artifact.from_bytes((golden_files.FOLDER / f"{name}.atmc").read_bytes(), factory=factory)
        for name, factory in golden_files.FACTORIES.items()
    }
    fc1 = read["codebook"].state_dict()["fc1.weight"].reshape(-1)
    assert fc1[2000].item() == 0.5
    assert fc1[2000 + 4001].item() == -1.25
    assert int(fc1.count_nonzero()) == len(range(2000, 400_000, 4001))
    assert read["sparse"].conv.weight.reshape(-1)[:6].tolist() == [0, 1, 0, 0, 1 + 1 / 64, 0]
    assert read["sparse"].conv.bias.tolist() == [0.5, -0.25, 0, 0.125, 0.5]
    assert read["sparse"].steps.tolist() == [1, -2]
    rows, columns = np.zeros((3, 2)), np.zeros((2, 20))
    rows.reshape(-1)[2] = np.float32(0.1)
    columns.reshape(-1)[2::4] = np.resize(np.float32([0.1, -0.7, 0.3]), 10)
    assert np.array_equal(read["ranked"].head.weight.detach().numpy(), (rows @ columns).astype(np.float32))
    assert read["dense"].norm.running_var.tolist() == [1, 2, 3, 4, 5]
    assert read["dense"].head.weight[0, 1].item() == np.float32(1 / 7 - 2)


SMALL = {name: (golden_files.FOLDER / f"{name}.atmc").read_bytes() for name in ("ranked", "dense")}


def test_the_example_of_the_documentation(capsys):
    """The example by hand in docs/file-format.md shows the bytes that the code writes."""
    page = (Path(__file__).parents[2] / "docs" / "file-format.md").read_text()
    section = page[page.index("## An example by hand") :].split("\n## ")[0]
    exec(section.split("```python\n")[1].split("```")[0], {})
    size, *octets = capsys.readouterr().out.split()
    assert f"{size} bytes:" in section
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ") and "`" in line]
    for start, column in rows:
        pieces = [piece.split() for piece in column.strip().strip("`").replace("` `", " ").split("...")]
        if start.strip().isdigit():
            at = int(start)
            assert octets[at : at + len(pieces[0])] == pieces[0]
        for piece in pieces:
            assert " ".join(piece) in " ".join(octets)


class TestWrongFiles:
    data = artifact.to_bytes(random_lenet("identity"))

    def test_not_an_artifact(self):
        for other in (b"", b"PK\x03\x04 zip", b"ATM"):
            with pytest.raises(artifact.NotAnArtifact, match="not an atmc model file"):
                artifact.unpack(other)

    def test_versions_are_named(self):
        for version in (1, 2, 9):
            with pytest.raises(artifact.UnsupportedVersion, match=f"version {version}; this release reads version 3"):
                artifact.unpack(b"ATMC" + bytes([version, 0]) + self.data[6:])

    @pytest.mark.parametrize("name", SMALL)
    def test_every_truncation_is_noticed(self, name):
        data, factory = SMALL[name], golden_files.FACTORIES[name]
        for length in range(len(data)):
            with pytest.raises(artifact.ArtifactError):
                artifact.from_bytes(data[:length], factory=factory)

    @pytest.mark.parametrize("name", SMALL)
    def test_every_damaged_byte_is_noticed(self, name):
        data, factory = SMALL[name], golden_files.FACTORIES[name]
        for place in range(len(data)):
            for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
                damaged = bytearray(data)
                damaged[place] ^= change
                with pytest.raises(artifact.ArtifactError):
                    artifact.from_bytes(bytes(damaged), factory=factory)

    @given(st.sampled_from(sorted(SMALL)), st.data(), st.integers(1, 255))
    @settings(max_examples=200, deadline=None)
    def test_damage_under_valid_checksums_is_an_error_or_a_finite_model(self, name, draw, change):
        parts = parts_of(SMALL[name])
        which = draw.draw(st.integers(0, len(parts) - 1))
        place = draw.draw(st.integers(0, len(parts[which]) - 1))
        part = bytearray(parts[which])
        part[place] = (part[place] + change) % 256
        try:
            model = artifact.from_bytes(
                seal([*parts[:which], bytes(part), *parts[which + 1 :]]), factory=golden_files.FACTORIES[name]
            )
        except artifact.ArtifactError:
            return
        assert all(value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point())

    def test_parts_cannot_change_places(self):
        parts = parts_of(self.data)
        whole = [encode_varint(len(part)) + part for part in parts]
        checks = [seal(parts[: i + 1])[-4:] for i in range(len(parts))]
        order = [0, 2, 1, *range(3, len(parts))]
        with pytest.raises(artifact.ChecksumMismatch, match="a checksum does not hold"):
            artifact.unpack(self.data[:6] + b"".join(whole[i] + checks[i] for i in order))

    def test_too_few_or_too_many_parts_are_refused(self):
        parts = parts_of(self.data)
        with pytest.raises(artifact.ChecksumMismatch, match="cut off"):
            artifact.unpack(seal(parts[:1]))
        for some in (parts[:-1], [*parts, b""]):
            with pytest.raises(artifact.Malformed, match=f"{len(some) - 2} weights; its model has 4"):
                artifact.from_bytes(seal(some))

    def test_lengths_beyond_the_file_are_refused(self):
        for part in (b"\xff" * 6, encode_varint(10**9) + b"1234"):
            with pytest.raises(artifact.ChecksumMismatch, match=r"more than 5 bytes|1000000000 bytes expected, 4 left"):
                artifact.unpack(b"ATMC\x03\x00" + part)

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            (b"", "1 bytes expected, 0 left"),
            (b"\x05", "no valid form: 5"),
            (b"\x03\x00", "rank 0"),
            (b"\x03" + encode_varint(10**9), "rank 1000000000"),
            (b"\x03" + encode_varint(21), r"rank 21, its shape is \(20, 1, 5, 5\)"),
            (b"\x01" + encode_varint(3), "rank 3"),
            (b"\x04\x02\x09\x00", "9 bytes expected, 1 left"),
            (b"\x02" + encode_varint(20), "rank 20"),
            (b"\x00\x13\x57\xff", r"tensor conv\d\.weight: "),
        ],
    )
    def test_malformed_weights_are_refused(self, part, message):
        parts = parts_of(self.data)
        with pytest.raises(artifact.Malformed, match=message):
            artifact.from_bytes(seal([parts[0], part, *parts[2:]]))

    def test_malformed_biases_are_refused(self):
        with pytest.raises(artifact.Malformed, match=r"biases and norms: (the code is cut off|a value)"):
            artifact.from_bytes(seal([*parts_of(self.data)[:-1], b"\x55"]))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"schema": 1}, artifact.ModelMismatch, "the tensors of lenet are not those of this release"),
            ({"model": {"name": "lenet", "num_classes": -1}}, artifact.Malformed, "keys"),
            ({"model": 3}, artifact.Malformed, "describe no model"),
            ({"model": {"name": "x" * 3}}, artifact.Malformed, "expected"),
            ({"model": {"name": 7}}, artifact.FactoryNeeded, "give the factory"),
            ({"norms": "yes", "schema": None}, artifact.ModelMismatch, "lenet"),
        ],
    )
    def test_wrong_metadata_are_refused(self, change, error, message):
        metadata = {**artifact.unpack(self.data).metadata, **change}
        with pytest.raises(error, match=message):
            artifact.from_bytes(pack_parts(metadata, parts_of(self.data)[1:]))

    def test_metadata_that_are_not_deflated_json(self):
        def deflate(text: bytes) -> bytes:
            packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
            return packer.compress(text) + packer.flush()

        texts = [b"\xff\xfe", b"[" * 100_000, b"3", b'{"model":{}', b"9" * 5000]
        for part in (*map(deflate, texts), b"\xff\xff", b"", deflate(b'{"model":{}}') + b"x"):
            with pytest.raises(artifact.Malformed, match=r"not deflated JSON|describe no model|or cut off"):
                artifact.unpack(seal([part, b"", b""]))

    def test_metadata_are_inflated_to_a_limit(self):
        """Metadata of 200 MiB, which take 200 kB in the file, are inflated to one mebibyte and refused."""
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
        part = packer.compress(b" " * (200 * MAX_METADATA)) + packer.flush()
        with pytest.raises(artifact.Malformed, match="metadata of more than 1,048,576 bytes"):
            artifact.unpack(seal([part, b""]))

    @pytest.mark.parametrize(
        ("tensors", "error", "message"),
        [
            (None, artifact.Malformed, "does not list its tensors"),
            ([["a", [1], "float32"]] * 20_000, artifact.Malformed, "does not list its tensors"),
            ([["a", [1], "float32"]] * 2, artifact.Malformed, "tensor a twice"),
            ([["a", [-1], "float32"]], artifact.Malformed, "without a valid name, shape and type"),
            ([["a", [True], "float32"]], artifact.Malformed, "without a valid name, shape and type"),
            ([["a", [2**32], "float32"]], artifact.Malformed, "without a valid name, shape and type"),
            ([["a", [1] * 9, "float32"]], artifact.Malformed, "without a valid name, shape and type"),
            ([["a", [1], "complex64"]], artifact.Malformed, "without a valid name, shape and type"),
            ([["a", [1]]], artifact.Malformed, "without a valid name, shape and type"),
            ([3], artifact.Malformed, "without a valid name, shape and type"),
            ([["a", [2**20, 2**20], "float32"]], artifact.TooLarge, "1,099,511,627,776 values; at most 67,108,864"),
            ([["a", [1, 2**23], "float32"]], artifact.TooLarge, "8,388,608 columns; at most 4,194,304 together"),
            ([["a", [2**25], "int64"]], artifact.Malformed, "the code is cut off"),
        ],
    )
    def test_wrong_lists_of_tensors_are_refused(self, tmp_path, tensors, error, message):
        metadata = {"model": {"name": None}, "tensors": tensors, "norms": False}
        weights = [b"\0"] if "2" in str(tensors) and "float32" in str(tensors) else []
        (tmp_path / "m.atmc").write_bytes(pack_parts(metadata, [*weights, b"\x13\x57" * 9]))
        with pytest.raises(error, match=message):
            inspect_file(tmp_path / "m.atmc")

    def test_models_that_are_larger_than_the_caller_allows(self):
        values = sum(value.numel() for value in models.build("lenet", 10).state_dict().values())
        assert artifact.from_bytes(self.data, max_values=values)
        with pytest.raises(artifact.TooLarge, match=f"{values:,} values; at most {values - 1:,} are read"):
            artifact.from_bytes(self.data, max_values=values - 1)

    def test_factors_that_would_take_too_long_to_compose(self):
        model = factorize(nn.Sequential(nn.Linear(300, 300)), start="svd")
        data = artifact.to_bytes(model, classes=300)

        def load(max_values):
            return artifact.from_bytes(
                data, factory=lambda num_classes: nn.Sequential(nn.Linear(300, 300)), max_values=max_values
            )

        assert load(300**3 // 64 + 1)
        with pytest.raises(artifact.TooLarge, match="its factors take over 26,880,000 multiply-adds to compose"):
            load(420_000)


def test_values_that_cannot_be_stored(monkeypatch):
    for value in (torch.nan, torch.inf):
        for layer, name in ((nn.Linear(2, 2), "0.weight"), (nn.BatchNorm1d(3), "0.running_mean")):
            model = nn.Sequential(layer)
            model.state_dict()[name].view(-1)[1] = value
            with pytest.raises(ValueError, match=f"tensor {name}: expected finite values"):
                artifact.to_bytes(model, classes=2)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"tensor 0.weight: cannot store values of type {dtype}"):
            artifact.to_bytes(nn.Sequential(nn.Linear(2, 2)).to(dtype))
    deep = nn.Linear(2, 2)
    deep.register_buffer("deep", torch.zeros((1,) * 9))
    with pytest.raises(ValueError, match="at most 8 dimensions"):
        artifact.to_bytes(deep)
    monkeypatch.setattr(artifact, "MAX_VALUES", 5)
    with pytest.raises(ValueError, match="at most 5 values in all"):
        artifact.to_bytes(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected classes="):
        artifact.to_bytes(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="expected 1 to 100,000 classes, got 100001"):
        artifact.to_bytes(nn.Conv2d(1, 1, 1), classes=100_001)
    monkeypatch.setattr(weight_coder, "MAX_SIDES", 3)
    monkeypatch.setattr(artifact, "MAX_VALUES", 50)
    with pytest.raises(ValueError, match="tensor weight: 2 rows and 2 columns; at most 3 together"):
        artifact.to_bytes(nn.Linear(2, 2))


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
    parts, metadata = parts_of((tmp_path / "m.atmc").read_bytes()), artifact.read(tmp_path / "m.atmc").metadata
    for classes in (None, 0, "3", 2.0, True, 100_001):
        with pytest.raises(artifact.Malformed, match=r"expected 1 to 100,000 classes of its model"):
            artifact.from_bytes(pack_parts({**metadata, "classes": classes}, parts[1:]), factory=Own)


def failing(num_classes: int) -> nn.Module:
    raise KeyError("width")


def factory_with(**modules: nn.Module):
    """Return a factory whose model has other layers."""

    def make(num_classes: int) -> nn.Module:
        model = Own(num_classes)
        for name, module in modules.items():
            setattr(model, name, module)
        return model

    return make


class TestFactories:
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
                factory_with(layer=nn.Linear(9, 3)),
                artifact.ModelMismatch,
                r"tensor layer\.weight has shape \(3, 4\), the model's is \(3, 9\); .*make is not its factory, which "
                r"was 'nets:Own'$",
            ),
            (lambda num_classes: Own(5), artifact.ModelMismatch, r"\(3, 4\), the model's is \(5, 4\); .*is not its"),
            (lambda num_classes: nn.Linear(4, 3), artifact.ModelMismatch, "no tensor weight, .*; .*is not its factory"),
            (factory_with(layer=nn.Linear(4, 3, bias=False)), artifact.ModelMismatch, "bias, which the model lacks"),
            (factory_with(layer=nn.Linear(4, 3).double()), artifact.ModelMismatch, "float32, the model's is float64"),
            (factory_with(more=nn.Linear(1, 1)), artifact.ModelMismatch, r"has no tensor more\.weight"),
        ],
        ids=["fails", "no module", "no argument", "width", "classes", "names", "fewer", "type", "more"],
    )
    def test_that_do_not_build_the_files_model(self, tmp_path, factory, error, message):
        model = Own(3)
        model.atmc_spec = {"name": "nets:Own", "num_classes": 3, "input_shape": None}
        artifact.save(model, tmp_path / "m.atmc")
        with pytest.raises(error, match=message):
            artifact.load(tmp_path / "m.atmc", factory=factory)

    def test_that_build_the_layers_in_another_order(self):
        def swapped(num_classes: int) -> nn.Module:
            return nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})

        data = artifact.to_bytes(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}))
        with pytest.raises(artifact.ModelMismatch, match="the model's tensors are in another order"):
            artifact.from_bytes(data, factory=swapped)

    def test_named_in_a_file_are_never_imported(self, tmp_path):
        model = Own(3)
        model.atmc_spec = {"name": "antigravity:run", "num_classes": 3, "input_shape": None}
        artifact.save(model, tmp_path / "m.atmc")
        with pytest.raises(artifact.FactoryNeeded, match="antigravity:run"):
            artifact.load(tmp_path / "m.atmc")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.atmc"
    artifact.save(random_lenet("pruned"), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        artifact.save(random_lenet("dense"), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.atmc"]


@pytest.mark.parametrize("kind", ["identity", "ranks", "dense"])
def test_inspection_accounts_for_every_byte(tmp_path, kind):
    model = random_lenet(kind)
    size = artifact.save(model, tmp_path / "m.atmc")
    inspection = inspect_file(tmp_path / "m.atmc")
    assert inspection["file_bytes"] == size
    totals = inspection["totals"]
    parts = ("positions", "codebook", "codes", "header", "metadata and checksums")
    assert sum(totals[key] for key in parts) == pytest.approx(size, abs=0.01)
    assert totals["metadata and checksums"] < 250
    rows = {row["name"]: row for row in inspection["tensors"]}
    for name, tensor in compressible_parameters(model).items():
        assert rows[name]["nonzeros"] == int(tensor.count_nonzero())
        assert kind != "identity" or rows[name]["levels"] <= 4
        floor = rows[name]["bytes"]["positions"] + rows[name]["bytes"]["codes"] - rows[name]["bytes"]["excess"]
        assert floor == pytest.approx(rows[name]["bytes"]["floor"], abs=0.01)
    form = {"identity": "left", "ranks": "rank", "dense": None}[kind]
    assert inspection["factorized"].get("fc1.weight", {}).get("form") == form
    assert json.loads(json.dumps(inspection)) == inspection


def test_inspection_finds_dead_channels(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[:, 0] = 0
        model[2].weight[:, 4:8] = 0
    artifact.save(model, tmp_path / "m.atmc")
    inspection = inspect_file(tmp_path / "m.atmc")
    assert inspection["dead_channels"]["0.weight"] == {"outputs": 1, "inputs": 1}
    assert inspection["dead_channels"]["2.weight"] == {"outputs": 0, "inputs": 4}
    assert (inspection["totals"]["dead_outputs"], inspection["totals"]["dead_inputs"]) == (1, 5)
