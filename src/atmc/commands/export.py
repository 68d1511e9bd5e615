"""`atmc export`: write a model file as ONNX, safetensors, C or VNN-LIB, after a comparison with PyTorch."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from atmc.commands.model_files import check_image_shape, open_model_file, require_image_shape
from atmc.commands.outputs import check_absent, check_parent
from atmc.core.errors import unknown
from atmc.core.files import write_beside
from atmc.data import Data, Images, load_data
from atmc.deploy.export import onnx_export, safetensors_export
from atmc.deploy.export.vnnlib_export import to_vnnlib
from atmc.deploy.graph.graph import LogitsFunction
from atmc.deploy.graph.simplify import simplify
from atmc.deploy.graph.trace import UnsupportedModel
from atmc.evaluation.accuracy import predictions
from atmc.evaluation.user_model import check_model
from atmc.evaluation.verify.bounds import check_provable
from atmc.pack.artifact import LoadedModel
from atmc.robust.attacks import PgdSettings
from atmc.robust.threats import Threat, check_threat, parse_threat

if TYPE_CHECKING:
    from atmc.deploy.export.c.source import CSource

FORMATS = ("onnx", "safetensors", "c", "vnnlib")
FOLDERS = ("c", "vnnlib")  # formats of several files
TOLERANCE = 1e-4  # largest difference of a logit that is accepted, over the largest |logit|
PGD_STEPS = 10
BATCH = 64
TIMEOUT = 60.0  # seconds per image in the instances of vnnlib, by default
VNNLIB_MODEL, VNNLIB_INSTANCES = "model.onnx", "instances.csv"
PROPERTY = "image-"  # begins the names of properties, before the position of the image in the test split


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The options of `atmc export`; time_per_image and with_wrong are for vnnlib, name is for C."""

    file: Path
    to: str
    out: Path
    model: str | None = None
    data: str | None = None
    threat: Threat | None = None
    n: int = 256
    time_per_image: float | None = None
    with_wrong: bool = False
    image_column: str | None = None
    label_column: str | None = None
    name: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Agreement:
    """How an export's logits differ from PyTorch's.

    Args:
        images: a name for the images.
        n: number of images.
        difference: the largest |difference| of a logit.
        largest: the largest |logit| of PyTorch.
        same: number of images with the same top-1 class.
    """

    images: str
    n: int
    difference: float
    largest: float
    same: int

    @classmethod
    def of(cls, images: str, expected: np.ndarray, logits: np.ndarray) -> Agreement:
        """Compare logits (n, classes) of an export with those expected, which PyTorch computed."""
        same = int((expected.argmax(1) == logits.argmax(1)).sum())
        return cls(images, len(expected), float(np.abs(expected - logits).max()), float(np.abs(expected).max()), same)

    def __str__(self) -> str:
        return (
            f"{self.n} {self.images}: largest difference {self.difference:.2g}, of a largest |logit| of "
            f"{self.largest:.4g}; the same top-1 on {self.same}"
        )


@dataclass(frozen=True)
class Exported:
    """The files written with their sizes, notes about them for the user, and the comparisons with PyTorch."""

    files: dict[Path, int]
    notes: list[str]
    agreements: list[Agreement] = field(default_factory=list)


def export(request: ExportRequest) -> Exported:
    """Write a model file in another format, and compare what was written with PyTorch.

    Raises:
        ValueError: the request makes no sense, or the format cannot hold the model.
        RuntimeError: a package is missing, or the export does not compute what PyTorch does; nothing was written.
    """
    _check_request(request)
    loaded = open_model_file(request.file, request.model)
    if request.to == "safetensors":
        return _write_safetensors(request, loaded)
    data = None
    if request.data is not None:
        data = load_data(request.data, image_column=request.image_column, label_column=request.label_column)
        check_image_shape(loaded, data)
    try:
        if request.to == "vnnlib":
            assert data is not None
            return _write_vnnlib(request, loaded, data)
        images = _make_images(request, loaded, data)
        if request.to == "onnx":
            return _write_onnx(request, loaded, images)
        return _write_c(request, loaded, images, data.class_names if data else ())
    except UnsupportedModel as error:
        raise ValueError(f"cannot export {request.file} to {request.to}: {error}") from None


def _check_request(request: ExportRequest) -> None:
    if request.to not in FORMATS:
        raise unknown("format", request.to, FORMATS)
    if request.name is not None and request.to != "c":
        raise ValueError(f"a name is for --to c, got --to {request.to}")
    if request.name is not None and not re.fullmatch(r"[A-Za-z_]\w*", request.name, flags=re.ASCII):
        raise ValueError(f"expected a name that C allows for a function, got {request.name!r}")
    if request.n < 1:
        raise ValueError(f"expected n >= 1, got {request.n}")
    if request.to == "safetensors" and (request.data or request.threat):
        raise ValueError("an export to safetensors holds the decoded weights themselves: leave out --data and --threat")
    if request.to == "vnnlib":
        _check_vnnlib(request)
    elif request.time_per_image is not None or request.with_wrong:
        raise ValueError(f"--time-per-image and --with-wrong are for vnnlib, the format is {request.to}")
    check_parent(request.out)
    if request.to in FOLDERS:
        if request.out.exists() and not request.out.is_dir():
            files = {"c": "C sources", "vnnlib": "properties"}[request.to]
            raise ValueError(f"{request.out} is a file: {files} are written into a folder")
        outputs = list(_c_paths(request).values()) if request.to == "c" else _vnnlib_paths(request.out)
    else:
        outputs = [request.out]
        if request.out.is_dir():
            raise ValueError(f"{request.out} is a folder: expected the name of the file to write")
    for path in outputs:
        check_absent(path, overwrite=request.overwrite)
        if path.exists() and path.samefile(request.file):
            raise ValueError(f"{path} is the model file itself")
    if request.to in ("onnx", "vnnlib"):
        onnx_export.import_extra("onnx")


def _check_vnnlib(request: ExportRequest) -> None:
    if request.data is None:
        raise ValueError("properties are of images: add --data")
    if request.time_per_image is not None and not 0 < request.time_per_image < float("inf"):
        raise ValueError(f"expected a finite time per image > 0 seconds, got {request.time_per_image}")


def _vnnlib_paths(folder: Path) -> list[Path]:
    """Return the files that an export writes whatever its images are, and the properties of an earlier one."""
    return [folder / VNNLIB_MODEL, folder / VNNLIB_INSTANCES, *_list_properties(folder)]


def _list_properties(folder: Path) -> list[Path]:
    """Return the properties of an earlier export."""
    return sorted(folder.glob(f"{PROPERTY}*.vnnlib"))


def _make_images(request: ExportRequest, loaded: LoadedModel, data: Data | None) -> dict[str, Tensor]:
    """Return images (n, c, h, w) to compare on, by name: test or random images, and PGD examples of them."""
    model = loaded.model
    if data is not None:
        kind, test = f"test images of {data.name}", data.test.take(slice(0, request.n))
        x, labels = test.float_pixels(slice(None)), test.labels
        check_model(model, test, None, probabilities=True)
    else:
        shape = require_image_shape(loaded)
        kind, x = "random images", torch.rand(request.n, *shape, generator=torch.Generator().manual_seed(0))
        check_model(model, Images(x, torch.zeros(len(x), dtype=torch.int64)), None, probabilities=True)
        labels = _logits(model, x).argmax(1)
    threat = request.threat or _stored_threat(loaded)
    if threat is None:
        return {kind: x}
    check_threat(threat, x[0].numel())
    settings = PgdSettings.from_image(threat, PGD_STEPS, best_of_steps=False)
    batches = zip(torch.split(x, BATCH), torch.split(labels, BATCH), strict=True)
    adversarial = torch.cat([settings.attack(model, x, y, threat) for x, y in batches])
    return {kind: x, f"PGD-{PGD_STEPS} examples of these under {threat}": adversarial}


def _stored_threat(loaded: LoadedModel) -> Threat | None:
    """Return the threat that the file says it was trained for, or None if it names no known one."""
    try:
        return parse_threat(str(loaded.metadata.get("threat")))
    except ValueError:
        return None


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return (n, classes)."""
    return torch.cat([model(batch) for batch in torch.split(x, BATCH)])


def _describe_model(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return what an exported file says of its model, as strings."""
    spec = metadata["model"]
    shape = metadata.get("input_shape")
    entries = {
        "model": spec.get("name") or "own class",
        "classes": metadata.get("classes") or spec.get("num_classes"),
        "input_shape": json.dumps(shape) if shape else None,
        "spec": json.dumps(spec) if "mean" in spec else None,
        "threat": metadata.get("threat"),
        "method": metadata.get("method"),
        "tool": metadata.get("tool"),
    }
    return {key: str(value) for key, value in entries.items() if value is not None}


def _write_safetensors(request: ExportRequest, loaded: LoadedModel) -> Exported:
    metadata = _describe_model(loaded.metadata)
    size = safetensors_export.to_safetensors(loaded.model, request.out, metadata=metadata)
    tensors = len(loaded.model.state_dict())
    return Exported({request.out: size}, [f"the state dict of {metadata['model']}: {tensors} tensors"])


def _write_onnx(request: ExportRequest, loaded: LoadedModel, images: Mapping[str, Tensor]) -> Exported:
    data, notes, agreements = _build_onnx(loaded, images)
    return Exported({request.out: write_beside(request.out, data)}, notes, agreements)


def _build_onnx(
    loaded: LoadedModel, images: Mapping[str, Tensor], batch: int | None = None
) -> tuple[bytes, list[str], list[Agreement]]:
    """Return an ONNX model for batches of a size, notes, and comparisons. Raises RuntimeError if the logits differ."""
    model, metadata = loaded.model, _describe_model(loaded.metadata)
    data = onnx_export.to_bytes(simplify(model, _image_shape(images)), metadata=metadata, batch=batch)
    notes = [f"opset {onnx_export.OPSET}, IR version {onnx_export.IR_VERSION}"]
    try:
        onnx_export.import_extra("onnxruntime")
    except RuntimeError as error:
        return data, [*notes, f"not compared with PyTorch: {error}"], []
    run = onnx_export.open_runtime(data)

    def run_parts(x: np.ndarray) -> np.ndarray:
        return np.concatenate([run(x[at : at + batch]) for at in range(0, len(x), batch)]) if batch else run(x)

    return data, notes, [_compare(kind, model, x, run_parts) for kind, x in images.items()]


def _write_vnnlib(request: ExportRequest, loaded: LoadedModel, data: Data) -> Exported:
    """Write the properties, then the network in ONNX, and at last the list of instances."""
    threat = request.threat or _stored_threat(loaded)
    if threat is None:
        raise ValueError(f"{request.file} names no threat: add --threat")
    check_provable(threat, data.test.pixels[0].numel())
    images = _make_images(request, loaded, data)
    model, test = loaded.model, data.test.take(slice(0, request.n))
    x = test.float_pixels(slice(None))
    right = torch.cat([predictions(model, batch) for batch in torch.split(x, BATCH)]) == test.labels
    rows = list(range(len(x))) if request.with_wrong else right.nonzero()[:, 0].tolist()
    if not rows:
        raise ValueError(f"{request.file} gets all of the first {len(x)} images wrong: add --with-wrong, or raise --n")
    network, notes, agreements = _build_onnx(loaded, images, batch=1)
    request.out.mkdir(exist_ok=True)
    for path in _vnnlib_paths(request.out):
        path.unlink(missing_ok=True)
    classes, size, names = _logits(model, x[:1]).shape[1], 0, []
    for row in rows:
        label = int(test.labels[row])
        comments = [f"image {row} of {data.name}, label {label}, {threat}"]
        text = to_vnnlib(x[row].numpy(), label, threat.eps, classes, comments=comments)
        names.append(f"{PROPERTY}{row:05d}.vnnlib")
        size += write_beside(request.out / names[-1], text.encode())
    notes.append(f"{len(rows)} properties, {size:,} bytes")
    if len(rows) < len(x):
        notes.append(f"{len(x) - len(rows)} of the first {len(x)} images are wrong without an attack and left out")
    timeout = request.time_per_image or TIMEOUT
    instances = "".join(f"{VNNLIB_MODEL},{name},{timeout:g}\n" for name in names)
    contents = {VNNLIB_MODEL: network, VNNLIB_INSTANCES: instances.encode()}
    files = {request.out / name: write_beside(request.out / name, content) for name, content in contents.items()}
    return Exported(files, notes, agreements)


def _image_shape(images: Mapping[str, Tensor]) -> tuple[int, int, int]:
    _, c, h, w = next(iter(images.values())).shape
    return c, h, w


def _compare(kind: str, model: nn.Module, x: Tensor, run: LogitsFunction) -> Agreement:
    """Run one image alone and then batches through both. Raises RuntimeError if the logits differ."""
    batches = [x[:1], *torch.split(x[1:], BATCH)] if len(x) > 1 else [x]
    logits = np.concatenate([run(batch.numpy()) for batch in batches])
    agreement = Agreement.of(kind, _logits(model, x).numpy(), logits)
    if not agreement.difference <= TOLERANCE * agreement.largest:
        raise RuntimeError(f"the export does not compute what PyTorch does: {agreement}; nothing was written")
    return agreement


def _c_name(request: ExportRequest) -> str:
    """Return the name of the C functions and files: the request's, else an identifier from the model file's name."""
    if request.name is not None:
        return request.name
    name = re.sub(r"\W", "_", request.file.stem, flags=re.ASCII)
    return name if name[:1].isalpha() else f"model_{name}"


def _c_paths(request: ExportRequest) -> dict[str, Path]:
    name = _c_name(request)
    return {
        "header": request.out / f"{name}.h",
        "source": request.out / f"{name}.c",
        "test": request.out / f"{name}_test.c",
    }


def _write_c(
    request: ExportRequest, loaded: LoadedModel, images: Mapping[str, Tensor], class_names: Sequence[str]
) -> Exported:
    from atmc.deploy.export.c.model import model_to_c

    model, shape = loaded.model, _image_shape(images)
    classes = _logits(model, torch.zeros(1, *shape)).shape[1]
    labels = class_names if len(class_names) == classes else None
    c = model_to_c(model, shape, loaded.factors, name=_c_name(request), labels=labels)
    notes, agreements = [f"{c.table_bytes:,} bytes of tables, an arena of {c.arena_bytes:,} bytes"], []
    with tempfile.TemporaryDirectory() as folder:
        run = _compile(c, Path(folder), classes)
        if run is None:
            notes.append("not compared with PyTorch: there is no C compiler (cc) here")
        else:
            agreements = [_compare(kind, model, x, run) for kind, x in images.items()]
    request.out.mkdir(exist_ok=True)
    texts = {"header": c.header, "source": c.source, "test": c.test_source}
    files = {path: write_beside(path, texts[kind].encode()) for kind, path in _c_paths(request).items()}
    return Exported(files, notes, agreements)


def _compile(c: CSource, folder: Path, classes: int) -> LogitsFunction | None:
    """Compile a C source and return the function that runs it, or None if there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    (folder / f"{c.name}.h").write_text(c.header, encoding="utf-8")
    (folder / f"{c.name}.c").write_text(c.source, encoding="utf-8")
    library = folder / "model.so"
    command = [compiler, "-std=c99", "-O2", "-shared", "-fPIC", f"{c.name}.c", "-o", library.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cc does not compile the C source: {done.stderr.strip()[:200]}")
    function = getattr(ctypes.CDLL(str(library)), f"{c.name}_run")
    pointer = ctypes.POINTER(ctypes.c_float)

    def run(images: np.ndarray) -> np.ndarray:
        logits = np.empty((len(images), classes), np.float32)
        for image, row in zip(np.ascontiguousarray(images), logits, strict=True):
            function(image.ctypes.data_as(pointer), row.ctypes.data_as(pointer))
        return logits

    return run
