"""CACP's agent: one DDPG whose actor and critic see the target, so that one search serves every budget; it plans every
episode before it plays it.

Liu, Guo et al., "Conditional Automated Channel Pruning for Deep Neural Networks", IEEE SPL 2020, after AMC (He et al.,
ECCV 2018); built on Stable-Baselines3's DDPG (Lillicrap et al., 2016). It knows nothing of networks or pruning: see
`agents.searcher` for what it expects of an environment, and `agents.planner.Rehearsal` for the rules it plans with.

An episode of warm-up: the even share where the target is new, else at random. After it the policy of which the
planner's model of returns promises most, made from the best so far or from the actor's roll-out. Then the noisy actor
is rolled out at other targets, without playing; what the model expects of these imagined episodes is learned from like
the return of a real one (Dyna; Sutton, 1991).

Differences from the paper: old value -> new value -> why. The figures are regrets (1 - value) on toy problems, see
results/LOG.md.

- actions of an episode: the actor's, with noise -> planned -> results/LOG.md, "A conditional agent that earns its
  place": on an emulator, 20 episodes a target find what 100 found.
- critic target: reward copied to every step, plus the target critic's next value -> the episode's return at every step,
  no bootstrapping, so no target networks and no tau -> a step's observation does not tell the earlier actions, so their
  effect cannot travel back through next values; 0.108 -> 0.063 (reward at the last step only: 0.591).
- episodes to learn from: those played -> four imagined ones for each -> planned ones lie near each other: regrets of
  the actor alone with three seeds 0.01, 0.34, 0.03 -> 0.05, 0.05, 0.02.
- baseline: one moving average of all rewards, subtracted -> one a target, and division by its moving standard deviation
  -> rewards of good and bad policies of one target differ by far less than those of two targets.
- noise: sigma 0.5 * 0.95^episode, to 0 -> 0.4 * 0.99^episode, at least 0.05 -> 0.5 leaves the last stage of ResNet-56
  0.2 behind the first in keep ratio.
- network inputs: in [0, 1] -> in [-2, 2] -> targets 0.3 and 0.5 lie near each other: 0.067 -> 0.025 with 6 steps.
- actor's learning rate: 1e-4 -> 3e-4 -> with inputs so spread 0.076 -> 0.067.
- actor's output: sigmoid -> tanh -> the action space is [-1, 1].
- warm-up: 100 of 900 episodes -> 15 -> the planner needs no more.

Logged: agent/expected_return and agent/expected_deviation (what the model promised of the episode, and how sure it
was), agent/noise (sigma of imagined episodes), agent/actor_loss (minus the critic's value of the actor's actions, in
standard deviations of the target's rewards), agent/critic_loss (mean squared error, in the same unit squared).

Shapes: B transitions of a batch, G steps of an episode, O observation entries.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from stable_baselines3 import DDPG
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import FlattenExtractor

from agents.noise import NoiseSchedule, truncated_normal
from agents.planner import Plan, Planner, Rehearsal
from agents.replay import EpisodeReplay, TargetBaseline
from agents.searcher import EpisodeEnd, check_spaces
from cacp.checkpoint import pack, unpack
from cacp.schema import UserError, listed

WARMUP_EPISODES = 15  # random
NEW_TARGET = 0.05  # a target that differs by more from all before begins with the even share
IMAGINED_EPISODES = 4  # that the networks learn from beside every real one
REPLAY_EPISODES = 100  # real and imagined
ACTOR_LEARNING_RATE, CRITIC_LEARNING_RATE = 3e-4, 1e-3
BATCH_SIZE = 64  # transitions of an update


class Losses(NamedTuple):
    """Means over the updates that followed an episode; None where there were none."""

    actor: float | None = None
    critic: float | None = None


class Spread(FlattenExtractor):
    """Observations from [0, 1] to [-2, 2]: targets 0.3 and 0.5 are too near for fresh layers to tell apart quickly."""

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """(B, O) -> (B, O)."""
        return 4 * super().forward(observations) - 2


NETWORKS = {"net_arch": [300, 300], "features_extractor_class": Spread, "optimizer_kwargs": {"fused": True}}


class ConditionalDDPG(DDPG):
    """DDPG for episodes with one reward at the end, that plans them; the interface of `agents.Searcher`.

    While an episode after the last one is already reset when `on_episode` runs (SB3's vectorised environments reset at
    once), nothing of it is played or drawn from the agent's generators.

    Args:
        env: action space Box(-1, 1, (1,)), flat observations whose entry 0 is the target, one reward at the end, and
            its rules as `rehearsal`, see `agents.Rehearsal`.
        seed: of initial weights, environment, exploration and replay.
        warmup_episodes: random episodes at the start.

    Raises:
        UserError: for other spaces.
    """

    replay_buffer: EpisodeReplay

    def __init__(
        self,
        env: gymnasium.Env,
        *,
        seed: int = 0,
        warmup_episodes: int = WARMUP_EPISODES,
    ) -> None:
        check_spaces(env)
        self.warmup_episodes = warmup_episodes
        self.noise = NoiseSchedule()
        self.losses = Losses()
        self._targets: list[float] = []  # of all episodes
        self._outcome = _Outcome()
        explore, replay, propose = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3))
        self.generator = explore
        self._rehearsal: Rehearsal = env.get_wrapper_attr("rehearsal")
        self._planner = Planner(self._rehearsal, propose)
        super().__init__(
            "MlpPolicy",
            env,
            learning_rate=ACTOR_LEARNING_RATE,
            buffer_size=REPLAY_EPISODES * self._rehearsal.steps,
            learning_starts=0,  # warm-up is counted in episodes, by `train`
            batch_size=BATCH_SIZE,
            gamma=1.0,
            train_freq=(1, "episode"),
            gradient_steps=-1,  # as many as the episode had transitions
            replay_buffer_class=EpisodeReplay,
            replay_buffer_kwargs={"generator": replay, "baseline": TargetBaseline()},
            policy_kwargs=NETWORKS,
            seed=seed,
            device="cpu",  # small networks, small batches
        )
        for group in self.critic.optimizer.param_groups:
            group["lr"] = CRITIC_LEARNING_RATE
        self.set_logger(Logger(folder=None, output_formats=[]))

    def _setup_model(self) -> None:
        with torch.random.fork_rng():
            super()._setup_model()

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed initial weights and environment; SB3's own version also reseeds Python's and NumPy's global state."""
        assert seed is not None and self.env is not None
        torch.manual_seed(seed)
        self.env.seed(seed)

    @property
    def sigma(self) -> float:
        """Standard deviation of the exploration noise: of the next episode in warm-up, then of imagined ones."""
        return self.noise(self._episode_num - self.warmup_episodes)

    def run(self, episodes: int, on_episode: Callable[[EpisodeEnd], None]) -> None:
        """Play `episodes` more episodes, learn after each, and call `on_episode` after that."""
        for _ in range(episodes):
            self._plan: Plan | None = None
            self._actions: list[float] = []  # of the plan that are left
            self._update_seconds = 0.0
            self.learn(1, callback=self._outcome, log_interval=sys.maxsize, reset_num_timesteps=False)
            plan, outcome = self._plan, self._outcome
            assert plan is not None
            on_episode(
                EpisodeEnd(
                    self._episode_num, outcome.reward, plan.source, *self.losses, outcome.info, self._update_seconds
                )
            )

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._plan is None:
            assert isinstance(self._last_obs, np.ndarray)
            start = time.perf_counter()
            self._plan = self._planned(round(float(self._last_obs[0, 0]), 6))  # float32 0.3 is 0.30000001
            self._actions = self._plan.rehearsed.actions.tolist()
            self._update_seconds += time.perf_counter() - start
        action = np.full((n_envs, 1), self._actions.pop(0), np.float32)
        return action, action

    def _planned(self, target: float) -> Plan:
        """What to play: the even share for a new target, then at random, after warm-up what the planner proposes."""
        new = all(abs(target - other) > NEW_TARGET for other in self._targets)
        self._targets.append(target)
        if self._episode_num >= max(self.warmup_episodes, 1):
            plan = self._planner.propose(target, self._greedy(target))
            self.logger.record("agent/expected_return", plan.expected)
            self.logger.record("agent/expected_deviation", plan.deviation)
            return plan
        if new:
            return Plan(self._rehearsal.roll_out(target, lambda observation: 0.0), "even")
        return Plan(self._rehearsal.roll_out(target, lambda observation: self._noisy(0.0)), "random")

    def plan(self, target: float) -> np.ndarray:
        """Actions (G,) of the policy that promises most at any target, met or not; nothing is played."""
        return self._planner.propose(target, self._greedy(target), curiosity=0.0).rehearsed.actions

    def _greedy(self, target: float) -> np.ndarray:
        """Keep ratios (G,) of the actor's roll-out."""
        return self._rehearsal.roll_out(target, self._act).ratios

    def _act(self, observation: np.ndarray) -> float:
        """The actor's action for an observation (O,)."""
        with torch.inference_mode():
            return float(self.actor(self.replay_buffer.to_torch(observation[None])))

    def _noisy(self, action: float) -> float:
        return float(truncated_normal(action, self.sigma, -1.0, 1.0, self.generator))

    def train(self, gradient_steps: int, batch_size: int = BATCH_SIZE) -> None:
        """Take in the episode, imagine others, and update critic and actor `gradient_steps` times; after warm-up."""
        start = time.perf_counter()
        assert self._plan is not None
        self._planner.remember(self._plan.rehearsed.ratios, self._outcome.reward)
        if self._episode_num >= self.warmup_episodes:
            self._imagine()
            self.update_networks(gradient_steps, batch_size)
        self._update_seconds += time.perf_counter() - start

    def _imagine(self) -> None:
        """Roll the noisy actor out at targets between those met; what it would get is the planner's to say."""
        targets = self.generator.uniform(min(self._targets), max(self._targets), size=IMAGINED_EPISODES)
        episodes = [
            self._rehearsal.roll_out(target, lambda observation: self._noisy(self._act(observation)))
            for target in targets.tolist()
        ]
        returns = self._planner.predict(np.stack([episode.ratios for episode in episodes])).mean
        for episode, value in zip(episodes, returns.tolist(), strict=True):
            self.replay_buffer.add_episode(episode.observations, episode.actions, value)

    def update_networks(self, gradient_steps: int, batch_size: int = BATCH_SIZE) -> None:
        """One step of critic and actor for each of `gradient_steps` batches from the replay."""
        # sample; baseline: returns come as advantages over the target's moving mean, in standard deviations
        drawn = self.replay_buffer.sample(gradient_steps * batch_size)
        losses = torch.zeros(gradient_steps, 2, device=self.device)
        for update, batch in enumerate(zip(*(tensor.split(batch_size) for tensor in drawn), strict=True)):
            observations, actions, advantages = batch

            # critic: regression on the returns, no bootstrapping
            (values,) = self.critic(observations, actions)  # (B, 1)
            critic_loss = F.mse_loss(values, advantages)
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            self.critic.optimizer.step()

            # actor: up the critic's slope
            self.critic.requires_grad_(False)
            actor_loss = -self.critic.q1_forward(observations, self.actor(observations)).mean()
            self.actor.optimizer.zero_grad()
            actor_loss.backward()
            self.actor.optimizer.step()
            self.critic.requires_grad_(True)

            losses[update] = torch.stack([actor_loss.detach(), critic_loss.detach()])

        # log
        self._n_updates += gradient_steps
        self.losses = Losses(*losses.mean(0).tolist())
        self.logger.record("agent/noise", self.sigma)
        self.logger.record("agent/actor_loss", self.losses.actor)
        self.logger.record("agent/critic_loss", self.losses.critic)

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Everything that the next episodes depend on but the environment, as tensors and JSON values (a copy)."""
        value = {
            "policy": self.policy.state_dict(),
            "actor_optimizer": self.actor.optimizer.state_dict(),
            "critic_optimizer": self.critic.optimizer.state_dict(),
            "replay": self.replay_buffer.state(),
            "planner": self._planner.state(),
            "generator": self.generator.bit_generator.state,
            "targets": self._targets,
            "episodes": self._episode_num,
            "timesteps": self.num_timesteps,
            "updates": self._n_updates,
            "losses": list(self.losses),
        }
        return pack(copy.deepcopy(value))

    def load_state(self, tensors: dict[str, torch.Tensor], data: Any) -> None:
        """Take over what `state` returned; the next `run` resets the environment first.

        The environment is seeded with seed + finished episodes: targets drawn from a range go on with new draws.
        """
        state = copy.deepcopy(unpack(tensors, data))  # optimisers would otherwise work on the caller's tensors
        self.policy.load_state_dict(state["policy"])
        self.actor.optimizer.load_state_dict(state["actor_optimizer"])
        self.critic.optimizer.load_state_dict(state["critic_optimizer"])
        self.replay_buffer.load_state(state["replay"])
        self._planner.load_state(state["planner"])
        self.generator.bit_generator.state = state["generator"]
        self._targets = list(state["targets"])
        self._episode_num = int(state["episodes"])
        self.num_timesteps = int(state["timesteps"])
        self._n_updates = int(state["updates"])
        self.losses = Losses(*state["losses"])
        self._last_obs = None
        assert self.env is not None and self.seed is not None
        self.env.seed(self.seed + self._episode_num)

    def policy_state(self) -> dict[str, torch.Tensor]:
        """What `plan` needs, copied: the actor, and what the planner knows."""
        actor = {f"actor.{name}": tensor.detach().clone() for name, tensor in self.actor.state_dict().items()}
        return {**actor, **{f"planner.{name}": tensor.clone() for name, tensor in self._planner.knowledge().items()}}

    def load_policy_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `policy_state` returned.

        Raises:
            UserError: for other tensors.
        """
        expected = self.policy_state()
        wrong = sorted(expected.keys() ^ tensors.keys()) or [
            name for name, tensor in expected.items() if not _is_like(tensors[name], tensor, name)
        ]
        if wrong or len(tensors["planner.ratios"]) != len(tensors["planner.returns"]):
            raise UserError(
                f"an agent to ask must hold {', '.join(sorted(expected))}, finite and of this network's shapes, but "
                f"differs in {listed(wrong, ', ') or 'the number of episodes'}; another version or network saved it: "
                "search again"
            )
        parts: dict[str, dict[str, torch.Tensor]] = {"actor": {}, "planner": {}}
        for name, tensor in tensors.items():
            part, _, own = name.partition(".")
            parts[part][own] = tensor
        self.actor.load_state_dict(parts["actor"])
        self._planner.load_knowledge(parts["planner"])


def _is_like(tensor: torch.Tensor, own: torch.Tensor, name: str) -> bool:
    """Whether a tensor from a file can stand for an own one; there may be any number of episodes."""
    if tensor.dtype != own.dtype or tensor.dim() != own.dim() or not torch.isfinite(tensor).all():
        return False
    first = 1 if name in ("planner.ratios", "planner.returns") else 0
    return tensor.shape[first:] == own.shape[first:]


class _Outcome(BaseCallback):
    """Return and last info of an episode that `learn` plays."""

    def _on_training_start(self) -> None:
        self.reward = 0.0
        self.info: dict[str, Any] = {}

    def _on_step(self) -> bool:
        self.reward += float(self.locals["rewards"][0])
        self.info = self.locals["infos"][0]
        return True
