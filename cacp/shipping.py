"""The forms of a pruned model that need nothing of this project, beside `architecture.json` and `model.safetensors`:
`model.py` (plain PyTorch source for the same weights), `model.onnx` and `model.pt2` (torch.export).

All take what `load_pruned` takes: normalised images (B, C, H, W), any B. Each is loaded again as its reader would, and
compared with the model, before it counts as written. ONNX and .pt2 hold architecture.json as metadata.

What a form cannot hold (an operator that an exporter does not know) costs that form alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import runpy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cacp.checkpoint import sha256, write_atomically
from cacp.exporting import Architecture, load_architecture
from cacp.plain import plain_source
from cacp.schema import UserError

FILES = {"python": "model.py", "onnx": "model.onnx", "pt2": "model.pt2"}
FORMS = tuple(FILES)
TOLERANCE = 1e-4  # between outputs, in units of the largest one where that is above 1; model.py must be bit-equal
CHECKED_BATCHES = (1, 3)  # images
LARGEST_BATCH = 2**31 - 1  # torch 2.7 traces no batch without a limit
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
_INPUT = "(images - mean) / std of images (B, C, H, W) in [0, 1]"


def ship(folder: Path, model: nn.Module, forms: Sequence[str], done: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write the forms of a model that its folder lacks.

    Args:
        folder: that `save_pruned` has written.
        model: what was loaded from it, in eval mode on the CPU.
        forms: which of `FORMS`.
        done: what an earlier call returned for these weights; empty for new ones, whose old forms are removed.

    Returns:
        For each form made now or earlier its `file`, that one's `bytes` and `sha256`, and the `largest_difference` of
        its outputs from the model's; or why it is `missing`, and with which `versions` of the packages.
    """
    shipping = _Shipping(folder, model, load_architecture(folder))
    result = {form: done[form] for form in FORMS if form in done}
    for form in FORMS:
        if form not in done:
            (folder / FILES[form]).unlink(missing_ok=True)
    for form in unshipped(folder, forms, done):
        result[form] = shipping.write(form)
    return result


def forms_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a result or report holds of forms; nothing where an older version wrote it."""
    forms = result.get("forms")
    return {form: one for form, one in forms.items() if isinstance(one, dict)} if isinstance(forms, dict) else {}


def unshipped(folder: Path, forms: Sequence[str], done: Mapping[str, Any]) -> list[str]:
    """The forms that are not there, or no longer as they were written; one that failed counts as done until a package
    has another version.
    """
    return [form for form in forms if not _is_done(folder / FILES[form], done.get(form, {}))]


def _is_done(file: Path, record: Mapping[str, Any]) -> bool:
    if "missing" in record:
        return record.get("versions") == versions()
    return bool(record) and file.is_file() and record.get("sha256", "") in ("", sha256(file))  # an older one has none


def versions() -> dict[str, str]:
    """Versions of the packages that write and check the forms."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


class _Shipping:
    """One model on its way into its forms."""

    def __init__(self, folder: Path, model: nn.Module, architecture: Architecture) -> None:
        self.folder, self.model, self.architecture = folder, model, architecture
        self._program: ExportedProgram | None = None

    def write(self, form: str) -> dict[str, Any]:
        writers = {"python": self._python, "onnx": self._onnx, "pt2": self._pt2}
        path = self.folder / FILES[form]
        try:
            with quiet():
                difference = self._difference(writers[form](path), exact=form == "python")
        except (OSError, MemoryError):
            path.unlink(missing_ok=True)
            raise
        except Exception as error:  # exporters raise whatever an operator made them raise
            path.unlink(missing_ok=True)
            return {"missing": reason(error), "versions": versions()}
        written = {"file": path.name, "largest_difference": difference, "bytes": path.stat().st_size}
        return {**written, "sha256": sha256(path)}

    def _python(self, path: Path) -> Callable[[Tensor], Tensor]:
        one = self.architecture
        title = f"{one.model}, pruned from {one.dense_cost.macs:,} to {one.cost.macs:,} MACs"
        write_atomically(path, plain_source(self.model, title, one.input_shape, one.normalisation, one.classes))
        return runpy.run_path(str(path))["load"]()

    def _pt2(self, path: Path) -> Callable[[Tensor], Tensor]:
        buffer = io.BytesIO()
        text = json.dumps({**self.architecture.to_json(), "input": _INPUT})
        torch.export.save(self._exported(), buffer, extra_files={"architecture.json": text})
        write_atomically(path, buffer.getvalue())
        return torch.export.load(io.BytesIO(path.read_bytes())).module()

    def _onnx(self, path: Path) -> Callable[[Tensor], Tensor]:
        write_atomically(path, onnx_model(self._exported(), {**self.architecture.to_json(), "input": _INPUT}))
        session = onnx_session(path.read_bytes())
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    def _exported(self) -> ExportedProgram:
        if self._program is None:
            self._program = exported(self.model, self.architecture.input_shape)
        return self._program

    def _difference(self, form: Callable[[Tensor], Tensor], exact: bool) -> float:
        """The largest difference from the model's outputs, on random images, normalised, of several batch sizes."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.architecture.normalisation)
        largest = 0.0
        for batch in CHECKED_BATCHES:
            images = torch.rand(batch, *self.architecture.input_shape, generator=torch.Generator().manual_seed(batch))
            images = (images - mean) / std
            with torch.inference_mode():
                expected, found = self.model(images.clone()), form(images.clone())
            difference = (expected - found).abs().max().item()
            allowed = 0.0 if exact else TOLERANCE * max(1.0, expected.abs().max().item())
            if not difference <= allowed:
                raise UserError(
                    f"its outputs for {batch} images are up to {difference:.3g} from the model's, of which at most "
                    f"{allowed:.3g} is allowed; report this with the model"
                )
            largest = max(largest, difference)
        return largest


def exported(model: nn.Module, input_shape: tuple[int, int, int]) -> ExportedProgram:
    """A model in eval mode, on the CPU, as torch.export sees it, for any number of images; no paths of source files."""
    images = torch.zeros(2, *input_shape)  # of one image, torch.export would make a constant
    program = torch.export.export(
        model, (images,), dynamic_shapes=({0: Dim("batch", min=1, max=LARGEST_BATCH)},), strict=False
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def onnx_model(program: ExportedProgram, properties: Mapping[str, Any]) -> bytes:
    """An ONNX model from `images` to `logits`, checked by onnx.

    Args:
        program: from `exported`.
        properties: kept as the model's metadata, every value as JSON.
    """
    import onnx  # these take seconds, which no other command should wait for
    import onnxscript  # noqa: F401  (torch says in many lines what this says in one)

    written = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    assert written is not None
    model = written.model_proto
    symbols = {value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in symbols:
                dimension.dim_param = "batch"
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output,
                 *model.graph.value_info, *model.graph.initializer):  # fmt: skip
        del part.metadata_props[:]  # the exporter's own notes
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in properties.items()})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def onnx_session(model: bytes) -> Any:
    """An ONNX Runtime session on the CPU, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporters print, warn of and log: nobody but their authors can act on it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def reason(error: BaseException) -> str:
    """What went wrong at first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install -r requirements.txt"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{lines[0]:.300}" if lines else ""
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
