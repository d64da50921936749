"""Search pruning policies for all targets in one run, or ask the agent of a finished search for another target.

    python search.py --config configs/digits_resnet56.yaml
    python search.py --ask 0.45 --output runs/digits_resnet56

Writes into the run folder: search/ (episodes.csv, TensorBoard events, checkpoint/, agent/) and policies/NAME.json, the
best policy of every target. Run again, it goes on from the last checkpoint, or says that it is done.
"""

import sys

from agents import ConditionalDDPG, RandomSearch, Searcher
from cacp.budget import BudgetWalk, check_reachable, reachable_fractions, uniform_counts
from cacp.checkpoint import load_state, load_tensors, save_json, save_tensors
from cacp.config import Experiment, experiment_from, parse
from cacp.evaluation import synchroniser
from cacp.history import History, target_budgets
from cacp.importance import channel_orders
from cacp.pipeline import (
    Workbench,
    build_workbench,
    check_run,
    open_run,
    run_command,
    select_device,
)
from cacp.policies import missing_policies, save_policy
from cacp.profiling import Profile
from cacp.records import play
from cacp.reporting import (
    console,
    millions,
    percent,
    show_policies,
    show_profile,
    table,
)
from cacp.reward import top1_reward
from cacp.schema import Budget, Policy, PolicyRecord, Score, UserError
from cacp.slicing import counts_policy
from envs import ChannelPruningEnv, EpisodeResult

REPLAY_EPISODES = 100  # as in the paper
RESCORED = 10  # best policies of a target that are scored again: maxima over noisy scores are biased


def main() -> None:
    namespace = parse("search", "Search pruning policies for all targets in one run.", sys.argv[1:])
    experiment = experiment_from(namespace)
    device = select_device(experiment.device)  # refuse before anything is written
    profile = Profile(synchroniser(device)) if namespace.profile else Profile()
    try:
        with profile.phase("other"):
            if namespace.ask is not None:
                ask(experiment, namespace.ask, profile)
            else:
                run(experiment, profile)
    finally:  # interrupted, too
        if namespace.profile and "preparation" in profile.seconds:  # else all was done before
            if namespace.ask is None:
                save_json(experiment.folder / "search" / "profile.json", profile.seconds)
            show_profile(profile)


def run(experiment: Experiment, profile: Profile) -> None:
    """The whole command, but what is done already."""
    open_run(experiment)
    budgets = target_budgets(experiment.targets)
    names = [budget.name for budget in budgets]
    if missing_policies(experiment.folder, names, method_name(experiment)):
        with profile.phase("preparation"):
            ranked = Ranked(build_workbench(experiment, profile), experiment.criterion)
        search(experiment, ranked, budgets, profile)
    show_policies(experiment.folder, names)


class Ranked:
    """A workbench with the channels of every group ranked: keep counts -> policy -> score."""

    def __init__(self, bench: Workbench, criterion: str) -> None:
        self.bench = bench
        self._criterion = criterion
        self._orders = channel_orders(bench.importance(criterion))

    def policy(self, counts: tuple[int, ...]) -> Policy:
        return counts_policy(self.bench.groups, counts, self._orders, self._criterion)

    def score(self, counts: tuple[int, ...]) -> Score:
        return self.bench.scorer(self.policy(counts))

    def rescore(self, counts: tuple[int, ...]) -> Score:
        return self.bench.rescorer(self.policy(counts))


def search(experiment: Experiment, ranked: Ranked, budgets: list[Budget], profile: Profile) -> None:
    """Play the episodes, then write the best policy of every target."""
    bench, folder = ranked.bench, experiment.folder / "search"
    console.print(f"dense {experiment.model}: {percent(bench.dense.validation_top1)} % top-1 on the validation images")
    show_reachable(bench, budgets)
    env = ChannelPruningEnv(bench.groups, ranked.score, top1_reward, experiment.targets)
    agent = make_agent(experiment, env, len(bench.groups.prunable))
    finished = 0
    saved = load_state(folder / "checkpoint")
    if saved:
        finished = int(saved.data["episode"])
        agent.load_state(saved.tensors, saved.data["agent"])
        env.episodes_started = finished
        console.print(f"going on after episode {finished} of {experiment.episodes}")
    history = History(folder / "episodes.csv", bench.cost_model.dense, budgets, finished)
    with profile.phase("environment and actions"):
        play(folder, experiment.episodes, bench.groups, agent, history, profile)
    with profile.phase("scoring again"):
        save_tensors(folder / "agent" / "networks.safetensors", agent.policy_state())
        for budget in budgets:
            save_policy(experiment.folder, best_record(experiment, ranked, history, budget))


def method_name(experiment: Experiment) -> str:
    return f"search {experiment.agent}"


def make_agent(experiment: Experiment, env: ChannelPruningEnv, groups: int) -> Searcher:
    """The agent of the experiment; an episode has a transition for each of the prunable `groups`."""
    if experiment.agent == "random":
        return RandomSearch(env, seed=experiment.seed)
    return ConditionalDDPG(
        env,
        seed=experiment.seed,
        warmup_episodes=experiment.warmup_episodes,
        replay_transitions=REPLAY_EPISODES * groups,
    )


def best_record(experiment: Experiment, ranked: Ranked, history: History, budget: Budget) -> PolicyRecord:
    """Score the best policies of a target again, on images that did not choose them; the best there wins.

    Raises:
        UserError: if no episode was played for the target.
    """
    candidates = history.best(budget, RESCORED)
    if not candidates:
        raise UserError(
            f"no episode met {budget.name}; {experiment.episodes} episodes are too few for "
            f"{len(experiment.targets)} targets, use --episodes"
        )
    winner = max(candidates, key=lambda row: (ranked.rescore(row.counts).top1, -ranked.rescore(row.counts).loss))
    cost = ranked.bench.cost_model.cost(winner.counts)
    return scored_again(
        experiment, ranked, budget, winner.counts, Score(winner.top1, winner.loss, cost), winner.episode
    )


def scored_again(
    experiment: Experiment, ranked: Ranked, budget: Budget, counts: tuple[int, ...], search_score: Score, episode: int
) -> PolicyRecord:
    """The record of a policy, with its score on the images that did not choose it."""
    return PolicyRecord(
        policy=ranked.policy(counts),
        budget=budget,
        score=ranked.rescore(counts),
        search_score=search_score,
        method=method_name(experiment),
        episode=episode,
        scope=experiment.scope,
    )


def ask(experiment: Experiment, target: float, profile: Profile) -> None:
    """One greedy roll-out of a finished search's agent at any target, scored, as policies/NAME.json.

    A policy that is there already is shown, not replaced.

    Raises:
        UserError: if the search is not finished, or the target cannot be met.
    """
    if experiment.agent == "random":
        raise UserError(
            f"{experiment.folder} was searched at random: there is no agent to ask; use a run of --agent cacp"
        )
    check_run(experiment)
    budget = Budget({"macs": target})
    networks = experiment.folder / "search" / "agent" / "networks.safetensors"
    if not networks.is_file():
        raise UserError(f"{experiment.folder} holds no finished search; run search.py on it first")
    if missing_policies(experiment.folder, [budget.name], method_name(experiment)):
        with profile.phase("preparation"):
            ranked = Ranked(build_workbench(experiment, profile), experiment.criterion)
        env = ChannelPruningEnv(ranked.bench.groups, ranked.score, top1_reward, [target])
        agent = make_agent(experiment, env, len(ranked.bench.groups.prunable))
        agent.load_policy_state(load_tensors(networks))
        observation, info = env.reset()
        while "result" not in info:
            observation, _, _, _, info = env.step(agent.act(observation))
        result: EpisodeResult = info["result"]
        record = scored_again(experiment, ranked, budget, result.counts, result.score, episode=0)
        save_policy(experiment.folder, record)
    show_policies(experiment.folder, [budget.name])


def show_reachable(bench: Workbench, budgets: list[Budget]) -> None:
    """A table of what can be reached, before the first episode; a budget that can't be is refused."""
    for budget in budgets:
        check_reachable(bench.cost_model, budget)
    for name in bench.groups.unknown:
        console.print(f"not known to trace, kept whole: {name}")
    dense, least = bench.cost_model.dense, reachable_fractions(bench.cost_model)
    rows = [
        [
            budget.name,
            millions(int(budget.targets["macs"] * dense.macs)),
            f"{BudgetWalk(bench.cost_model, budget).even_ratio():.3f}",
            millions(bench.cost_model.cost(uniform_counts(bench.cost_model, budget)).macs),
        ]
        for budget in budgets
    ]
    title = (
        f"{len(bench.groups.prunable)} prunable groups; dense {millions(dense.macs)} MACs, {millions(dense.params)} "
        f"parameters; reachable: macs {least['macs']:.3f} to 1"
    )
    console.print(table(title, ["budget", "MACs at most", "uniform keep ratio", "uniform MACs"], rows))


if __name__ == "__main__":
    run_command(main)
