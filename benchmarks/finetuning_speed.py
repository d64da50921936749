"""Images a second of fine-tuning: ours against a plain PyTorch loop and torchvision's reference recipe, in turn.

    python -m benchmarks.finetuning_speed RUN [--policy macs-0.50] [--images 5120] [--rounds 5] [--at_once 2] \
        [--compiled] [--result FILE]

All train the same exported model of RUN, in mini-batches of the run's size, one pass over the same images a round.

- ours, distilled: taught by the dense model, as finetune.py does unless told otherwise.
- ours, N at once: in N processes, each a model of its own; images a second of all together, by the clock.
- ours, compiled: a second pass, by torch.compile, which takes minutes in the first; with --compiled.
- plain: what most tutorials have: torchvision's transforms image by image in a DataLoader, fp32, SGD.
- plain, in this process: the same with num_workers=0; whichever is faster is the plain loop.
- plain, taught: the plain loop that asks the dense model too, and learns as `ours, distilled` does.
- torchvision: its reference recipe for classification (TrivialAugment, random erasing, MixUp or CutMix, label
  smoothing, an average of the weights every 32 steps, loss and accuracy read in every step), in crops of this size.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks.exported_run import load_run
from benchmarks.speed_summary import spread
from benchmarks.summarise import portable
from cacp.checkpoint import save_json
from cacp.command import run_command
from cacp.data import ImageData
from cacp.environment import environment
from cacp.evaluation import device_of, dtype_name, resolve_precision, synchroniser
from cacp.pipeline import finetuning_recipe, load_exported
from cacp.recipe import Recipe
from cacp.schema import Normalisation
from cacp.side_by_side import side_by_side
from cacp.training import fit

OURS, DISTILLED = "ours", "ours, distilled"
WORKERS = os.cpu_count() or 1  # that read images for the others
Round = Callable[[], float]  # trains one pass; images a second


class Subject(NamedTuple):
    """What all systems train: a copy of the model, on the images; the recipe is one of a single epoch."""

    model: nn.Module
    images: ImageData
    normalisation: Normalisation
    recipe: Recipe
    dense: nn.Module


def main() -> None:
    arguments = _parser().parse_args()
    place = arguments.run, arguments.policy, arguments.images
    subject, count = load_subject(*place), arguments.at_once
    with side_by_side(count) as pool:
        systems: dict[str, Round] = {
            OURS: lambda: ours(subject, distillation=0.0),
            f"{OURS}, fp32": lambda: ours(subject, distillation=0.0, precision="fp32"),
            DISTILLED: lambda: ours(subject),
            f"{OURS}, {count} at once": lambda: at_once(pool, count, place, distillation=0.0),
            f"{DISTILLED}, {count} at once": lambda: at_once(pool, count, place),
            "plain": lambda: plain(subject, WORKERS),
            "plain, in this process": lambda: plain(subject, 0),
            "plain, taught": lambda: plain(subject, WORKERS, taught=True),
            "torchvision": lambda: reference(subject, WORKERS),
        }
        if arguments.compiled:
            systems[f"{OURS}, compiled"] = lambda: compiled(subject)
        speeds = measured(systems, arguments.rounds)
    result = {
        "images_per_second": {name: spread(values) for name, values in speeds.items()},
        "times_as_fast": {ours: ratios(speeds, ours) for ours in (OURS, DISTILLED)},
        "images": len(subject.images),
        "policy": arguments.policy,
        "batch_size": subject.recipe.batch_size,
        "precision": dtype_name(resolve_precision(subject.recipe.precision, device_of(subject.dense))),
        "rounds": arguments.rounds,
        "environment": environment(0),
    }
    print({name: round(statistics.median(values)) for name, values in speeds.items()})
    if arguments.result:
        save_json(arguments.result, portable(result))


@cache
def load_subject(run: Path, policy: str, images: int) -> Subject:
    """Once in every process."""
    experiment, splits, dense = load_run(run)
    model = load_exported(experiment, run / "export" / policy).to(device_of(dense.model)).train()
    taken = torch.arange(min(images, len(splits.train)))
    data = ImageData(splits.train.batch(taken), splits.train.labels[taken], splits.train.classes)
    return Subject(model, data, dense.normalisation, replace(finetuning_recipe(experiment), epochs=1), dense.model)


def measured(systems: Mapping[str, Round], rounds: int) -> dict[str, list[float]]:
    """Images a second of every system in every round, in turn; a round before these warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, run in systems.items():
            speed = run()
            if number:
                speeds[name].append(speed)
            print(number, name, f"{speed:.0f} images/s", flush=True)
    return speeds


def ratios(speeds: Mapping[str, Sequence[float]], ours: str) -> dict[str, Any]:
    """How many times as fast `ours` is as every system, round by round."""
    return {
        name: spread([mine / theirs for mine, theirs in zip(speeds[ours], values, strict=True)])
        for name, values in speeds.items()
    }


def ours(subject: Subject, **changes: Any) -> float:
    return _last_epoch(subject, copy.deepcopy(subject.model), **changes)


def compiled(subject: Subject) -> float:
    model = cast(nn.Module, torch.compile(copy.deepcopy(subject.model)))
    return _last_epoch(subject, model, distillation=0.0, epochs=2)


def _last_epoch(subject: Subject, model: nn.Module, **changes: Any) -> float:
    recipe = replace(subject.recipe, **changes)
    teacher = subject.dense if recipe.distillation else None
    *_, record = fit(model, subject.images, None, subject.normalisation, recipe, 0, teacher=teacher)
    return record.images_per_second


def at_once(pool: Executor, count: int, place: tuple[Path, str, int], **changes: Any) -> float:
    """`ours` in all processes of the pool; the first round has started them and loaded what they train."""
    start = time.perf_counter()
    for ended in [pool.submit(_one_of_several, place, changes) for _ in range(count)]:
        images = ended.result()
    return count * images / (time.perf_counter() - start)


def _one_of_several(place: tuple[Path, str, int], changes: dict[str, Any]) -> int:
    subject = load_subject(*place)
    ours(subject, **changes)
    return len(subject.images)


def plain(subject: Subject, workers: int, taught: bool = False) -> float:
    model, images, normalisation, recipe, dense = _copied(subject)
    steps = [transforms.RandomCrop(images.image_shape[1:], padding=recipe.padding), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(*normalisation)]
    loader = _loader(images, transforms.Compose(steps), recipe, workers)
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.highest_lr(len(images)), recipe.momentum, weight_decay=recipe.weight_decay
    )
    criterion, device = nn.CrossEntropyLoss(), next(model.parameters()).device

    def train() -> None:
        for batch, targets in loader:
            inputs, labels = batch.to(device), targets.to(device)
            if taught:
                with torch.no_grad():
                    answers = dense(inputs)
                loss = recipe.loss(model(inputs), labels, answers)
            else:
                loss = criterion(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return _images_per_second(train, len(images), device)


def reference(subject: Subject, workers: int) -> float:
    model, images, normalisation, recipe, _ = _copied(subject)
    size, classes = images.image_shape[1:], len(images.classes)
    steps = [
        transforms.RandomResizedCrop(size),
        transforms.RandomHorizontalFlip(),
        transforms.TrivialAugmentWide(),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(*normalisation),
        transforms.RandomErasing(p=0.1),
    ]
    mix = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])
    loader = _loader(images, transforms.Compose(steps), recipe, workers, lambda items: mix(*default_collate(items)))
    optimizer = torch.optim.SGD(model.parameters(), recipe.highest_lr(len(images)), recipe.momentum, weight_decay=2e-5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99998), use_buffers=True)
    criterion, device = nn.CrossEntropyLoss(label_smoothing=0.1), next(model.parameters()).device

    def train() -> None:
        for step, (batch, targets) in enumerate(loader):
            wanted = targets.to(device)
            outputs = model(batch.to(device))
            loss = criterion(outputs, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 32 == 0:
                average.update_parameters(model)
            outputs.topk(5)[1].eq(wanted.argmax(1, keepdim=True)).sum().item()
            loss.item()

    return _images_per_second(train, len(images), device)


def _copied(subject: Subject) -> Subject:
    return subject._replace(model=copy.deepcopy(subject.model))


def _images_per_second(train: Callable[[], None], images: int, device: torch.device) -> float:
    synchronise = synchroniser(device)
    synchronise()
    start = time.perf_counter()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # PyTorch's default; this project turns it off
        train()
    synchronise()
    return images / (time.perf_counter() - start)


class _Pictures(Dataset[tuple[Tensor, int]]):
    """Images and labels as torchvision's data sets in memory give them."""

    def __init__(self, data: ImageData, transform: Callable[[Image.Image], Tensor]) -> None:
        self._pixels = data.batch(torch.arange(len(data))).permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
        self._labels, self._transform = data.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[position])), self._labels[position]


def _loader(
    images: ImageData,
    transform: Callable[[Image.Image], Tensor],
    recipe: Recipe,
    workers: int,
    collate: Callable[[list[Any]], Any] = default_collate,
) -> Iterable[tuple[Tensor, Tensor]]:
    pinned = torch.cuda.is_available()
    return DataLoader(
        _Pictures(images, transform),
        recipe.batch_size,
        True,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pinned,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with dense/ and export/")
    parser.add_argument("--policy", default="macs-0.50", help="folder in export/")
    parser.add_argument("--images", type=int, default=5120, help="in a pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at_once", type=int, default=2, help="models that are trained side by side")
    parser.add_argument("--compiled", action="store_true", help="also by torch.compile")
    parser.add_argument("--result", type=Path, help="JSON file")
    return parser


if __name__ == "__main__":
    run_command(main)
