"""CACP as published: the clamp, its rounding, the replay and the baseline by hand, and that the search learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Net
from torch import nn

from benchmarks.published_cacp import (
    BATCH_SIZE,
    Batch,
    PruningSteps,
    PublishedDDPG,
    PublishedEpisode,
    Replay,
    published_search,
)
from cacp.cost import CostModel
from cacp.graph import trace
from cacp.models import build_model
from cacp.schema import ChannelGroups, UserError

TARGETS = (0.3, 0.5, 0.7)


@pytest.fixture(scope="module")
def resnet20() -> ChannelGroups:
    return trace(build_model("resnet20", 10, seed=0), torch.zeros(1, 3, 32, 32), "inner")


def two_groups() -> ChannelGroups:
    """a and b channels of 10 each: 3a + ab + 4b MACs a pixel, 170 unpruned."""
    layers = [nn.Conv2d(n, m, 1, bias=False) for n, m in ((3, 10), (10, 10), (10, 4))]
    return trace(Net(lambda m, x: m.layers(x), layers=nn.Sequential(*layers)), torch.zeros(1, 3, 4, 4))


def random_scores(groups: ChannelGroups, episodes: int, seed: int) -> list[PublishedEpisode]:
    generator = np.random.default_rng(0)
    return published_search(groups, lambda counts: float(generator.random()), TARGETS, episodes, seed)


def test_the_clamp_and_its_rounding_by_hand() -> None:
    steps = PruningSteps(two_groups())
    assert steps.keep_count([], 0.5, 0.34) == 7  # 3.4 of 10 are removed: 3
    assert steps.keep_count([], 0.5, 0.0) == 10  # the least ratio, 0.05, removes half a channel: none
    assert steps.keep_count([], 0.5, 1.0) == 1  # min_keep
    assert steps.keep_count([], 0.1, 0.0) == 4  # 3a + a + 4 <= 17 with b = 1: a <= 3.25, rounded up
    assert steps.keep_count([7], 0.5, 0.0) == 6  # 21 + 11b <= 85: b <= 5.82, rounded up to 87 > 85
    assert steps.keep_count([7], 0.5, 0.75) == 3  # more than the clamp asks for


def test_observations_by_hand() -> None:
    steps = PruningSteps(two_groups())
    first, second = steps.observe([], 0.3), steps.observe([6], 0.3)
    assert first.shape == second.shape == (14,)
    # target, step, type | reduced, rest: ab + 4b, previous
    assert first[[0, 1, 2, 11, 12, 13]] == pytest.approx([0.3, 0, 0, 0, 140 / 170, 0])
    assert second[[0, 1, 2, 11, 12, 13]] == pytest.approx([0.3, 1, 0, 1 - (18 + 60 + 40) / 170, 0, 0.4])


def test_policies_end_at_their_target_or_less_than_a_channel_above(resnet20: ChannelGroups) -> None:
    costs = CostModel(resnet20)
    played = random_scores(resnet20, 45, seed=0)
    above = [costs.cost(episode.counts).macs / costs.dense.macs - episode.target for episode in played]
    assert max(above) < 0.01
    assert sum(excess > 0 for excess in above) > 5  # the published defect
    for episode in played:
        assert np.all((costs.min_keep <= episode.counts) & (episode.counts <= costs.channels))


def test_targets_take_turns_and_a_seed_is_a_run(resnet20: ChannelGroups) -> None:
    first, again, other = (random_scores(resnet20, 12, seed) for seed in (0, 0, 1))
    assert [episode.target for episode in first] == [0.3, 0.5, 0.7] * 4
    assert first == again
    assert [episode.counts for episode in first] != [episode.counts for episode in other]


def test_an_unreachable_target_is_refused(resnet20: ChannelGroups) -> None:
    with pytest.raises(UserError, match=r"no policy meets macs 0\.05"):
        published_search(resnet20, lambda counts: 0.0, (0.5, 0.05), 9, 0)


def test_the_replay_holds_raw_actions_and_the_reward_at_every_step(
    resnet20: ChannelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = list[tuple[float, float]]()
    add = Replay.add

    def spy(replay: Replay, observation: np.ndarray, action: float, reward: float) -> None:
        stored.append((action, reward))
        add(replay, observation, action, reward)

    monkeypatch.setattr(Replay, "add", spy)
    played = random_scores(resnet20, 10, seed=0)
    assert [reward for _, reward in stored] == [episode.value for episode in played for _ in range(9)]
    actions = np.array([action for action, _ in stored]).reshape(10, 9)
    executed = 1 - np.array([episode.counts for episode in played]) / CostModel(resnet20).channels
    assert actions.min() < 0.05  # below the least ratio
    assert np.max(executed - actions) > 0.3  # raised by the clamp, and stored as it was


def test_the_replay_never_samples_first_steps() -> None:
    replay = Replay(3, 1, np.random.default_rng(0))
    for number in range(305):  # 100 episodes of 3 steps stay: 5 to 304, the newest without what follows it
        replay.add(np.array([number], np.float32), number / 305, 1.0)
    batches = [replay.sample() for _ in range(100)]
    drawn = torch.cat([batch.observations for batch in batches])[:, 0]  # (100 B,)
    goes_on = torch.cat([batch.goes_on for batch in batches])[:, 0]
    following = torch.cat([batch.next_observations for batch in batches])[:, 0]
    assert len(drawn) == 100 * BATCH_SIZE
    assert set(drawn.tolist()) == {number for number in range(5, 304) if number % 3}
    assert torch.equal(goes_on, (drawn % 3 != 2).float())
    assert torch.equal(following, drawn + 1)


def test_one_baseline_follows_the_batches_and_target_networks_their_networks() -> None:
    agent = PublishedDDPG(features=2, seed=0)
    ones = torch.ones(BATCH_SIZE, 1)
    before = [parameter.clone() for parameter in agent.target_critic.parameters()]
    for reward, baseline in ((0.8, 0.8), (0.4, 0.6), (0.2, 0.4)):
        agent.update(Batch(torch.rand(BATCH_SIZE, 2), 0.5 * ones, reward * ones, torch.rand(BATCH_SIZE, 2), ones))
        assert agent.baseline == pytest.approx(baseline)
        now = list(agent.target_critic.parameters())
        for old, new, source in zip(before, now, agent.critic.parameters(), strict=True):
            torch.testing.assert_close(new, 0.99 * old + 0.01 * source)
        before = [parameter.clone() for parameter in now]


def test_the_search_learns() -> None:
    """Without updates the last policies get 0.60 to 0.70, as random ones do."""
    groups = two_groups()

    def score(counts: tuple[int, ...]) -> float:
        return float(1 - np.abs(np.array(counts) / 10 - 0.2).mean())

    values = [episode.value for episode in published_search(groups, score, (0.6, 0.9), 300, seed=0)]
    assert np.mean(values[-50:]) > np.mean(values[:33]) + 0.2
