"""Magnitude pruning of single weights (Han et al., NeurIPS 2015), by PyTorch's own utilities: in every convolution and
linear layer the same part of the weights, the smallest, becomes zero. No channel falls.
"""

import copy

import torch
from torch import nn
from torch.nn.utils import prune

from cacp.methods.subject import Pruned, Subject
from cacp.schema import Budget


def magnitude(subject: Subject, budget: Budget) -> Pruned:
    """Weights whose non-zero part in every layer is the budget's smallest target."""
    model = copy.deepcopy(subject.model).to(memory_format=torch.contiguous_format)  # which PyTorch's utilities need
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=1 - min(budget.targets.values()))
        prune.remove(layer, "weight")
    weights = sum(layer.weight.numel() for layer in layers)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
    return Pruned(None, model.state_dict(), {"sparsity": zeros / weights})
