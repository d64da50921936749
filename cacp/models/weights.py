"""Trained weights: reading a file into a model with every mismatch told at once, and the published ones.

Published weights: for CIFAR-10 github.com/akamaster/pytorch_resnet_cifar10 (BSD-2), for ImageNet torchvision's first
(IMAGENET1K_V1); top-1 as they are given there. They have seen all training images, so a validation split of those is
not new to them.
"""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from cacp.checkpoint import load_tensors, sha256, write_atomically
from cacp.schema import Normalisation, UserError, listed

_FRAME = ([224], [256], Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # crop, shorter side
_AUXILIARY_HEADS = ("googlenet",)  # published with them, built without
_REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SUFFIXES = (".safetensors", ".pt", ".pth", ".th")
DOWNLOAD_TIMEOUT_S = 30
_BASE_URL = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class PublishedWeights(NamedTuple):
    """Where weights are published and what is known of them.

    `sha256` has 64 digits, or the first 8 where only those are known; `top1` in [0, 1] on the test set.
    """

    file: str
    url: str
    sha256: str
    normalisation: Normalisation
    top1: float
    trained_on: str


def _published(file: str, checksum: str, top1: float) -> PublishedWeights:
    seen = "all 50,000 CIFAR-10 training images"
    return PublishedWeights(file, _BASE_URL + file, checksum, _NORMALISATION, top1, seen)


PUBLISHED: dict[tuple[str, str], PublishedWeights] = {  # (model, dataset)
    ("resnet20", "cifar10"): _published(
        "resnet20-12fca82f.th", "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8", 0.9173
    ),
    ("resnet32", "cifar10"): _published("resnet32-d509ac18.th", "d509ac18", 0.9263),
    ("resnet44", "cifar10"): _published("resnet44-014dd654.th", "014dd654", 0.9310),
    ("resnet56", "cifar10"): _published(
        "resnet56-4bfd9763.th", "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367", 0.9339
    ),
    ("resnet110", "cifar10"): _published("resnet110-1d1ed7c2.th", "1d1ed7c2", 0.9368),
}


def published_weights_of(model_name: str, dataset: str) -> PublishedWeights | None:
    """What is published for a model and a data set; None for nothing."""
    if dataset != "imagenet" or model_name in _AUXILIARY_HEADS:
        return PUBLISHED.get((model_name, dataset))
    try:
        weights = torchvision.models.get_model_weights(model_name)["IMAGENET1K_V1"]
    except (ValueError, KeyError):
        return None
    frame = weights.transforms()
    if (frame.crop_size, frame.resize_size, Normalisation(tuple(frame.mean), tuple(frame.std))) != _FRAME:
        return None  # trained for other images than `load_dataset` makes
    file = weights.url.rsplit("/", 1)[-1]
    top1 = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100
    checksum = file.rpartition("-")[2].partition(".")[0]
    return PublishedWeights(file, weights.url, checksum, _NORMALISATION, top1, "all 1,281,167 ImageNet training images")


def fetch_published(model_name: str, dataset: str, folder: str | Path) -> Path:
    """The published weights as a file in `folder`, downloaded where it is not there yet, its checksum verified.

    Raises:
        UserError: when none are published for this model and data set, when they cannot be downloaded, or when the
            checksum is wrong (the file is then left where it is, and not used).
    """
    published = published_weights_of(model_name, dataset)
    if published is None:
        known = ", ".join(f"{model} on {data}" for model, data in PUBLISHED)
        raise UserError(
            f"weights: published exist for {known}, and for torchvision's models of 224 pixels on imagenet, "
            f"but got model={model_name!r} on dataset={dataset!r}; "
            "set weights: train, or give the path of a weights file"
        )
    path = Path(folder) / published.file
    if path.exists():
        _check_sum(sha256(path), published, f"the file {path}", "delete or replace it")
        return path
    content = _download(published, path)
    found = hashlib.sha256(content).hexdigest()
    _check_sum(found, published, f"the download of {published.url}", f"get it another way and put it at {path}")
    write_atomically(path, content)
    return path


def _check_sum(found: str, published: PublishedWeights, what: str, remedy: str) -> None:
    if not found.startswith(published.sha256):
        raise UserError(
            f"{what} must have the SHA-256 {published.sha256}{'' if len(published.sha256) == 64 else '...'}, "
            f"but got {found}; it is not used: {remedy}"
        )


def _download(published: PublishedWeights, path: Path) -> bytes:
    try:
        with urllib.request.urlopen(published.url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"weights: published needs {published.file}, which is not at {path} and could not be downloaded ({error}); "
            f"download {published.url} and put it at {path}, or set weights: train. "
            "The digits experiment needs no download at all: bash scripts/search_export.sh"
        ) from error


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy a weights file into a model, in place; on any error the model is left as it was.

    Reads safetensors, or a state dict from torch.save (plain, or under "state_dict"; the prefix `module.` of
    DataParallel is taken off). `num_batches_tracked`, which old files lack, may be missing.

    Args:
        model: whose parameters and buffers the file must hold, name by name and shape by shape.
        path: ends in .safetensors, .pt, .pth or .th.

    Raises:
        UserError: when the file is missing, damaged or not a state dict, or listing every key that is missing,
            unexpected, of another shape, or holds NaN or infinity.
    """
    state = _read_state(Path(path))
    expected = model.state_dict()
    wrong = [
        f"missing: {name} {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name not in state and not name.endswith(".num_batches_tracked")
    ]
    wrong += [f"unexpected: {name:.80} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in expected]
    wrong += [
        f"wrong shape: {name} {tuple(tensor.shape)}, the model has {tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    wrong += [
        f"wrong type: {name} {tensor.dtype}, the model has {expected[name].dtype}"
        for name, tensor in state.items()
        if name in expected and (tensor.dtype in _REAL) != (expected[name].dtype in _REAL)
    ]
    if wrong:
        raise UserError(
            f"weights must fit the model key by key, but {path} does not:\n  "
            + listed(wrong)
            + "\ncheck that model and number of classes are those that the weights were trained with"
        )
    infinite = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise UserError(
            f"weights must be finite, but {path} has NaN or infinity in {listed(infinite, ', ')}; "
            "the training that wrote it diverged: take an earlier file, or train with a smaller learning rate"
        )
    model.load_state_dict(state, strict=False)  # not strict only because of num_batches_tracked


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"weights must be a file ending in {', '.join(SUFFIXES)}, but got {path}; rename or convert it")
    if not path.is_file():
        raise UserError(f"weights must be an existing file, but {path} does not exist; check the path")
    content = load_tensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    others = (
        [f"{name!s:.80} ({type(value).__name__})" for name, value in content.items() if not _is_weight(name, value)]
        if isinstance(content, Mapping)
        else [type(content).__name__]
    )
    if others or not content:
        raise UserError(
            f"weights must be a state dict of tensors, but {path} holds {', '.join(others)[:400] or 'nothing'}; "
            "write it with torch.save(model.state_dict(), path)"
        )
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in content.items()}


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided


def _read_torch(path: Path) -> Any:
    """A file of torch.save, by PyTorch's reader that builds nothing but tensors and plain containers."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("a compressed file, which torch.save does not write")  # and may be any size
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise anything at all
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"weights must be a whole file of tensors, but {path} is damaged, truncated or holds Python objects "
            f"({type(error).__name__}: {reason:.200}); copy or download it again, "
            "or write it with torch.save(model.state_dict(), path)"
        ) from error
