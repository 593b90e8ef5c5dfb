"""What stands at the top: is it better, by how much, how sure, and what happens next."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stages.data.paired import Paired, compare
from stages.decisions import refusals_before
from stages.ending import read_ending
from stages.errors import SpinError
from stages.reporting.collect import IterationView, RunView, measured_on_examples

FALLBACKS = ("sampled_accuracy", "greedy_accuracy", "human_logprob_per_token")
"""What is compared where the metric of promote says nothing of the start: the first there is."""


@dataclass(frozen=True)
class Gain:
    """How much more of a metric one model has than another.

    All numbers are of the same examples wherever these are known.
    """

    metric: str
    value: float
    start_value: float
    difference: float
    own: tuple[float, float]
    """Both values, each over all examples that the model has one for, as other tables tell them."""
    paired: Paired | None
    """Example by example; None where the two were not asked alike, or the examples are gone."""

    @property
    def verdict(self) -> str:
        """One of better, worse and unclear; where no interval is known, unsure."""
        if self.paired is None:
            return "unsure"
        low, high = self.paired.low, self.paired.high
        if low is None or high is None:
            return "unclear"
        return "better" if low > 0 else "worse" if high < 0 else "unclear"


@dataclass(frozen=True)
class Headline:
    """The answer to the first question."""

    tone: str
    """good, bad or plain."""
    title: str
    text: str
    gain: Gain | None
    last: IterationView | None
    """The last iteration that was decided."""
    following: tuple[str, ...]
    """What happens next, one sentence each."""


def headline(view: RunView) -> Headline:
    """Return what to say first of a run."""
    champion = view.champion_iteration()
    shown = champion or _last_evaluated(view)
    gain = _gain(view, shown) if shown and view.champion_problem is None else None
    tone, title, text = _words(view, champion, shown, gain)
    decided = [each for each in view.iterations if each.decision is not None]
    following = tuple(_following(view))
    return Headline(tone, title, text, gain, decided[-1] if decided else None, following)


def main_metric(view: RunView, shown: IterationView | None = None) -> str:
    """Return the metric that a run is told by: that of promote, where the start has it too."""
    wanted = view.config.promote.metric if view.config else FALLBACKS[0]
    known = [
        name
        for name in _candidates(view)
        if view.measured_at_start(name)[0] is not None
        and (shown is None or shown.measured(name)[0] is not None)
    ]
    return known[0] if known else wanted


def _candidates(view: RunView) -> list[str]:
    """Return the metrics that a run can be told by, the first choice first."""
    wanted = [view.config.promote.metric] if view.config else []
    return list(dict.fromkeys([*wanted, *FALLBACKS]))


def _words(
    view: RunView, champion: IterationView | None, shown: IterationView | None, gain: Gain | None
) -> tuple[str, str, str]:
    who = f"The player of iteration {shown.index}" if shown else ""
    if view.champion_problem is not None:
        return "bad", "The champion is not the one that was promoted", f"{view.champion_problem}."
    if champion is None and view.pointer is not None:
        # The pointer leads to something else than an iteration's player.
        return "plain", "The champion stands outside the iterations", f"{view.pointer.path}."
    if shown is None:
        begun = "No iteration was evaluated yet" if view.iterations else "No iteration was begun"
        return "plain", "Nothing to compare yet", f"{begun}."
    rank = "is the champion" if champion else "was not promoted: there is no champion yet"
    if champion is None and shown.decision is None:
        rank = "is evaluated, but not decided yet"
    if view.is_pointer_damaged:
        rank = "was evaluated last; the pointer is damaged, so the champion is not known"
    if gain is None:
        title = "How it compares with the start is not known"
        return "plain", title, f"{who} {rank}. {_why_no_gain(view, shown)}"
    units = view.units
    points = f"{units.difference(gain.metric, gain.difference)}{units.unit(gain.metric)}"
    titles = {
        "better": ("good", f"Better than the start: {points}"),
        "worse": ("bad", f"Worse than the start: {points}"),
        "unclear": ("plain", f"No clear difference from the start: {points}"),
        "unsure": ("plain", f"Against the start: {points}, how surely is not known"),
    }
    tone, title = titles[gain.verdict]
    return tone if champion or tone == "bad" else "plain", title, f"{who} {rank}."


def _why_no_gain(view: RunView, shown: IterationView) -> str:
    """Return which side lacks a metric that both could be compared by."""
    names = _candidates(view)
    start = [name for name in names if view.measured_at_start(name)[0] is not None]
    player = [name for name in names if shown.measured(name)[0] is not None]
    if start and player:
        return (
            f"They have no such metric in common: the start has {', '.join(start)}, the player "
            f"{', '.join(player)}."
        )
    which = f"no evaluation with {' or '.join(names)} that can be read"
    if not start and not player:
        return f"Neither it nor the start has an evaluation with {' or '.join(names)}."
    return f"It has {which}." if start else f"The start has {which}."


def _gain(view: RunView, shown: IterationView) -> Gain | None:
    metric = main_metric(view, shown)
    value, start_value = shown.measured(metric)[0], view.measured_at_start(metric)[0]
    if value is None or start_value is None:
        return None
    own = (value, start_value)
    paired = _paired(view, shown.index, metric)
    if paired is None:
        return Gain(metric, *own, value - start_value, own, None)
    return Gain(metric, paired.value, paired.rival_value, paired.gain, own, paired)


def _paired(view: RunView, iteration: int, metric: str) -> Paired | None:
    try:
        mine = measured_on_examples(view.layout, iteration, metric)
        theirs = measured_on_examples(view.layout, None, metric)
    except (SpinError, OSError):  # what is damaged is told of its own piece
        return None
    if mine is None or theirs is None or mine.asked != theirs.asked:
        return None
    return compare(mine.column, theirs.column)


def _last_evaluated(view: RunView) -> IterationView | None:
    evaluated = [each for each in view.iterations if each.evaluation.metrics]
    return evaluated[-1] if evaluated else None


def _following(view: RunView) -> Iterator[str]:
    """Yield what happens next, or what the user can do."""
    for state, say in _STATES.items():
        found = [piece.path for piece in view.pieces() if piece.state == state]
        if found:
            yield say(found)
    ended = read_ending(view.layout)
    if ended:
        yield f"T{ended.told()[1:]}"
    again = "run the same command again to go on"
    if not view.iterations:
        yield f"No iteration was begun: {again}."
        return
    last = view.iterations[-1]
    if last.decision is None:
        if not any(piece.state in ("running", "partial") for piece in last.pieces):
            done = [piece.name for piece in last.pieces if piece.state == "done"]
            after = f" after {done[-1]}" if done else ""
            yield f"Iteration {last.index} stands{after}: {again}."
        return
    yield from _after_decision(view, last)


def _after_decision(view: RunView, last: IterationView) -> Iterator[str]:
    config = view.recipe.for_iteration(last.index) if view.recipe else None
    if last.outcome in ("refused", "rolled back"):
        what = "was refused" if last.outcome == "refused" else "was promoted and rolled back"
        yield f"The player of iteration {last.index} {what}; {_after_refusal(view, last)}."
        return
    if last.converged:
        yield f"The run has converged: {last.converged}."
        return
    most = config.stop.max_iterations if config else None
    played = len(view.iterations)
    if most is not None and played >= most:
        yield f"{played} iterations are played, and stop.max_iterations is {most}: the run may end."
    else:
        yield (
            f"Iteration {last.index} was promoted: `spin run` with --iterations {played + 1} plays "
            "on against it."
        )


def _after_refusal(view: RunView, last: IterationView) -> str:
    if view.recipe is None:
        return "what comes next is not known, since run.json cannot be read"
    promote = view.recipe.for_iteration(last.index).promote
    rival = "the champion" if view.pointer or view.is_pointer_damaged else "the start"
    match promote.on_refusal:
        case "stop":
            return "the run stops there (promote.on_refusal is stop)"
        case "champion":
            return f"the run goes on from {rival}"
        case "player":
            return "the run goes on from that player all the same"
    try:
        retries = refusals_before(view.layout, last.index)
    except (SpinError, OSError):  # what is damaged is told of its own piece
        return f"the run tries again from {rival}, or stops: the refusals before cannot be read"
    lower = "with a lower learning rate"
    if retries < promote.retry.times:
        return f"the run tries again from {rival}, {lower}"
    return f"the run stops there, after {retries} {'retry' if retries == 1 else 'retries'} {lower}"


_STATES: dict[str, Callable[[list[str]], str]] = {
    "running": lambda paths: f"Running now: {', '.join(paths)}.",
    "partial": lambda paths: (
        f"Cut off before the end: {', '.join(paths)}; the same command goes on there."
    ),
    "corrupt": lambda paths: (
        f"Damaged: {', '.join(paths)}; `spin verify` says how, and the stage has to run again."
    ),
}
