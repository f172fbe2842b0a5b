"""How long trainings take, so that two kinds of them get equal time."""
import statistics

from experiments.common import train_once
from experiments.report import read_table

TURNS = 3


def seconds_of(paths):
    """The seconds of training these checkpoints, their median."""
    logs = [read_table(path.parent / "log.csv") for path in paths]
    return statistics.median(float(log[-1]["seconds"]) for log in logs)


def steps_in_that_time(setup, line, other, short):
    """Steps with the flags `other` that take as long as the setup's with `line`.

    By the median of three ratios, from runs of `short` steps of both in turns.
    """
    timed = setup._replace(steps=short)
    ratios = []
    for k in range(TURNS):
        one = train_once(timed, f"{setup.stem}-timed-one-{k}", f"{line} --seed {k}")
        two = train_once(timed, f"{setup.stem}-timed-other-{k}", f"{other} --seed {k}")
        ratios.append(seconds_of([one]) / max(0.001, seconds_of([two])))
    return max(1, round(setup.steps * statistics.median(ratios)))
