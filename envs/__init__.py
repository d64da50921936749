"""The gymnasium environment of channel pruning, registered as ChannelPruning-v0."""

import gymnasium

from envs.channel_pruning_env import ChannelPruningEnv, EpisodeResult, TargetRange

gymnasium.register(id="ChannelPruning-v0", entry_point="envs.channel_pruning_env:ChannelPruningEnv")

__all__ = ["ChannelPruningEnv", "EpisodeResult", "TargetRange"]
