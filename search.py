"""Search pruning policies for all targets in one run, or ask the agent of a finished search for another target.

    python search.py --config configs/digits_resnet56.yaml
    python search.py --ask 0.45 --output runs/digits_resnet56

Writes into the run folder: search/ (episodes.csv, TensorBoard events, checkpoint/, agent/) and policies/NAME.json, the
best policy of every target. Run again, it goes on from the last checkpoint, or says that it is done.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from agents import ConditionalDDPG, Searcher, make_agent
from cacp.checkpoint import load_tensors, save_json, save_tensors
from cacp.command import run_command
from cacp.config import experiment_from, parse
from cacp.evaluation import synchroniser
from cacp.experiment import Experiment
from cacp.history import Candidate, History
from cacp.locking import only_writer
from cacp.pipeline import Ranked, build_workbench, check_run, open_run, select_device
from cacp.policies import load_policies, missing_policies, save_policy
from cacp.profiling import Profile
from cacp.records import play, resume, write_tradeoff
from cacp.reporting import (
    console,
    show_dense,
    show_policies,
    show_profile,
    show_reachable,
)
from cacp.reward import log_odds_reward
from cacp.schema import Budget, Cost, PolicyRecord, UserError
from envs import ChannelPruningEnv, EpisodeResult, TargetRange

RESCORED = 10  # best policies of a target that are scored again: maxima over noisy scores are biased


def main() -> None:
    namespace = parse("search", __doc__, sys.argv[1:])
    experiment = experiment_from(namespace)
    if experiment.quantiles:
        raise UserError(
            "quantiles are for prune.py --method gfi_ap; give search.py --targets, or --macs, --params and --latency"
        )
    if namespace.ask is None and experiment.agent == "cacp" and experiment.warmup_episodes >= experiment.episodes:
        raise UserError(
            f"warmup_episodes must be below episodes ({experiment.episodes}), so that the agent acts, "
            f"but got {experiment.warmup_episodes}; lower it, or use --agent random"
        )
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
    budgets = experiment.budgets
    names = [budget.name for budget in budgets]
    with open_run(experiment):
        if missing_policies(experiment.folder, names, method_name(experiment)):
            with profile.phase("preparation"):
                ranked = Ranked(build_workbench(experiment, profile), experiment.criterion)
            search(experiment, ranked, budgets, profile)
    show_policies(experiment.folder, names)


def search(experiment: Experiment, ranked: Ranked, budgets: list[Budget], profile: Profile) -> None:
    """Play the episodes, then write the best policy of every target."""
    bench, folder = ranked.bench, experiment.folder / "search"
    show_dense(experiment.model, bench.dense.validation_top1, bench.dense.validation_unseen)
    show_reachable(bench.groups, bench.cost_model, budgets)
    env = ChannelPruningEnv(bench.groups, ranked.score, log_odds_reward, env_targets(experiment))
    targets = [budget.mean_target for budget in budgets]
    agent = make_agent(experiment.agent, env, targets, experiment.seed, experiment.warmup_episodes)
    finished = resume(folder, agent, experiment.episodes)
    env.episodes_started = finished.episodes
    history = History(folder / "episodes.csv", bench.cost_model.dense, budgets, *finished)
    ranked.recall(history.episodes, folder / "episodes.csv")
    with profile.phase("environment and actions"):
        play(folder, experiment.episodes, bench.groups, agent, history, profile, experiment.search_settings)
    with profile.phase("scoring again"):
        if isinstance(agent, ConditionalDDPG):
            save_tensors(networks_path(experiment.folder), agent.policy_state())
        found = [candidates_of(experiment, history, budget, env, agent) for budget in budgets]
        planned = [one for candidates in found for one in candidates if not one.episode]
        write_tradeoff(experiment.folder, history, planned, bench.cost_model.dense)
        for budget, candidates in zip(budgets, found, strict=True):
            save_policy(experiment.folder, best_record(experiment, ranked, budget, candidates))


def env_targets(experiment: Experiment) -> list[float] | TargetRange | Budget:
    """What the episodes of a search are played for."""
    if experiment.target_range:
        return TargetRange(*experiment.target_range)
    return [budget.mean_target for budget in experiment.budgets] if experiment.targets else experiment.budgets[0]


def networks_path(folder: Path) -> Path:
    """Where a finished search by --agent cacp leaves what can be asked."""
    return folder / "search" / "agent" / "networks.safetensors"


def method_name(experiment: Experiment) -> str:
    return f"search {experiment.agent}"


def candidates_of(
    experiment: Experiment, history: History, budget: Budget, env: ChannelPruningEnv, agent: Searcher
) -> list[Candidate]:
    """The best policies that met a target; few do where targets come from a range: there one more is planned.

    Raises:
        UserError: if there are none.
    """
    found = [episode.candidate for episode in history.best(budget, RESCORED)]
    if experiment.target_range and isinstance(agent, ConditionalDDPG):
        found.append(planned_policy(env, agent, budget.mean_target))
    if not found:
        raise UserError(
            f"no episode met {budget.name}; {experiment.episodes} episodes are too few for "
            f"{len(experiment.budgets)} targets, use --episodes"
        )
    return found


def planned_policy(env: ChannelPruningEnv, agent: ConditionalDDPG, target: float) -> Candidate:
    """The policy that the agent promises most of at a target, scored."""
    env.reset(options={"target": target})
    for action in agent.plan(target):
        *_, info = env.step(action)
    result: EpisodeResult = info["result"]
    return Candidate(result.counts, result.score, 0)


def best_record(
    experiment: Experiment, ranked: Ranked, budget: Budget, candidates: Sequence[Candidate]
) -> PolicyRecord:
    """Score the candidates of a target again, on images that did not choose them; the best there wins."""
    winner = max(candidates, key=lambda candidate: ranked.rescore(candidate.counts).probability)
    return PolicyRecord(
        policy=ranked.policy(winner.counts),
        budget=budget,
        score=ranked.rescore(winner.counts),
        search_score=winner.score,
        method=method_name(experiment),
        episode=winner.episode,
        scope=experiment.pruned_scope,
    )


def ask(experiment: Experiment, target: float, profile: Profile) -> None:
    """The policy that a finished search's agent promises most of at any target, scored, as policies/NAME.json.

    A policy that is there already is shown, not replaced.

    Raises:
        UserError: if there is no finished search of such an agent, or the target cannot be met.
    """
    if not networks_path(experiment.folder).is_file():
        raise UserError(
            f"{experiment.folder} holds no finished search by --agent cacp, which alone can be asked; "
            "run search.py on it first, or name another --output"
        )
    check_run(experiment)
    if not experiment.targets:
        raise UserError(
            f"{experiment.folder} was searched for {experiment.budgets[0].name} alone; search --targets to ask"
        )
    budget = Budget({"macs": target})
    if missing_policies(experiment.folder, [budget.name], method_name(experiment)):
        with only_writer(experiment.folder):
            answer(experiment, budget, profile)
    show_policies(experiment.folder, [budget.name])


def answer(experiment: Experiment, budget: Budget, profile: Profile) -> None:
    """Plan and score a policy for a budget of MACs, and write it."""
    target = budget.mean_target
    with profile.phase("preparation"):
        ranked = Ranked(build_workbench(experiment, profile), experiment.criterion)
    dense, episodes = ranked.bench.cost_model.dense, experiment.folder / "search" / "episodes.csv"
    history = History(episodes, dense, [], experiment.episodes)
    ranked.recall(history.episodes, episodes)
    env = ChannelPruningEnv(ranked.bench.groups, ranked.score, log_odds_reward, [target])
    agent = ConditionalDDPG(env, seed=experiment.seed)
    agent.load_policy_state(load_tensors(networks_path(experiment.folder)))
    record = best_record(experiment, ranked, budget, [planned_policy(env, agent, target)])
    planned = [
        Candidate(tuple(one.policy.counts.values()), one.search_score, 0)
        for one in (*load_policies(experiment.folder), record)
        if not one.episode
    ]
    show_doubts(experiment, record, write_tradeoff(experiment.folder, history, planned, dense), dense)
    save_policy(experiment.folder, record)


def show_doubts(experiment: Experiment, record: PolicyRecord, front: Sequence[Candidate], dense: Cost) -> None:
    """Say where an asked target lies outside the trained ones, or a policy of the curve is better and no dearer."""
    trained = [budget.mean_target for budget in experiment.budgets]
    if not min(trained) <= record.budget.mean_target <= max(trained):
        console.print(
            f"note: {record.budget.name} lies outside the targets that the search was trained for, {min(trained)} to "
            f"{max(trained)}; a search of its own may find better"
        )
    best = [one for one in front if one.score.cost.macs <= record.score.cost.macs][-1]
    if best.score.probability > record.search_score.probability:
        which = f"episode {best.episode}" if best.episode else "another planned policy"
        console.print(
            f"note: {which} scored higher with less, macs {best.score.cost.macs / dense.macs:.3f}: see "
            f"{experiment.folder / 'search' / 'tradeoff.csv'}"
        )


if __name__ == "__main__":
    run_command(main)
