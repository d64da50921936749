"""How the cost of a search grows with depth, images, targets and episodes.

    python -m benchmarks.scaling --result results/scaling.json --figure results/scaling.svg

Every point is a process of its own: CIFAR-sized random images, untrained weights (neither changes the time), the real
scorer, environment, agent and records. Around ResNet-56, 2,000 + 1,024 images and three targets, one quantity moves at
a time. The axis of episodes replaces the score by a constant: what remains is all that could grow with the length of
a search. A row holds the median seconds of an episode with their interquartile range, its phases, the seconds before
the first episode, and the largest memory of the process and on a GPU; an axis, the exponent of its growth: the slope of
log(value) over log(quantity), fitted to the points from its middle to its largest, where constant parts weigh least. 1
is linear. Targets lie evenly between macs 0.3 and 0.7; one target is 0.5.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from agents import make_agent
from benchmarks.summarise import portable
from cacp.checkpoint import save_json
from cacp.cost import CostModel
from cacp.data import ImageData
from cacp.environment import environment
from cacp.evaluation import device_of, resolve_precision, synchroniser
from cacp.experiment import Experiment
from cacp.graph import trace
from cacp.history import History
from cacp.importance import channel_importance, channel_orders
from cacp.models import build_model
from cacp.pipeline import select_device
from cacp.profiling import Profile
from cacp.records import play
from cacp.reporting import table
from cacp.reward import log_odds_reward
from cacp.schema import Budget, ChannelGroups, Normalisation, Score
from cacp.scoring import PolicyScorer
from cacp.slicing import counts_policy
from envs import ChannelPruningEnv

BASE = {"depth": 56, "images": 2000, "calibration": 1024, "targets": 3, "episodes": 15, "scored": True}
WARM_UP = 6  # episodes at random, not counted
AXES: dict[str, list[dict[str, Any]]] = {
    "depth": [{"depth": depth} for depth in (20, 32, 44, 56, 110)],
    "images": [{"images": images} for images in (500, 1000, 2000, 4000, 8000)],
    "calibration": [{"calibration": images} for images in (256, 512, 1024, 2048)],
    "targets": [{"targets": targets, "episodes": 24} for targets in (1, 3, 6, 12)],
    "episodes": [{"episodes": episodes, "scored": False} for episodes in (250, 500, 1000, 2000)],
}
LAST = 100  # episodes whose median is taken on the axis of episodes
PHASES = ("slicing", "recalibration", "evaluation", "agent's updates", "environment and actions", "records")
NORMALISATION = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=Path("results/scaling.json"))
    parser.add_argument("--figure", type=Path, default=Path("results/scaling.svg"))
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point is not None:
        json.dump(measured(**arguments.point, device=arguments.device), sys.stdout)
        return
    axes = {
        axis: [in_a_process({**BASE, **change}, arguments.device) for change in AXES[axis]] for axis in arguments.axes
    }
    growth = {axis: exponents(axis, rows) for axis, rows in axes.items()}
    result = {"axes": axes, "exponents": growth, "environment": environment(0)}
    save_json(arguments.result, portable(result))
    draw(axes, arguments.figure)
    show(axes, growth)


def in_a_process(point: dict[str, Any], device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--device", device, "--point", json.dumps(point)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = {**point, **json.loads(out.splitlines()[-1])}
    print(row, flush=True)
    return row


def measured(
    depth: int, images: int, calibration: int, targets: int, episodes: int, scored: bool, device: str
) -> dict[str, Any]:
    """Play a warm-up and `episodes` more; seconds of an episode and of its phases, and the largest memory."""
    start = time.perf_counter()
    place = select_device(device)
    profile = Profile(synchroniser(place))
    model = build_model(f"resnet{depth}", 10, seed=0).to(place).eval()
    groups = trace(model, torch.zeros(1, 3, 32, 32, device=place), "inner")
    cost_model = CostModel(groups)
    score = scores(model, groups, images, calibration, profile) if scored else partial(constant_score, cost_model)
    asked = [round(0.3 + 0.4 * index / (targets - 1), 2) for index in range(targets)] if targets > 1 else [0.5]
    env = ChannelPruningEnv(groups, score, log_odds_reward, asked)
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(
            output=folder, targets=asked, episodes=WARM_UP + episodes, warmup_episodes=WARM_UP, device=device
        )
        history = History(
            Path(folder) / "episodes.csv", cost_model.dense, [Budget({"macs": target}) for target in asked]
        )
        agent = make_agent("cacp", env, asked, experiment.seed, WARM_UP)
        preparation = time.perf_counter() - start
        for total in (WARM_UP, experiment.episodes):
            profile.seconds.clear()
            with profile.phase("environment and actions"):
                play(Path(folder), total, groups, agent, history, profile, {})
    seconds = [episode.seconds for episode in history.episodes[WARM_UP:]]
    low, median, high = statistics.quantiles(seconds if scored else seconds[-LAST:], n=4)
    return {
        "groups": len(groups.prunable),
        "macs": cost_model.dense.macs,
        "preparation_seconds": preparation,
        "episode_seconds": median,
        "episode_seconds_iqr": high - low,
        "phase_seconds": {name: total / episodes for name, total in profile.seconds.items()},
        "largest_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "largest_gpu_memory_bytes": torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None,
    }


def scores(
    model: nn.Module, groups: ChannelGroups, images: int, calibration: int, profile: Profile
) -> Callable[[tuple[int, ...]], Score]:
    """The scorer of a search on random images."""
    precision = resolve_precision("auto", device_of(model))
    sets = random_images(images, 0), random_images(calibration, 1)
    scorer = PolicyScorer(model, groups, *sets, NORMALISATION, precision, profile)
    orders = channel_orders(channel_importance(model, groups, "l1"))
    return lambda counts: scorer(counts_policy(groups, counts, orders, "l1"))


def constant_score(cost_model: CostModel, counts: tuple[int, ...]) -> Score:
    return Score(0.5, 1.0, 0.5, cost_model.cost(counts))


def random_images(count: int, seed: int) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, torch.randint(10, (count,), generator=generator), tuple("abcdefghij"))


def exponents(axis: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Slope of log(value) over log(quantity) from the middle to the largest point, for seconds and memory.

    Phases and episodes count by the seconds of one episode: 0 on the axis of episodes says that the whole is linear.
    """
    upper = rows[(len(rows) - 1) // 2 :]
    whole = ("episode_seconds", "preparation_seconds", "largest_memory_bytes", "largest_gpu_memory_bytes")
    values = {name: [row[name] for row in upper] for name in whole if upper[0][name] is not None}
    values |= {name: [row["phase_seconds"][name] for row in upper] for name in upper[0]["phase_seconds"]}
    quantities = np.log([row[axis] for row in upper])
    return {name: round(float(np.polyfit(quantities, np.log(seen), 1)[0]), 2) for name, seen in values.items()}


def draw(axes: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds of an episode and largest memory over each quantity."""
    figure = Figure(figsize=(3.2 * len(axes), 5), layout="constrained")
    FigureCanvasSVG(figure)
    for column, (axis, rows) in enumerate(axes.items()):
        for row, (key, unit, label) in enumerate(
            (("episode_seconds", 1e-3, "an episode, ms"), ("largest_memory_bytes", 2**20, "largest memory, MiB"))
        ):
            panel = figure.add_subplot(2, len(axes), 1 + row * len(axes) + column)
            values = [point[key] / unit for point in rows]
            panel.plot([point[axis] for point in rows], values, "o-", color="#2563a8")
            panel.set_ylim(0, 1.15 * max(values))
            panel.set_xlim(left=0)
            panel.set_xlabel(axis if rows[-1]["scored"] else f"{axis} (constant score)")
            if column == 0:
                panel.set_ylabel(label)
    figure.savefig(path, metadata={"Date": None})


def show(axes: dict[str, list[dict[str, Any]]], growth: dict[str, dict[str, float]]) -> None:
    rows = [
        [
            f"{axis} {row[axis]}",
            f"{1000 * row['episode_seconds']:.1f} ± {500 * row['episode_seconds_iqr']:.1f}",
            *(f"{1000 * row['phase_seconds'].get(name, 0):.1f}" for name in PHASES),
            f"{row['largest_memory_bytes'] / 2**20:.0f}",
        ]
        for axis, points in axes.items()
        for row in points
    ]
    Console(width=150).print(table("an episode, ms", ["", "all", *PHASES, "memory, MiB"], rows))
    for axis, values in growth.items():
        print(axis, values)


if __name__ == "__main__":
    main()
