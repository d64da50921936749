"""Run by torchrun, or alone: train in double precision and save what comes out. Several processes break off once.

torchrun --standalone --nproc_per_node 2 tests/trained_in_parallel.py OUTPUT
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cacp.cost import CostModel
from cacp.data import channel_statistics, load_dataset
from cacp.graph import trace
from cacp.importance import channel_importance
from cacp.methods import Subject, Training
from cacp.methods.caie import CAIE
from cacp.methods.sfp import SFP
from cacp.models import build_model
from cacp.parallel import following_processes, processes
from cacp.recipe import Recipe
from cacp.schema import Budget
from cacp.training import fit

BATCH = 21  # which two processes cannot halve


def in_double(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].double(),)


def results(folder: Path) -> dict[str, Tensor]:
    digits = load_dataset("digits", "train", "unused")
    data = digits.subset(torch.arange(3 * BATCH - 1))
    normalisation = channel_statistics(data)
    recipe = Recipe(epochs=2, lr=0.02, batch_size=BATCH, schedule="step", precision="fp32")
    model, broken_off, teacher = (build_model("resnet20", 10, seed).double() for seed in (0, 0, 1))
    for network in (model, broken_off, teacher):
        network.register_forward_pre_hook(in_double)
    taught = replace(recipe, distillation=0.5, ema_decay=0.7)
    fitting = (data, data, normalisation, taught, 1, folder / "fit")
    if processes() > 1:
        begun = fit(broken_off, *fitting, teacher=teacher)
        next(begun)
        begun.close()
    records = list(fit(model, *fitting, teacher=teacher))
    found = {f"fit {name}": tensor for name, tensor in model.state_dict().items()}
    found["fit losses"] = torch.tensor([[record.train_loss, record.train_top1] for record in records])

    groups = trace(build_model("resnet20", 10, seed=0), torch.zeros(1, 3, 32, 32), "all")
    for name, method in (("caie", CAIE(channels_per_step=150, batches_per_step=2)), ("sfp", SFP(1, 0.02))):
        training = Training(data, recipe, 2, folder / name, lambda records, epochs: list(records))
        unused = partial(channel_importance, model, groups)
        scores = None  # type: ignore[var-annotated]
        subject = Subject(model, groups, CostModel(groups), unused, "l1", scores, 0, normalisation, training)
        pruned = method(subject, Budget({"macs": 0.5}))
        assert pruned.policy is not None and pruned.weights is not None
        found |= {f"{name} {key}": tensor for key, tensor in pruned.weights.items()}
        found |= {f"{name} kept {key}": torch.tensor(kept) for key, kept in pruned.policy.keep.items()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with following_processes() as first:
        if first:
            torch.save(results(Path(sys.argv[1]).with_suffix("")), sys.argv[1])
