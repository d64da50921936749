"""Seconds of phases, by a clock that is turned by hand."""

from __future__ import annotations

import pytest

from cacp.profiling import Profile


class Clock:
    """Stands still but for `pass_`."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def profile(clock: Clock) -> Profile:
    return Profile(clock=clock)


def test_a_second_counts_for_the_innermost_phase(profile: Profile, clock: Clock) -> None:
    with profile.phase("search"):
        clock.pass_(1)
        for _ in range(2):
            with profile.phase("scoring"):
                clock.pass_(2)
                with profile.phase("slicing"):
                    clock.pass_(4)
                clock.pass_(8)
        clock.pass_(16)
    clock.pass_(32)  # between phases
    with profile.phase("scoring"):
        clock.pass_(64)
    assert profile.seconds == {"search": 1 + 16, "scoring": 2 * (2 + 8) + 64, "slicing": 2 * 4}


def test_a_phase_inside_of_itself_counts_once(profile: Profile, clock: Clock) -> None:
    with profile.phase("scoring"):
        clock.pass_(1)
        with profile.phase("scoring"):
            clock.pass_(2)
        clock.pass_(4)
    assert profile.seconds == {"scoring": 7}


def test_phases_stand_in_the_order_they_open(profile: Profile) -> None:
    with profile.phase("search"), profile.phase("scoring"):
        assert profile.seconds == {"search": 0, "scoring": 0}
    assert list(profile.seconds) == ["search", "scoring"]


def test_an_exception_ends_its_phases_and_goes_on(profile: Profile, clock: Clock) -> None:
    with pytest.raises(ValueError, match="inner"), profile.phase("search"):
        clock.pass_(1)
        with profile.phase("scoring"):
            clock.pass_(2)
            raise ValueError("inner")
    assert profile.seconds == {"search": 1, "scoring": 2}
    with profile.phase("search"):
        clock.pass_(4)
        with pytest.raises(KeyError), profile.phase("scoring"):
            clock.pass_(8)
            raise KeyError
        clock.pass_(16)
    assert profile.seconds == {"search": 1 + 4 + 16, "scoring": 2 + 8}


def test_moved_seconds_are_the_open_phases(profile: Profile, clock: Clock) -> None:
    with profile.phase("search"):
        clock.pass_(1)
        with profile.phase("scoring"):
            clock.pass_(16)
            profile.move("compiling", 3)
            profile.move("compiling", 2)
        with profile.phase("scoring"):
            clock.pass_(32)
            profile.move("search", 4)
    assert profile.seconds == {"search": 1 + 4, "scoring": 16 + 32 - 3 - 2 - 4, "compiling": 3 + 2}


def test_the_device_is_waited_for_before_every_look_at_the_clock(clock: Clock) -> None:
    events: list[str] = []

    def look() -> float:
        events.append("look")
        return clock()

    def wait() -> None:
        events.append("wait")
        clock.pass_(8)  # what the device still had to do

    profile = Profile(wait, look)
    with profile.phase("search"):
        events.append("enter")
        with profile.phase("scoring"):
            clock.pass_(1)
    assert events == ["wait", "look", "enter"] + 3 * ["wait", "look"]
    assert profile.seconds == {"search": 8 + 8, "scoring": 1 + 8}


def test_without_a_clock_seconds_pass() -> None:
    profile = Profile()
    with profile.phase("search"):
        sum(range(1000))
    assert profile.seconds["search"] > 0
