"""What a network costs, layer by layer, and what a policy leaves of it.

    python -m cacp.cost --model resnet32 [--policy runs/NAME/policies/macs-0.50.json]

MACs are multiply-accumulates for one image (the papers' "FLOPs").
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from cacp.checkpoint import load_json
from cacp.command import run_command
from cacp.cost import CostModel, LayerCost, layer_costs
from cacp.graph import trace
from cacp.models import CIFAR_NAMES, MODEL_HELP, build_model
from cacp.reporting import console, millions, percent, table
from cacp.schema import ChannelGroups, Policy, PolicyRecord, UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56", help=MODEL_HELP)
    parser.add_argument("--classes", type=int, default=10, help="outputs of the network (default: 10)")
    parser.add_argument("--image_size", type=int, help="pixels a side (default: 32, or 224 for torchvision's networks)")
    parser.add_argument("--policy", type=Path, help="policy file of a run of this network")
    arguments = parser.parse_args()
    model = build_model(arguments.model, arguments.classes, seed=0, importing=True)
    size = arguments.image_size or (32 if arguments.model in CIFAR_NAMES else 224)
    record = PolicyRecord.from_json(load_json(arguments.policy), str(arguments.policy)) if arguments.policy else None
    groups = trace(model, torch.zeros(1, 3, size, size), record.scope if record else "all")
    if record:
        whole = {group.name: tuple(range(group.channels)) for group in groups.prunable}  # what the run ignored
        policy = Policy({**whole, **record.policy.keep}, record.policy.criterion)
        policy.validate(groups)
        cost = CostModel(groups).cost([policy.counts[group.name] for group in groups.prunable])
        if cost != record.score.cost.counted:
            raise UserError(
                f"{arguments.policy} costs {record.score.cost.counted}, but of this network {cost}; "
                "give the --model, --classes and --image_size of its run"
            )
    show(groups, record.policy.counts if record else {}, f"{arguments.model}, images of {size} x {size} pixels")


def show(groups: ChannelGroups, keep_counts: Mapping[str, int], title: str) -> None:
    """A table of the layers that multiply, and what all others cost together."""
    dense, kept = layer_costs(groups, {}), layer_costs(groups, keep_counts)
    rows = [row_of(whole, left) for whole, left in zip(dense, kept, strict=True) if whole.cost.macs]
    others = groups.fixed_params + sum(one.cost.params for one in kept if not one.cost.macs)
    macs, dense_macs = (groups.fixed_macs + sum(one.cost.macs for one in layers) for layers in (kept, dense))
    params = groups.fixed_params + sum(one.cost.params for one in kept)
    rows.append(["batch norm and others", "", "", "", "", millions(groups.fixed_macs), "", f"{others:,}"])
    rows.append(["all", "", "", "", "", millions(macs), percent(macs / dense_macs), f"{params:,}"])
    columns = ["layer", "kind", "pixels", "inputs", "outputs", "MACs", "of dense, %", "params"]
    console.print(table(title, columns, rows))


def row_of(whole: LayerCost, left: LayerCost) -> list[str]:
    """A layer before and after."""
    layer = left.layer
    return [
        layer.module,
        layer.kind if layer.kind == "linear" else f"{layer.kind} {layer.kernel} x {layer.kernel}",
        f"{layer.height} x {layer.width}",
        f"{left.inputs} of {whole.inputs}" if layer.inputs else "-",
        f"{left.outputs} of {whole.outputs}",
        millions(left.cost.macs),
        percent(left.cost.macs / whole.cost.macs),
        f"{left.cost.params:,}",
    ]


if __name__ == "__main__":
    run_command(main)
