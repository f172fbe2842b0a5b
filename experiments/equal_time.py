"""How long trainings take, so that two kinds of them get equal time."""
import statistics

from experiments.common import train_once
from experiments.report import read_table

TURNS = 3


def seconds_of(paths):
    """The seconds of training these checkpoints, their median."""
    logs = [read_table(path.parent / "log.csv") for path in paths]
    return statistics.median(float(log[-1]["seconds"]) for log in logs)


def steps_in_that_time(setup, flags, other_flags, timed_steps):
    """Steps with `other_flags` that take as long as the setup's with `flags`.

    From short runs of both, in turns.
    """
    timed = setup._replace(steps=timed_steps)
    pairs = []
    for k in range(TURNS):
        one = train_once(timed, f"{setup.stem}-timed-one-{k}", f"{flags} --seed {k}")
        other = train_once(timed, f"{setup.stem}-timed-other-{k}", f"{other_flags} --seed {k}")
        pairs.append((seconds_of([one]), seconds_of([other])))
    return in_that_time(setup.steps, pairs)


def in_that_time(steps, pairs):
    """As many steps of the other kind as take the time of `steps` of one, at least 1.

    pairs: seconds of one and of the other for equal steps; the median of their ratios counts.
    """
    ratio = statistics.median(one / max(0.001, other) for one, other in pairs)
    return max(1, round(steps * ratio))
