"""Scores of policies: against the dense model's own top-1, and against a recalibration by hand."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import Net, keep_all, lively, random_policy, resnet20
from torch import Tensor, nn

from cacp import scoring
from cacp.cost import counted_cost
from cacp.data import ImageData
from cacp.graph import trace
from cacp.profiling import Profile
from cacp.repair import Repair
from cacp.schema import ChannelGroups, Normalisation, Policy, UserError
from cacp.scoring import PolicyScorer, evaluation_batch
from cacp.slicing import slice_model

NORMALISATION = Normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def random_images(count: int, seed: int) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, torch.randint(10, (count,), generator=generator), tuple("abcdefghij"))


def by_hand(data: ImageData) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATION)
    return (data.batch(torch.arange(len(data))).float() / 255 - mean) / std


def recalibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose batch-norm statistics are those of one batch."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(images)
    return model.eval()


VALIDATION, CALIBRATION = random_images(150, 0), random_images(100, 1)


@pytest.fixture
def model() -> nn.Module:
    return resnet20()


@pytest.mark.parametrize("scope", ["inner", "all"])
def test_keep_all_scores_what_the_recalibrated_dense_model_scores(model: nn.Module, scope: str) -> None:
    groups = trace(model, torch.zeros(1, 3, 8, 8), scope)
    score = PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)(keep_all(groups))
    with torch.no_grad():
        logits = recalibrated(model, by_hand(CALIBRATION))(by_hand(VALIDATION))
    assert score.top1 == pytest.approx((logits.argmax(1) == VALIDATION.labels).float().mean().item())
    assert score.loss == pytest.approx(F.cross_entropy(logits, VALIDATION.labels).item(), rel=1e-4)
    assert score.cost == counted_cost(model, (3, 8, 8))


def test_a_pruned_policy_scores_what_its_sliced_model_scores(model: nn.Module) -> None:
    groups = trace(model, torch.zeros(1, 3, 8, 8), "all")
    policy = random_policy(groups, 0)
    score = PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)(policy)
    sliced = slice_model(model, groups, policy)
    Repair(model, groups, by_hand(CALIBRATION))(sliced, policy)
    with torch.no_grad():
        logits = recalibrated(sliced, by_hand(CALIBRATION))(by_hand(VALIDATION))
        stale = sliced(by_hand(VALIDATION))
    assert score.loss == pytest.approx(F.cross_entropy(logits, VALIDATION.labels).item(), rel=1e-4)
    assert score.loss != pytest.approx(F.cross_entropy(stale, VALIDATION.labels).item(), rel=1e-2)
    right = logits.softmax(1).gather(1, VALIDATION.labels[:, None])
    assert score.probability == pytest.approx(right.mean().item(), rel=1e-4)
    assert score.cost == counted_cost(sliced, (3, 8, 8))


def test_equal_policies_are_scored_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    scorer = PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)
    calls = []

    def counted(*arguments: object) -> nn.Module:
        calls.append(arguments)
        return slice_model(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "slice_model", counted)
    policy = random_policy(groups, 0)
    first = scorer(policy)
    turned = Policy(dict(reversed(list(policy.keep.items()))), "other criterion")
    assert scorer(turned) is first
    assert len(calls) == 1
    scorer(random_policy(groups, 1))
    assert len(calls) == 2


def test_other_channels_of_the_same_counts_are_another_policy(model: nn.Module) -> None:
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    scorer = PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)
    first = Policy({group.name: (0, 1) for group in groups.prunable}, "l1")
    second = Policy({group.name: (2, 3) for group in groups.prunable}, "l1")
    assert scorer(first).cost == scorer(second).cost
    assert scorer(first).loss != scorer(second).loss


def test_the_dense_model_keeps_its_statistics(model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    groups = trace(model, torch.zeros(1, 3, 8, 8))
    PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION)(keep_all(groups))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# threads --------------------------------------------------------------------------------------------------------------

LARGE_CALIBRATION = random_images(300, 1)  # three batches


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def groups(model: nn.Module) -> ChannelGroups:
    return trace(model, torch.zeros(1, 3, 8, 8), "all")


def scorer_of(
    model: nn.Module,
    groups: ChannelGroups,
    calibration: ImageData = LARGE_CALIBRATION,
    validation: ImageData = VALIDATION,
) -> PolicyScorer:
    return PolicyScorer(model, groups, validation, calibration, NORMALISATION)


def test_two_threads_give_the_same_bits_every_time_and_the_score_of_one(
    model: nn.Module, groups: ChannelGroups, two_threads: None
) -> None:
    policies = [random_policy(groups, seed) for seed in range(4)]
    scorers = [scorer_of(model, groups) for _ in range(2)]
    first, second = ([scorer(policy) for policy in policies] for scorer in scorers)
    assert first == second
    torch.set_num_threads(1)
    alone = scorer_of(model, groups)
    for score, policy in zip(first, policies, strict=True):
        assert score.loss == pytest.approx(alone(policy).loss, rel=1e-6)
        assert score.top1 == alone(policy).top1


@pytest.mark.parametrize(
    ("threads", "calibration", "validation", "policies"),
    [(1, 300, 150, 6), (2, 300, 150, 6), (2, 300, 1, 1), (2, 100, 150, 1), (2, 8, 3, 1)],  # the last two: one batch
)
def test_scores_are_those_of_the_sliced_model(
    model: nn.Module,
    groups: ChannelGroups,
    two_threads: None,
    threads: int,
    calibration: int,
    validation: int,
    policies: int,
) -> None:
    torch.set_num_threads(threads)
    scorer = scorer_of(model, groups, random_images(calibration, 1), random_images(validation, 0))
    assert scorer.fused
    scores = [scorer(random_policy(groups, seed)) for seed in range(policies)]
    torch.set_num_threads(1)
    for seed, score in enumerate(scores):
        expected = scorer.evaluate(scorer.sliced(random_policy(groups, seed)))
        assert score.loss == pytest.approx(expected.loss, rel=3e-6)
        assert score.top1 == expected.top1


@pytest.mark.parametrize(("threads", "calibration", "started"), [(2, 100, 2), (2, 300, 4), (3, 200, 4), (3, 300, 5)])
def test_a_scorer_starts_a_thread_a_batch_and_leaves_the_others(
    model: nn.Module, groups: ChannelGroups, two_threads: None, threads: int, calibration: int, started: int
) -> None:
    torch.set_num_threads(threads)
    before = set(threading.enumerate())
    scorer = scorer_of(model, groups, random_images(calibration, 1))
    assert len(set(threading.enumerate()) - before) == started  # for calibration, and two for two validation batches
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == threads
    del scorer


def test_batches_shrink_with_the_size_of_the_images() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = ((3, 8, 8), (3, 32, 32), (3, 64, 64), (3, 224, 224))
    assert [evaluation_batch(cpu, shape) for shape in sizes] == [125, 125, 31, 8]
    assert [evaluation_batch(gpu, shape) for shape in sizes] == [2500, 2500, 625, 51]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_scores_on_a_gpu(model: nn.Module, groups: ChannelGroups, precision: torch.dtype) -> None:
    policies = [random_policy(groups, seed) for seed in range(3)]
    on_cpu = scorer_of(model, groups)
    expected = [on_cpu(policy).loss for policy in policies]
    scorer = PolicyScorer(model.cuda(), groups, VALIDATION, LARGE_CALIBRATION, NORMALISATION, precision)
    assert scorer.fused
    losses = [scorer(policy).loss for policy in policies]
    assert losses == pytest.approx(expected, rel=1e-3 if precision == torch.float32 else 0.05)


def test_an_unfusable_model_is_scored_in_plain_pytorch() -> None:
    def overwriting(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        y = m.b(h)
        kept = F.relu(h, inplace=True)
        return m.out((F.relu(m.norm(y)) + kept).flatten(1))

    layers = {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4)}
    model = lively(Net(overwriting, **layers, out=nn.Linear(256, 10)))
    groups = trace(model, torch.zeros(1, 3, 8, 8), "all")
    profile = Profile(clock=itertools.count().__next__)
    with pytest.warns(UserWarning, match="scored in plain PyTorch, which is slower: Net gives other outputs"):
        scorer = PolicyScorer(model, groups, VALIDATION, CALIBRATION, NORMALISATION, profile=profile)
    policy = random_policy(groups, 0)
    assert not scorer.fused
    score = scorer(policy)
    assert profile.seconds == {"slicing": 1, "repair": 1, "recalibration": 1, "evaluation": 1}
    assert score[:3] == scorer.evaluate(scorer.sliced(policy))


@pytest.mark.parametrize("empty", ["validation", "calibration"])
def test_no_images_are_refused(model: nn.Module, groups: ChannelGroups, empty: str) -> None:
    with pytest.raises(UserError, match=f"{empty} must hold at least 1 image"):
        scorer_of(model, groups, **{empty: random_images(0, 0)})
