"""When do two cases count as told apart? Their values are one for each training."""
import math
import statistics

TOLD = 2  # standard errors of the difference


def decide(ours, other, paired=False, repeats="trainings"):
    """Whether `ours` are lower than `other`, in words.

    paired: the k-th values are of the same network, so that only their differences scatter.
    repeats: what a value is one of. Of three equal trainings each, one pair in nine is told
    apart by chance; of pairs, one in five. ValueError for lists of unequal length.
    """
    differences = [b - a for a, b in zip(ours, other, strict=True)]
    count = len(differences)
    if count == 0:
        return "nothing was measured"
    if count == 1:
        return f"one of the {repeats} decides nothing"
    difference = statistics.mean(differences)
    if difference == 0:
        return "no difference"
    scatter = statistics.variance(ours) + statistics.variance(other)
    if paired:
        scatter = statistics.variance(differences)
    if scatter < (1e-9 * difference) ** 2:  # rounding at most
        return f"the {repeats} do not scatter, so nothing says what chance does"
    apart = abs(difference) / math.sqrt(scatter / count)
    if apart <= TOLD:
        enough = math.floor(TOLD**2 * scatter / difference**2) + 1
        words = f"not told apart: {apart:.1f} standard errors"
        return f"{words}; {enough:,} {repeats} would tell, if they differ by as much"
    word = "yes" if difference > 0 else "no, higher"
    return f"{word}: by {apart:.1f} standard errors"


def repeats_of(checkpoint):
    """What values are one of: draws, where a checkpoint is given, and so of this one alone."""
    return "trainings" if checkpoint is None else "draws of what was given"
