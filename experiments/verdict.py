"""When do two cases count as told apart? Values are one for each training, lower is better."""
import math
import statistics

TOLD = 2  # standard errors of the difference


def decide(ours, other, paired=False):
    """Whether `ours` are lower than `other`, in words.

    paired: the k-th values are of the same network, so that only their differences scatter.
    """
    if not ours or not other:
        return "nothing was measured"
    count = len(ours)
    if count < 2:
        return "one training decides nothing"
    difference = statistics.mean(other) - statistics.mean(ours)
    if paired:
        scatter = statistics.variance(b - a for a, b in zip(ours, other))
    else:
        scatter = statistics.variance(ours) + statistics.variance(other)
    error = math.sqrt(scatter / count)
    if abs(difference) <= TOLD * error:
        apart = abs(difference) / max(error, 1e-12)
        return f"not told apart: {apart:.1f} standard errors; {needed(difference, scatter)}"
    word = "yes" if difference > 0 else "no, higher"
    if error == 0:
        return word
    return f"{word}: by {abs(difference) / error:.1f} standard errors"


def needed(difference, scatter):
    """How many trainings would tell, if means and scatter stayed as they are."""
    if difference == 0:
        return "they are equal"
    count = TOLD**2 * scatter / difference**2
    return f"{math.ceil(count):,} trainings of each would tell"
