"""How fast policies are scored: this project's scorer against AMC's and Torch-Pruning's ways, and against the machine.

    python -m benchmarks.search_speed --config configs/cifar10_resnet56.yaml [settings of search.py] \\
        --policies 100 --repeats 1 --result results/search_speed.json

Policies are drawn as the search's warm-up draws them: random search, the macs targets in turn, channels ranked by the
criterion. Every system scores each of them on the same images, policy by policy; the order of the systems turns, and
runs backwards every other time. Clocks are read when the device is done. Systems (A and B: see `benchmarks.peers`):

- ours: `PolicyScorer` as search.py uses it, but for the repair of weights, which the others know nothing of; ours fp32:
  the same in fp32. A scorer sees a policy once; a repeat has scorers of its own.
- A: AMC's way, zeroed channels; B: Torch-Pruning's way. Both recalibrate batch norm as ours does.
- A stale, B stale: as they come, without recalibration.

The floor of a policy is its network's multiply-accumulates over all images that it sees (`stale`: those of the
evaluation) divided by the best convolution rate of this machine, taken before, amid and after the scoring.
`convolutions_only` runs each convolution of a few pruned networks alone, in the precision and batches of ours, with
every thread busy: what is between it and the floor is thin layers, between it and ours all that is not convolution.

The dense model is imported as search.py does, into a folder that is deleted again; `--weights train` takes it from the
run folder. The JSON says under `settings` how everything was run, and holds all single measurements under `raw`.

Letters: B images of a batch, C channels, H x W pixels, P policies, R repeats.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.peers import (
    AMC_BATCH,
    LANES,
    LayerTime,
    Peer,
    PlainImages,
    TorchPruned,
    ZeroedChannels,
    best_of,
    convolution_rates,
    convolution_shapes,
    layer_times,
    synchroniser,
)
from benchmarks.speed_subject import Subject, draw_policies, subject_of
from benchmarks.speed_summary import (
    OURS,
    OURS_FP32,
    Drawn,
    Measured,
    Observation,
    agreements,
    floor_seconds,
    raw,
    show,
    spread,
    summary,
)
from benchmarks.summarise import portable
from cacp.checkpoint import save_json
from cacp.command import run_command
from cacp.config import experiment_from, parse
from cacp.environment import environment
from cacp.evaluation import dtype_name
from cacp.profiling import Profile
from cacp.reporting import ProgressLine
from cacp.schema import Policy, UserError
from cacp.scoring import CALIBRATION_BATCH, EVALUATION_BATCH, PolicyScorer, evaluation_batch
from cacp.slicing import slice_model

WARM_UP = 3  # other policies that every system scores before the clock counts, one of each target
PAUSE = 0.02  # seconds before every measurement: OpenMP's threads spin for some milliseconds after their work
CHECKED = 3  # policies on which A and B must compute what the sliced network computes
LARGEST_DIFFERENCE = 5e-3  # of their logits, relative to the largest logit: fp32 through 56 layers
PLAIN = 20  # policies that plain PyTorch scores too
CONVOLVED = 6  # policies whose convolutions are run alone
CHOICES = {
    "A": f"AMC's way: one dense network, weights restored and zeroed for every policy; fp32, batches of {AMC_BATCH} "
    "(AMC's default) from a DataLoader without workers over normalised fp32 images in memory, default memory format, "
    "torch.no_grad, top-1 only",
    "B": "Torch-Pruning's way: deep copy, DependencyGraph, each of the policy's groups pruned; fp32, slices of one "
    f"tensor in batches of {EVALUATION_BATCH}, default memory format, torch.no_grad, top-1 only",
    "recalibration": f"mean of batch-norm statistics over batches of {CALIBRATION_BATCH} calibration images, for all; "
    "the calibration images lie on the device as one tensor",
    "stale": "A and B as they come, without recalibration",
}


class System(NamedTuple):
    """A way to score policies; `score` returns top-1 and counts its phases in `profile`."""

    name: str
    score: Callable[[Policy], float]
    profile: Profile
    images: int  # that pass through the network for one score


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--policies", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1, help="times that every policy is scored by every system")
    parser.add_argument("--result", required=True, type=Path, help="JSON file to write")
    arguments, rest = parser.parse_known_args()
    policies, repeats = arguments.policies, arguments.repeats
    if min(policies, repeats) < 1:
        raise UserError(f"policies and repeats must be at least 1, but got {policies=}, {repeats=}")
    experiment = experiment_from(parse("search", "Measure the speed of scoring policies.", rest))
    if experiment.pruned_scope != "inner":
        raise UserError(
            "scope must be inner, as neither zeroed weights nor Torch-Pruning reach the channels that a shortcut "
            f"without weights passes on, but got {experiment.pruned_scope!r}"
        )
    load_before = os.getloadavg()
    result = measure(subject_of(experiment), experiment.targets, policies, repeats, experiment.seed)
    names = ("model", "weights", "dataset", "criterion")
    result["settings"] |= {**{name: getattr(experiment, name) for name in names}, "scope": experiment.pruned_scope}
    result["environment"] = environment(experiment.seed) | {"load_average": [load_before[0], os.getloadavg()[0]]}
    result["environment"]["command"] = [part for word in sys.argv for part in _separated(word)]
    result["environment"]["packages"]["torch-pruning"] = _version("torch-pruning")
    save_json(arguments.result, portable(result))
    show(result)


def _separated(word: str) -> list[str]:
    """--flag=/path as two words, so that `portable` sees the path."""
    flag, equals, value = word.partition("=")
    return [flag, value] if equals and value.startswith("/") else [word]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# measuring ------------------------------------------------------------------------------------------------------------


def measure(subject: Subject, targets: Sequence[float], policies: int, repeats: int, seed: int) -> dict[str, Any]:
    """Score, and sum up: the JSON without its environment."""
    drawn = draw_policies(subject, targets, WARM_UP + policies, seed)
    images = PlainImages(subject.validation, subject.calibration, subject.normalisation, subject.device)
    peers, left_out = build_peers(subject, images)
    equality = check_peers(subject, images, peers, drawn[:CHECKED])
    measured = observe_all(subject, peers, drawn[:WARM_UP], drawn[WARM_UP:], repeats)
    scorer = subject.scorer(torch.float32)
    plain = [scorer.evaluate(scorer.sliced(one.policy)).top1 for one in measured.drawn[:PLAIN]]
    return {
        "settings": settings(subject, images, targets, policies, repeats, seed),
        **summary(measured),
        "convolutions_only": convolutions_only(subject, measured),
        "agreement": agreements(measured, plain),
        "equality": equality,
        "left_out": left_out,
        "raw": raw(measured, plain),
    }


def observe_all(
    subject: Subject, peers: Mapping[str, Peer], warm_up: Sequence[Drawn], drawn: list[Drawn], repeats: int
) -> Measured:
    """Every policy by every system, and the machine's rate before, amid and after."""
    device, shapes = subject.device, convolution_shapes(subject.device)
    rates = convolution_rates(device, shapes)
    observations: dict[str, list[Observation]] = {}
    slicing: list[float] = []
    gc.freeze()  # so that collecting the garbage of a policy is quick
    with ProgressLine("policies", repeats * len(drawn)) as progress:
        for _ in range(repeats):
            systems = build_systems(subject, peers)
            for system, (policy, _, _) in itertools.product(systems, warm_up):
                system.score(policy)
            for position, (policy, _, _) in enumerate(drawn):
                gc.collect()
                for system in in_turn(systems, position):
                    observations.setdefault(system.name, []).append(observe(system, policy, device))
                slicing.append(timed(partial(slice_model, subject.model, subject.groups, policy), device))
                if len(slicing) == (repeats * len(drawn) + 1) // 2:
                    rates = best_of(rates, convolution_rates(device, shapes))
                progress.advance(f"ours {spread([one.seconds for one in observations[OURS]])['median']:.3f} s")
    gc.unfreeze()
    rates = best_of(rates, convolution_rates(device, shapes))
    images = {system.name: system.images for system in systems}
    return Measured(drawn, images, {name: observations[name] for name in images}, slicing, rates)


def settings(
    subject: Subject, images: PlainImages, targets: Sequence[float], policies: int, repeats: int, seed: int
) -> dict[str, Any]:
    return {
        "policies": policies,
        "repeats": repeats,
        "warm_up_policies": WARM_UP,
        "targets": list(targets),
        "seed": seed,
        "validation_images": len(subject.validation),
        "calibration_images": len(subject.calibration),
        "image_shape": list(images.validation.shape[1:]),
        "device": str(subject.device),
        "threads": torch.get_num_threads(),
        "precision_of_ours": dtype_name(subject.precision),
        "ours_is_fused": subject.scorer(subject.precision).fused,
        "choices": CHOICES,
    }


def build_peers(subject: Subject, images: PlainImages) -> tuple[dict[str, Peer], dict[str, str]]:
    """A and B; and why B is left out, where it is."""
    peers: dict[str, Peer] = {"A": ZeroedChannels(subject.model, subject.groups, images)}
    try:
        peers["B"] = TorchPruned(subject.model, subject.groups, images)
    except ModuleNotFoundError as error:
        return peers, {"B": f"{error.name} is not installed on this machine"}
    return peers, {}


@torch.no_grad()
def check_peers(
    subject: Subject, images: PlainImages, peers: Mapping[str, Peer], drawn: Sequence[Drawn]
) -> dict[str, dict[str, float]]:
    """Largest differences between the logits of A, B and the sliced network, unrepaired, relative to the largest logit;
    fp32.

    Raises:
        RuntimeError: where they are too large: then a peer does other work than ours, and its time says nothing.
    """
    batch = images.validation[: 2 * AMC_BATCH].to(subject.device)  # (B, C, H, W)
    differences = {name: {"stale": 0.0, "recalibrated": 0.0} for name in peers}
    for (name, peer), (policy, _, _) in itertools.product(peers.items(), drawn):
        with torch.enable_grad():  # Torch-Pruning's tracing needs it
            model = peer.prepare(policy)
        ours = slice_model(subject.model, subject.groups, policy).eval()
        for kind in ("stale", "recalibrated"):
            if kind == "recalibrated":
                images.recalibrate(ours)
                peer.recalibrate(model)
            expected = ours(batch)  # (B, classes)
            difference = ((model(batch) - expected).abs().max() / expected.abs().max()).item()
            differences[name][kind] = max(differences[name][kind], difference)
    wrong = {name: found for name, found in differences.items() if max(found.values()) > LARGEST_DIFFERENCE}
    if wrong:
        raise RuntimeError(
            f"logits must differ from the sliced network's by at most {LARGEST_DIFFERENCE} of the largest, "
            f"but got {wrong}"
        )
    return differences


def build_systems(subject: Subject, peers: Mapping[str, Peer]) -> list[System]:
    """Ours with fresh scorers, which have seen no policy, then the peers with and without recalibration."""
    evaluated = len(subject.validation)
    both = evaluated + len(subject.calibration)
    systems = []
    for name, precision in ((OURS, subject.precision), (OURS_FP32, torch.float32)):
        profile = Profile(synchroniser(subject.device))
        systems.append(System(name, _score_of_ours(subject.scorer(precision, profile)), profile, both))
    for name, peer in peers.items():
        for label, recalibrated in ((name, True), (f"{name} stale", False)):
            profile = Profile(synchroniser(subject.device))
            score = _score_of_peer(peer, recalibrated, profile)
            systems.append(System(label, score, profile, both if recalibrated else evaluated))
    return systems


def _score_of_ours(scorer: PolicyScorer) -> Callable[[Policy], float]:
    return lambda policy: scorer(policy).top1


def _score_of_peer(peer: Peer, recalibrated: bool, profile: Profile) -> Callable[[Policy], float]:
    def score(policy: Policy) -> float:
        with profile.phase("slicing"):
            model = peer.prepare(policy)
        if recalibrated:
            with profile.phase("recalibration"):
                peer.recalibrate(model)
        with profile.phase("evaluation"):
            return peer.evaluate(model)

    return score


def in_turn(systems: Sequence[System], position: int) -> list[System]:
    """The systems from another one on for every policy, forwards through one round and backwards through the next."""
    start = position % len(systems)
    order = [*systems[start:], *systems[:start]]
    return order[::-1] if position // len(systems) % 2 else order


def observe(system: System, policy: Policy, device: torch.device) -> Observation:
    before, scored = dict(system.profile.seconds), []
    seconds = timed(lambda: scored.append(system.score(policy)), device)
    phases = {name: total - before.get(name, 0.0) for name, total in system.profile.seconds.items()}
    return Observation(seconds, phases, scored[0])


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a piece of work, the device's part included."""
    synchronise = synchroniser(device)
    time.sleep(PAUSE)
    synchronise()
    start = time.perf_counter()
    kept = work()  # freed after the clock is read
    synchronise()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def convolutions_only(subject: Subject, measured: Measured) -> dict[str, Any]:
    """From the floor to ours, on a few policies: thin layers padded, layers as they are, all the rest."""
    on_gpu = subject.device.type == "cuda"
    batch = min(evaluation_batch(subject.device, subject.validation.image_shape), len(subject.validation))
    threads = 1 if on_gpu else torch.get_num_threads()
    image = torch.zeros(1, *subject.validation.image_shape, device=subject.device)
    layers = [
        layer_times(slice_model(subject.model, subject.groups, one.policy), image, subject.precision, batch, threads)
        for one in measured.drawn[:CONVOLVED]
    ]
    images, count = measured.images[OURS], len(layers)
    padded = [sum(layer.macs * layer.padded / layer.outputs for layer in network) for network in layers]
    alone = np.array([images * sum(layer.seconds for layer in network) for network in layers])
    ours = measured.seconds(OURS)[:count]
    return {
        "policies": count,
        "batch": batch,
        "threads": threads,
        "seconds_a_policy": {
            "floor": float(np.median(measured.floor(OURS)[:count])),
            f"floor_padded_to_{LANES}": float(np.median([floor_seconds(m, images, measured.rate) for m in padded])),
            "convolutions_only": float(np.median(alone)),
            "ours": float(np.median(ours)),
        },
        "part_of_ours": spread(alone / ours),
        "gmacs_per_second_by_padded_outputs": _rates_by_width([layer for network in layers for layer in network]),
    }


def _rates_by_width(layers: Sequence[LayerTime]) -> dict[str, float]:
    widths = sorted({layer.padded for layer in layers})
    chosen = {width: [layer for layer in layers if layer.padded == width] for width in widths}
    return {
        str(width): sum(layer.macs for layer in same) / sum(layer.seconds for layer in same) / 1e9
        for width, same in chosen.items()
    }


if __name__ == "__main__":
    run_command(main)
