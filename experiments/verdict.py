"""When do two cases count as told apart? Their values are one for each training."""
import math
import statistics

TOLD = 2  # standard errors of the difference


def decide(ours, other, paired=False, repeats="trainings"):
    """Whether `ours` are lower than `other`, in words.

    paired: the k-th values are of the same network, so that only their differences scatter.
    repeats: what a value is one of. Of three equal trainings each, one pair in eight is told
    apart by chance; of pairs, one in five. ValueError for lists of unequal length.
    """
    if not ours or not other:
        return "nothing was measured"
    count = len(ours)
    if count < 2:
        return f"one of the {repeats} decides nothing"
    differences = [b - a for a, b in zip(ours, other, strict=True)]
    difference = statistics.mean(differences)
    scatter = statistics.variance(ours) + statistics.variance(other)
    if paired:
        scatter = statistics.variance(differences)
    if difference == 0 or scatter == 0:
        return f"the {repeats} do not differ"
    apart = abs(difference) / math.sqrt(scatter / count)
    if apart <= TOLD:
        enough = math.floor(TOLD**2 * scatter / difference**2) + 1
        return f"not told apart: {apart:.1f} standard errors; {enough:,} {repeats} would tell"
    word = "yes" if difference > 0 else "no, higher"
    return f"{word}: by {apart:.1f} standard errors"


def repeats_of(checkpoint):
    """What values are one of: draws, where a checkpoint is given, and so of this one alone."""
    return "trainings" if checkpoint is None else "draws of what was given"
