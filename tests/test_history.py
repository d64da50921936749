"""Episodes on file: credit, order, resume, damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from cacp.history import Episode, History, tradeoff
from cacp.schema import Budget, Cost, UserError

DENSE = Cost(1000, 100)
BUDGETS = [Budget({"macs": target}) for target in (0.5, 0.503, 0.7)]


def episode(
    number: int,
    macs: int = 500,
    top1: float = 0.5,
    probability: float = 0.4,
    counts: tuple = (3, 4),
    target: float = 0.5,
) -> Episode:
    return Episode(number, target, top1, top1, 1.0, probability, macs, 50, "best", 0.25, counts)


def numbers(history: History, budget: Budget, most: int = 10) -> list[int]:
    return [episode.episode for episode in history.best(budget, most)]


def test_an_episode_is_credited_to_every_budget_whose_window_it_lies_in(tmp_path: Path) -> None:
    history = History(tmp_path / "episodes.csv", DENSE, BUDGETS)
    for number, macs in enumerate((500, 502, 495, 494, 700, 701), start=1):
        history.append(episode(number, macs, counts=(number,), target=0.9))
    assert set(numbers(history, BUDGETS[0])) == {1, 3}
    assert set(numbers(history, BUDGETS[1])) == {1, 2}
    assert set(numbers(history, BUDGETS[2])) == {5}
    assert set(history.leaders) == {budget.name for budget in BUDGETS}


def test_a_coarse_policy_is_credited_to_the_target_it_was_asked_for_if_it_meets_it(tmp_path: Path) -> None:
    history = History(tmp_path / "episodes.csv", DENSE, BUDGETS)
    for number, macs in enumerate((480, 501, 480), start=1):
        history.append(episode(number, macs, counts=(number,), target=0.7 if number == 3 else 0.5))
    assert numbers(history, BUDGETS[0]) == [1]
    assert numbers(history, BUDGETS[2]) == [3]


def test_a_resumed_history_has_every_digit(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    history = History(path, DENSE, BUDGETS)
    history.append(episode(1, top1=2 / 3, probability=0.6123456789, counts=(1,)))
    assert History(path, DENSE, BUDGETS, finished=1).episodes == history.episodes


def test_best_are_different_policies_by_probability(tmp_path: Path) -> None:
    history = History(tmp_path / "episodes.csv", DENSE, BUDGETS)
    for number, (top1, probability, counts) in enumerate(
        [(0.8, 0.4, (1,)), (0.7, 0.5, (2,)), (0.7, 0.6, (3,)), (0.7, 0.6, (3,)), (0.6, 0.45, (4,))], start=1
    ):
        history.append(episode(number, top1=top1, probability=probability, counts=counts))
    assert numbers(history, BUDGETS[0]) == [3, 2, 5, 1]
    assert numbers(history, BUDGETS[0], most=2) == [3, 2]
    assert history.leaders["macs-0.50"].episode == 3


def test_a_later_episode_leads_only_if_it_is_better(tmp_path: Path) -> None:
    history = History(tmp_path / "episodes.csv", DENSE, BUDGETS)
    history.append(episode(1, top1=0.6, counts=(1,)))
    history.append(episode(2, top1=0.6, counts=(2,)))
    assert history.leaders["macs-0.50"].episode == 1
    history.append(episode(3, top1=0.6, probability=0.5, counts=(3,)))
    assert history.leaders["macs-0.50"].episode == 3


def test_resume_cuts_the_file_to_the_finished_episodes(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    history = History(path, DENSE, BUDGETS)
    for number in range(1, 6):
        history.append(episode(number, top1=number / 10, probability=number / 16, counts=(number, 7)))
    resumed = History(path, DENSE, BUDGETS, finished=3)
    assert resumed.episodes == history.episodes[:3]
    assert numbers(resumed, BUDGETS[0]) == [3, 2, 1]
    assert resumed.leaders["macs-0.50"].episode == 3
    lines = path.read_text().splitlines()
    assert lines[0] == "episode,target,reward,top1,loss,probability,macs,params,source,seconds,counts"
    assert lines[1:] == [f"{n},0.5,0.{n},0.{n},1.0,{n / 16},500,50,best,0.25,{n}-7" for n in (1, 2, 3)]
    resumed.append(episode(4, top1=0.9))
    assert len(path.read_text().splitlines()) == 5


def test_a_new_search_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    History(path, DENSE, BUDGETS).append(episode(1))
    assert History(path, DENSE, BUDGETS).episodes == []
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda text: text.replace("0.5", "half"), "cannot be read: ValueError"),
        (lambda text: text.replace("macs", "flops"), "cannot be read: KeyError: 'macs'"),
        (lambda text: text[: text.rindex(",")], "cannot be read"),
        (lambda text: text.replace("3-4", "3-4" + "0" * 200_000), "cannot be read: Error: field larger"),
        (lambda text: "", "must hold the 2 episodes of the checkpoint beside it, but holds 0"),
        (lambda text: text.replace("\n2,", "\n3,"), "must hold the 2 episodes"),
        (lambda text: "\n".join(text.splitlines()[:2]), "but holds 1"),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy(tmp_path: Path, damage: object, text: str) -> None:
    path = tmp_path / "episodes.csv"
    history = History(path, DENSE, BUDGETS)
    history.append(episode(1))
    history.append(episode(2))
    path.write_text(damage(path.read_text().replace("\r\n", "\n")))
    with pytest.raises(UserError) as caught:
        History(path, DENSE, BUDGETS, finished=2)
    assert str(caught.value).startswith(str(path))
    assert text in str(caught.value)
    assert "restore it or use another --output" in str(caught.value)


def test_a_digit_that_was_altered_is_noticed_but_the_time_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "episodes.csv"
    history = History(path, DENSE, BUDGETS)
    for number in (1, 2):
        history.append(episode(number))
    checksum = history.checksum
    history.append(episode(3))
    text = path.read_text()
    path.write_text(text.replace("0.25", "7.5"))
    assert History(path, DENSE, BUDGETS, 2, checksum).checksum == checksum
    for one in ("1.0", "500", "best", "3-4"):
        altered = text.replace(one, {"1.0": "1.1", "500": "501", "best": "bert", "3-4": "3-5"}[one], 1)
        path.write_text(altered)
        with pytest.raises(UserError, match=r"episodes\.csv was altered: its first 2 episodes are not those"):
            History(path, DENSE, BUDGETS, 2, checksum)
        assert path.read_text() == altered  # for whoever wants to restore it


@pytest.mark.parametrize("number", ["nan", "-inf", "1e19", "1" + 30 * "0"])
def test_a_number_that_no_episode_has_is_refused(tmp_path: Path, number: str) -> None:
    path = tmp_path / "episodes.csv"
    History(path, DENSE, BUDGETS).append(episode(1))
    path.write_text(path.read_text().replace(",500," if number.isdigit() else ",1.0,", f",{number},"))
    with pytest.raises(UserError, match=r"numbers must be finite and at most 1e\+18"):
        History(path, DENSE, BUDGETS, finished=1)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: FileNotFoundError"):
        History(tmp_path / "episodes.csv", DENSE, BUDGETS, finished=1)


def test_the_tradeoff_holds_what_no_cheaper_policy_beats() -> None:
    points = [(500, 0.6), (400, 0.5), (450, 0.4), (500, 0.7), (700, 0.7), (600, 0.65), (710, 0.8)]
    front = tradeoff(episode(number, macs, probability=one).candidate for number, (macs, one) in enumerate(points, 1))
    assert [one.episode for one in front] == [2, 4, 7]
    assert [(one.score.cost.macs, one.score.probability) for one in front] == [(400, 0.5), (500, 0.7), (710, 0.8)]


def test_the_nearest_budget_of_a_target_from_a_range(tmp_path: Path) -> None:
    history = History(tmp_path / "episodes.csv", DENSE, BUDGETS)
    names = [history.nearest(target).name for target in (0.1, 0.502, 0.59, 0.61, 0.9)]
    assert names == ["macs-0.50", "macs-0.503", "macs-0.503", "macs-0.70", "macs-0.70"]


def test_an_episode_of_a_budget_of_several_costs_is_credited_to_it(tmp_path: Path) -> None:
    budget = Budget({"macs": 0.6, "params": 0.5})
    history = History(tmp_path / "episodes.csv", DENSE, [budget])
    history.append(episode(1, macs=590, counts=(1,), target=budget.mean_target))  # params 0.5 are used up
    history.append(episode(2, macs=601, counts=(2,), target=budget.mean_target))  # too many MACs
    assert numbers(history, budget) == [1]
    assert history.nearest(0.55) == budget


def test_latency_is_a_column_only_where_it_is_known_and_comes_back_to_the_bit(tmp_path: Path) -> None:
    path, latency_ps = tmp_path / "episodes.csv", 1e11 / 3
    dense, budget = DENSE._replace(latency_ps=2 * latency_ps), Budget({"latency": 0.5})
    history = History(path, dense, [budget])
    history.append(episode(1, target=0.5)._replace(latency_ps=latency_ps))
    history.append(episode(2, target=0.5, counts=(4, 4))._replace(latency_ps=latency_ps * 1.01))  # too slow
    assert path.read_text().splitlines()[0].endswith(",counts,latency_ps")
    again = History(path, dense, [budget], finished=2)
    assert again.episodes == history.episodes and numbers(again, budget) == [1]
    History(tmp_path / "without.csv", DENSE, BUDGETS)
    assert (tmp_path / "without.csv").read_text().splitlines()[0].endswith(",seconds,counts")
