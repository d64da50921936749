"""CACP as its authors published it, with the defects that its search quality suffers from: a rival for benchmarks.

Liu, Guo et al., "Conditional Automated Channel Pruning for Deep Neural Networks", IEEE SPL 2020, after AMC (He et al.,
ECCV 2018). Where paper and released code (github.com/liuyixin-louis/CACP) differ, the code counts. Kept on purpose:

- An action is a prune ratio in [0, 1], brought into [0.05, 1] and then raised until pruning 90 % of every later group
  can still meet the target: where a policy keeps much at first, the last groups pay for it.
- The replay holds the raw action, not the executed one: the critic learns values of actions that never were.
- The transition of the first group is never sampled: nothing teaches the actor what to do there.
- The reward is the score at the end, copied to every step, and the critic bootstraps: a step's value counts the reward
  once for every step that is left.
- One moving baseline for the rewards of all targets, though top-1 at 0.3 is far below that at 0.7.
- Removed channels are rounded down: a policy whose last groups were clamped ends above its target, by less than one
  channel of one group (0.24 % of ResNet-56's MACs); at 0.3 nearly all do. The caller says how much it forgives.
- A policy met before is scored again. Stale batch norm is the caller's choice: `score` is given.

Other than published: no group keeps less than its `min_keep` (there: one channel), also where 90 % would be less;
static features are those of `envs.observation` (of the group's first layer; there: of the one that reads it, with the
width, and the MACs of both as one number); updates begin one episode earlier (there: `episode > warmup`, so the first
noise is 0.475, not 0.5); batches are drawn with replacement.

Shapes: G prunable groups (steps), O observation entries, B transitions of a batch, N transitions that the replay holds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.noise import truncated_normal
from cacp.budget import check_reachable
from cacp.cost import CostModel
from cacp.schema import Budget, ChannelGroups
from envs.observation import static_features

LEAST_PRUNE_RATIO = 0.05
LATER_PRUNE_RATIO = 0.9  # that the clamp counts on in the groups that follow
WARMUP_PART = 9  # a ninth of the episodes is random: 100 of the paper's 900
SIGMA, SIGMA_DECAY = 0.5, 0.95  # an episode after warm-up
REPLAY_EPISODES = 100  # in the code as many as warm-up has
BATCH_SIZE = 64
HIDDEN = 300
ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE = 1e-4, 1e-3
TAU = 0.01  # of the target networks; the discount is 1
BASELINE_RATE = 0.5  # of the batches' mean rewards; AMC's code and CACP's ("based on batch, so small")


class PublishedEpisode(NamedTuple):
    """A target, the keep counts of the prunable groups that the agent chose for it, and their score."""

    target: float
    counts: tuple[int, ...]
    value: float


class PruningSteps:
    """The published decision process: what is seen before a group is pruned, and how many channels an action keeps."""

    def __init__(self, groups: ChannelGroups) -> None:
        self.cost_model = CostModel(groups)
        self.steps = len(self.cost_model.names)
        channels = self.cost_model.channels
        self._rest = np.maximum(self.cost_model.min_keep, np.round((1 - LATER_PRUNE_RATIO) * channels))  # (G,)
        kinds = {layer.module: layer.kind for layer in groups.layers}
        linear = [float(kinds.get(group.producers[0]) == "linear") for group in groups.prunable]
        self._static = np.column_stack([np.linspace(0, 1, self.steps), linear, static_features(groups)])  # (G, 10)

    def observe(self, chosen: Sequence[int], target: float) -> np.ndarray:
        """(O,) float32: target, step, type and other static features of the next group, MACs reduced so far, MACs of
        the layers that later groups or none can prune (both as parts of the dense ones), the last executed ratio.
        """
        step, channels = len(chosen), self.cost_model.channels
        counts = np.zeros((3, self.steps))
        counts[:2] = channels
        counts[:2, :step] = chosen
        counts[1, step + 1 :] = 0
        whole, without_later, fixed = self.cost_model.costs(counts)[:, 0] / self.cost_model.dense.macs
        previous = 1 - chosen[-1] / channels[step - 1] if step else 0.0
        features = [target, *self._static[step], 1 - whole, whole - without_later + fixed, previous]
        return np.array(features, dtype=np.float32)

    def keep_count(self, chosen: Sequence[int], target: float, action: float) -> int:
        """Channels of the next group that stay after a prune ratio in [0, 1], clamped and rounded as published."""
        step = len(chosen)
        channels = int(self.cost_model.channels[step])
        candidates = np.arange(channels + 1)  # (K,)
        counts = np.tile(np.concatenate([chosen, self._rest[step:]]), (channels + 1, 1))  # (K, G)
        counts[:, step] = candidates
        macs = self.cost_model.costs(counts)[:, 0]  # (K,) ascending
        most = float(np.interp(target * self.cost_model.dense.macs, macs, candidates))
        ratio = max(action, LEAST_PRUNE_RATIO, 1 - most / channels)
        removed = math.floor(ratio * channels + 1e-9)  # 1 - most / channels may lie a rounding error below a whole one
        return max(channels - removed, int(self.cost_model.min_keep[step]))


class Batch(NamedTuple):
    """Transitions from the replay: (B, O), (B, 1), (B, 1), (B, O), and (B, 1) that is 0 after the last step, else 1."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    goes_on: Tensor


class Replay:
    """The transitions of the last 100 episodes, in order: one's next observation is what was stored after it."""

    def __init__(self, steps: int, features: int, generator: np.random.Generator) -> None:
        self._steps = steps
        self._generator = generator
        self._observations = torch.zeros(REPLAY_EPISODES * steps, features)  # (N, O)
        self._actions = torch.zeros(REPLAY_EPISODES * steps, 1)  # (N, 1)
        self._rewards = torch.zeros(REPLAY_EPISODES * steps, 1)  # (N, 1)
        self._added = 0

    def add(self, observation: np.ndarray, action: float, reward: float) -> None:
        slot = self._added % len(self._rewards)  # slot % steps is its step: N is a multiple of an episode's
        self._observations[slot] = torch.from_numpy(observation)
        self._actions[slot], self._rewards[slot] = action, reward
        self._added += 1

    def sample(self) -> Batch:
        """Any but first steps of episodes, and but the newest, whose next observation is not there yet."""
        size = len(self._rewards)
        slots = np.arange(min(self._added, size))
        slots = slots[(slots % self._steps != 0) & (slots != (self._added - 1) % size)]
        drawn = torch.from_numpy(self._generator.choice(slots, BATCH_SIZE))  # (B,)
        return Batch(
            observations=self._observations[drawn],
            actions=self._actions[drawn],
            rewards=self._rewards[drawn],
            next_observations=self._observations[(drawn + 1) % size],
            goes_on=(drawn % self._steps != self._steps - 1).float()[:, None],
        )


class Critic(nn.Module):
    """Value of an action. It has an input layer of its own: its weights begin up to 1, the observation's up to 0.27."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.observation = nn.Linear(features, HIDDEN)
        self.action = nn.Linear(1, HIDDEN)
        self.hidden = nn.Sequential(nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """(B, O), (B, 1) -> (B, 1)."""
        return self.hidden(self.observation(observations) + self.action(actions))


class PublishedDDPG:
    """AMC's DDPG (Lillicrap et al., 2016): bootstrapped, with target networks, and one baseline for all rewards."""

    def __init__(self, features: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hidden = (nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
            self.actor = nn.Sequential(*hidden, nn.Linear(HIDDEN, 1), nn.Sigmoid())
            self.critic = Critic(features)
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), ACTOR_LEARNING_RATE, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), CRITIC_LEARNING_RATE, fused=True)
        self.baseline: float | None = None

    def act(self, observation: np.ndarray) -> float:
        """Prune ratio in [0, 1] for an observation (O,)."""
        with torch.inference_mode():
            return float(self.actor(torch.from_numpy(observation)))

    def update(self, batch: Batch) -> None:
        # baseline
        mean = float(batch.rewards.mean())
        before = mean if self.baseline is None else self.baseline
        self.baseline = before + BASELINE_RATE * (mean - before)

        # critic
        with torch.no_grad():
            next_values = self.target_critic(batch.next_observations, self.target_actor(batch.next_observations))
            wanted = batch.rewards - self.baseline + batch.goes_on * next_values  # (B, 1)
        critic_loss = F.mse_loss(self.critic(batch.observations, batch.actions), wanted)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        # actor
        actor_loss = -self.critic(batch.observations, self.actor(batch.observations)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))
        self.actor_optimizer.step()

        # polyak
        with torch.no_grad():
            for target, source in ((self.target_actor, self.actor), (self.target_critic, self.critic)):
                for old, new in zip(target.parameters(), source.parameters(), strict=True):
                    old.lerp_(new, TAU)


def published_search(
    groups: ChannelGroups, score: Callable[[tuple[int, ...]], float], targets: Sequence[float], episodes: int, seed: int
) -> list[PublishedEpisode]:
    """Search policies for all targets with one agent; the targets take turns.

    Args:
        groups: of the model; at least two must be prunable (the first one's transitions teach nothing).
        score: keep counts of the prunable groups, in forward order -> reward, top-1 in [0, 1].
        targets: MACs targets in (0, 1].
        episodes: of all targets together, the random ones included.
        seed: of weights, exploration and replay.

    Returns:
        All episodes in order. A policy may cost slightly more MACs than its target.

    Raises:
        UserError: for a target outside (0, 1] or one that no policy can meet.
    """
    layers = PruningSteps(groups)
    for target in targets:
        check_reachable(layers.cost_model, Budget({"macs": target}))
    explore, sampling = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    features = len(layers.observe((), targets[0]))
    agent, replay = PublishedDDPG(features, seed), Replay(layers.steps, features, sampling)
    warmup = max(1, episodes // WARMUP_PART)
    played: list[PublishedEpisode] = []
    for episode in range(episodes):
        target = targets[episode % len(targets)]
        counts, observations, actions = list[int](), list[np.ndarray](), list[float]()
        while len(counts) < layers.steps:
            observations.append(layers.observe(counts, target))
            if episode < warmup:
                actions.append(float(explore.uniform()))
            else:
                sigma = SIGMA * SIGMA_DECAY ** (episode - warmup)
                actions.append(float(truncated_normal(agent.act(observations[-1]), sigma, 0.0, 1.0, explore)))
            counts.append(layers.keep_count(counts, target, actions[-1]))
        value = score(tuple(counts))
        for observation, action in zip(observations, actions, strict=True):
            replay.add(observation, action, value)
            if episode >= warmup:
                agent.update(replay.sample())
        played.append(PublishedEpisode(target, tuple(counts), value))
    return played
