"""How far the clocks of the processes' hosts are apart."""

import time
from collections.abc import Sequence

from slm_jax.multihost.examination import Examination, Verdict

# What is left of one meeting to another; the closest counts.
_MEETINGS = 3
MOST_SECONDS = 1.0


def examine_clocks(examination: Examination) -> None:
    """Goes through the phase `clocks`: all processes look at their clocks when they have met."""

    def look() -> list[float]:
        times = []
        for _ in range(_MEETINGS):
            examination.meet()
            times.append(time.time())
        return times

    examination.examine("clocks", look, lambda times: judge(examination, times))


def judge(examination: Examination, times: Sequence[Sequence[float]]) -> Verdict:
    """Compares the clocks with that of process 0.

    Args:
      examination: whose processes they are.
      times: of each process at each meeting, in seconds.
    """
    ahead = [min((mine - first for mine, first in zip(own, times[0], strict=True)), key=abs) for own in times]
    off = [index for index, seconds in enumerate(ahead) if abs(seconds) > MOST_SECONDS]
    if not off:
        return Verdict(f"at most {max(map(abs, ahead)):.2f} s from that of process 0")
    worst = max(off, key=lambda index: abs(ahead[index]))
    most = f", {examination.name(worst)} most" if len(off) > 1 else ""
    apart = f"{abs(ahead[worst]):.1f} s {'ahead of' if ahead[worst] > 0 else 'behind'}"
    sentence = f"the clock of {examination.names(off)} is {apart} that of {examination.name(0)}{most}"
    return Verdict("", [f"{sentence}; expected at most {MOST_SECONDS:.0f} s (is NTP running?)"])
