"""Paired tests: published numbers, exact errors by enumeration, and what a bootstrap leaves."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data import statistics
from stages.data.measures import Column
from stages.data.paired import Paired, compare
from stages.data.statistics import (
    Floats,
    mcnemar,
    score_interval,
    score_p_value,
    share_bound,
    studentized,
    studentized_sets,
)
from stages.data.statistics import _student_quantile as student_quantile
from stages.data.statistics import _student_tail as student_tail


def column(values: Floats | list[float], weights: list[float] | None = None) -> Column:
    array = np.asarray(values, np.float64)
    return Column(
        [f"p{i}" for i in range(len(array))],
        array,
        np.ones(len(array)) if weights is None else np.array(weights),
    )


def found(comparison: Paired | None) -> Paired:
    assert comparison is not None
    return comparison


class TestRightOrWrong:
    @pytest.mark.parametrize(
        ("wins", "losses", "two_sided"),
        [
            (7, 1, 0.0391),  # Fagerland, Lydersen, Laake 2013, table 1: Bentur's airway study
            (16, 6, 0.0347),  # likewise: Cavo's complete responses
        ],
    )
    def test_mid_p_is_that_of_the_literature(
        self, wins: int, losses: int, two_sided: float
    ) -> None:
        assert 2 * mcnemar(wins, losses, 100) == pytest.approx(two_sided, abs=5e-5)
        assert mcnemar(wins, losses, 100) + mcnemar(losses, wins, 100) == pytest.approx(1.0)

    def test_mid_p_is_the_binomial_tail_less_half_of_its_first_term(self) -> None:
        # scipy 1.17: binomtest(61, 98, alternative="greater").pvalue - binom.pmf(61, 98, 0.5) / 2
        assert mcnemar(61, 37, 196) == pytest.approx(0.007716182253654, abs=1e-12)
        assert mcnemar(0, 0, 10) == 0.5
        assert mcnemar(100_000, 100_000, 1_000_000) == pytest.approx(0.5)

    def test_where_most_examples_differ_it_is_the_whole_tail(self) -> None:
        # scipy 1.17: binomtest(61, 98, alternative="greater").pvalue
        assert mcnemar(61, 37, 195) == pytest.approx(0.009845092399923, abs=1e-12)
        for wins, losses, examples in ((3, 0, 6), (6, 4, 20), (61, 37, 196)):
            # one more win that was a tie: the value changes its kind, and still does not rise
            assert mcnemar(wins + 1, losses, examples) <= mcnemar(wins, losses, examples) + 1e-12

    def test_the_score_interval_is_tangos(self) -> None:
        # Tango 1998: contact lenses, 44 pairs of which one was lost; z 1.709 at a margin of 0.1
        assert score_interval(0, 1, 44, 0.90) == pytest.approx((-0.096, 0.037), abs=5e-4)
        low, _ = score_interval(0, 1, 44, 1 - 2 * (1 - 0.95627))
        assert low == pytest.approx(-0.1, abs=1e-4)  # the normal distribution's share at 1.709

    @pytest.mark.parametrize(
        ("wins", "losses", "examples"), [(0, 0, 10), (3, 0, 20), (61, 37, 900)]
    )
    def test_the_score_interval_is_its_own_mirror_image(
        self, wins: int, losses: int, examples: int
    ) -> None:
        low, high = score_interval(wins, losses, examples)
        assert low <= (wins - losses) / examples <= high
        mirrored = score_interval(losses, wins, examples)
        assert mirrored == pytest.approx((-high, -low), abs=1e-9)

    def test_without_any_difference_the_margin_is_a_matter_of_numbers(self) -> None:
        for examples in (50, 134, 200):  # all tied: each example was lost with a chance of 2%
            assert score_p_value(0, 0, examples, -0.02) == pytest.approx(0.98**examples)

    def test_p_values_fall_as_wins_grow_and_rise_with_the_margin(self) -> None:
        by_wins = [score_p_value(wins, 20, 500, -0.01) for wins in range(5, 60, 5)]
        by_gain = [score_p_value(30, 20, 500, gain) for gain in np.linspace(-0.05, 0.08, 14)]
        assert all(before >= after for before, after in pairwise(by_wins))
        assert all(before <= after for before, after in pairwise(by_gain))

    def test_where_outcomes_are_too_many_to_sum_over_the_normal_distribution_fits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        summed = score_p_value(1_000, 1_020, 19_000, -0.005)
        monkeypatch.setattr(statistics, "_ENUMERATED", 0)
        assert score_p_value(1_000, 1_020, 19_000, -0.005) == pytest.approx(summed, rel=0.02)
        assert 0.01 < summed < 0.1

    @pytest.mark.parametrize("examples", [4, 12, 20, 50, 100])
    def test_it_errs_in_no_more_than_its_share(self, examples: int) -> None:
        counts = range(examples + 1)
        p_values = {(w, m - w): mcnemar(w, m - w, examples) for m in counts for w in range(m + 1)}
        for differing in (0.02, 0.05, 0.1, 0.3, 0.335, 0.5, 0.8, 1 - 1e-9):
            wrong = sum(
                chance(won, lost, examples, differing / 2, differing / 2)
                for (won, lost), p in p_values.items()
                if p <= 0.05
            )
            assert wrong <= 0.0501

    @pytest.mark.parametrize("examples", [5, 20, 100])
    def test_the_bound_of_a_share_errs_in_no_more_than_its_share(self, examples: int) -> None:
        bounds = [share_bound(count, examples) for count in range(examples + 1)]
        assert bounds == sorted(bounds)
        for share in np.linspace(0.02, 0.98, 49):
            wrong = sum(
                math.comb(examples, count) * share**count * (1 - share) ** (examples - count)
                for count, bound in enumerate(bounds)
                if bound > share
            )
            assert wrong <= 0.05

    @pytest.mark.parametrize("gain", [-0.02, -0.05, 0.02])
    def test_the_score_test_errs_in_no_more_than_its_share(self, gain: float) -> None:
        examples = 100
        for least in (1e-9, 0.005, 0.02, 0.05, 0.1):
            rate = least + max(0.0, -gain)
            wrong = sum(
                chance(won, lost, examples, rate + gain, rate)
                for won in range(45)
                for lost in range(45)
                if chance(won, lost, examples, rate + gain, rate) > 1e-7
                and score_p_value(won, lost, examples, gain) <= 0.05
            )
            assert wrong <= 0.052, least


def chance(wins: int, losses: int, examples: int, win: float, loss: float) -> float:
    """The trinomial probability."""
    ties = examples - wins - losses
    if ties < 0:
        return 0.0
    log = math.lgamma(examples + 1) - sum(math.lgamma(k + 1) for k in (wins, losses, ties))
    for count, rate in ((wins, win), (losses, loss), (ties, 1 - win - loss)):
        log += count * math.log(max(rate, 1e-300))
    return math.exp(log)


class TestMeans:
    @pytest.mark.parametrize(
        ("freedom", "t", "tail"),  # scipy 1.17: stats.t.sf
        [(4, 1.7, 0.08217747), (9, 1.7, 0.06167383), (19, -1.2, 0.87755554), (99, 3, 0.00170775)],
    )
    def test_students_tail(self, freedom: int, t: float, tail: float) -> None:
        assert student_tail(t, freedom) == pytest.approx(tail, abs=5e-4)
        if t > 0:
            assert student_quantile(1 - student_tail(t, freedom), freedom) == pytest.approx(t)

    @pytest.mark.parametrize("skew", [-1, 1])
    @pytest.mark.parametrize("examples", [50, 100, 500])
    def test_no_gain_is_seldom_taken_for_one_however_skewed(self, skew: int, examples: int) -> None:
        rng = np.random.default_rng(examples + skew)
        none = skew * (rng.exponential(size=(2000, examples)) - 1)
        wrong = np.mean([s.p_value(0.0) <= 0.05 for s in studentized_sets(none)])
        assert wrong <= 0.058 + 2 * (0.05 * 0.95 / 2000) ** 0.5

    def test_few_differences_are_no_proof(self) -> None:
        rng = np.random.default_rng(3)
        none = (rng.random((2000, 100)) < 0.05) * rng.normal(size=(2000, 100))
        assert np.mean([s.p_value(0.0) <= 0.05 for s in studentized_sets(none)]) <= 0.06

    @pytest.mark.parametrize("shape", ["normal", "exponential"])
    def test_an_interval_covers_as_often_as_it_says(self, shape: str) -> None:
        rng = np.random.default_rng(1)
        draws = (
            rng.normal(1, 1, (1000, 60)) if shape == "normal" else rng.exponential(1, (1000, 60))
        )
        ends = np.array([s.interval(0.9) for s in studentized_sets(draws)])
        covered = ((ends[:, 0] <= 1) & (ends[:, 1] >= 1)).mean()
        assert 0.87 <= covered <= 0.97

    def test_one_set_is_judged_as_it_is_among_others(self) -> None:
        sets = np.random.default_rng(5).normal(0.1, 1.0, (3, 80))
        alone, among = studentized(sets[1]), studentized_sets(sets)[1]
        assert alone.p_value(0.0) == among.p_value(0.0)
        assert alone.interval() == pytest.approx(among.interval())

    def test_the_bound_and_the_p_value_say_the_same(self) -> None:
        for seed in range(40):
            one = studentized(np.random.default_rng(seed).normal(0.15, 1, 120))
            ends = one.interval(0.90)
            assert ends is not None
            assert (one.p_value(0.0) < 0.05) is (ends[0] > 0)

    def test_examples_that_all_agree_count_by_their_number(self) -> None:
        assert studentized(np.full(5, 0.1)).p_value(0.0) == 0.5**5
        assert studentized(np.zeros(5)).p_value(0.0) == 1.0

    @pytest.mark.parametrize(("examples", "is_told"), [(1, False), (5, False), (6, True)])
    def test_examples_that_all_agree_have_an_interval_where_they_rule_out_chance(
        self, examples: int, is_told: bool
    ) -> None:
        """Two-sided at 95% six are needed, as of coins that all fall alike."""
        one = studentized(np.full(examples, 0.25))
        assert (one.interval() is not None) is is_told
        assert (2 * one.p_value(0.0) <= 0.05) is is_told
        if is_told:
            assert one.interval() == pytest.approx((0.25, 0.25))


VALUES = st.one_of(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60),
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=60),
)


class TestAnyComparison:
    @settings(max_examples=60, deadline=None)
    @given(VALUES, st.floats(-0.5, 0.5), st.booleans())
    def test_says_what_is_possible_and_the_same_from_either_side(
        self, pairs: list[tuple[float, float]], above: float, lower: bool
    ) -> None:
        mine, theirs = (column([float(pair[i]) for pair in pairs]) for i in (0, 1))
        there = found(compare(mine, theirs, above=above, lower=lower))
        back = found(compare(theirs, mine, above=above, lower=lower))
        assert 0 <= there.p_value <= 1
        assert there.wins + there.losses + there.ties == there.examples == len(pairs)
        assert there.gain == pytest.approx(-back.gain)
        assert (there.wins, there.losses) == (back.losses, back.wins)
        assert (there.low is None) is (there.high is None)
        if there.low is None or there.high is None:
            assert len(pairs) < 6
            return
        assert there.low <= there.gain + 1e-9
        assert there.gain <= there.high + 1e-9
        assert all(math.isfinite(n) for n in (there.low, there.high))

    @settings(max_examples=40, deadline=None)
    @given(VALUES, st.floats(-0.5, 0.4))
    def test_asks_more_where_more_is_to_be_exceeded(
        self, pairs: list[tuple[float, float]], above: float
    ) -> None:
        mine, theirs = (column([float(pair[i]) for pair in pairs]) for i in (0, 1))
        less, more = (found(compare(mine, theirs, above=a)) for a in (above, above + 0.1))
        # at 0 itself the exact test takes the place of the score test: tails differ a little, and
        # where most examples differ by half of the likelihood of what was seen
        differing = less.wins + less.losses
        seen = math.comb(differing, less.wins) / 2**differing if 2 * differing > len(pairs) else 0
        slack = 0.02 + seen / 2 if less.method == "mcnemar" else 1e-12
        assert less.p_value <= more.p_value + slack


class TestComparing:
    def test_right_and_wrong_goes_by_mcnemar(self) -> None:
        player = column([1.0] * 61 + [0.0] * 37 + [1.0] * 902)
        rival = column([0.0] * 61 + [1.0] * 37 + [1.0] * 902)
        seen = found(compare(player, rival, confidence=0.9))
        assert (seen.wins, seen.losses, seen.ties, seen.examples) == (61, 37, 902, 1000)
        assert (seen.method, seen.p_value) == ("mcnemar", mcnemar(61, 37, 1000))
        assert seen.gain == pytest.approx(0.024)
        assert seen.value - seen.rival_value == pytest.approx(seen.gain)
        assert (seen.low, seen.high) == score_interval(61, 37, 1000, 0.9)
        assert seen.figures()["method"] == "mcnemar"

    def test_a_margin_is_asked_for_by_the_score_test(self) -> None:
        player, rival = column([1.0] * 3 + [0.0] * 97), column([0.0] * 95 + [1.0] * 5)
        seen = found(compare(player, rival, above=-0.1))
        assert seen.p_value == score_p_value(3, 5, 100, -0.1)

    @pytest.mark.parametrize("above", [1.0, 2.0, -1.0])
    def test_no_share_gains_more_than_all(self, above: float) -> None:
        seen = found(compare(column([1.0, 1.0]), column([0.0, 0.0]), above=above))
        assert seen.p_value == (1.0 if above > 0 else 0.0)

    def test_other_values_go_by_the_bootstrap(self) -> None:
        seen = found(compare(column([0.5, 1.0, 0.7]), column([0.0, 1.0, 0.9])))
        assert (seen.method, seen.wins, seen.losses, seen.ties) == ("bootstrap", 1, 1, 1)

    @pytest.mark.parametrize("low_is_better", [False, True])
    def test_a_swap_turns_the_gain_round(self, low_is_better: bool) -> None:
        rng = np.random.default_rng(0)
        one, other = column(rng.normal(size=50)), column(rng.normal(size=50))
        there = found(compare(one, other, lower=low_is_better))
        back = found(compare(other, one, lower=low_is_better))
        assert there.gain == pytest.approx(-back.gain)
        assert (there.wins, there.losses) == (back.losses, back.wins)
        assert back.low is not None
        assert back.high is not None
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
        assert there.gain == pytest.approx(
            (other.mean() - one.mean()) * (1 if low_is_better else -1)
        )

    def test_examples_are_matched_by_id_whatever_their_order(self) -> None:
        values = np.random.default_rng(0).normal(size=30)
        rival = column(values)
        turned = Column(rival.example_ids[::-1], rival.values[::-1], rival.weights[::-1])
        seen = found(compare(column(values + 0.1), turned))
        assert (seen.wins, seen.ties, seen.unmatched) == (30, 0, 0)
        assert seen.gain == pytest.approx(0.1)

    def test_examples_that_only_one_has_are_counted_and_left_out(self) -> None:
        rival = Column(["p0", "p1", "x", "y"], np.zeros(4), np.ones(4))
        seen = found(compare(column([1.0, 1.0, 1.0]), rival))
        assert (seen.examples, seen.unmatched, seen.value) == (2, 3, 1.0)
        assert compare(column([1.0]), Column(["x"], np.zeros(1), np.ones(1))) is None

    def test_a_weighted_mean_has_its_own_gain_and_spread(self) -> None:
        rng = np.random.default_rng(2)
        covered = 0
        for _ in range(200):
            tokens = rng.integers(1, 60, 80).astype(float)
            base = rng.normal(size=80)
            rival = column(base, list(tokens))
            player = column(base + rng.normal(0.2, 0.5, 80), list(tokens))
            seen = found(compare(player, rival, confidence=0.9))
            assert seen.gain == pytest.approx(player.mean() - rival.mean())
            assert seen.low is not None
            assert seen.high is not None
            covered += seen.low <= 0.2 <= seen.high
        assert 168 <= covered <= 196


def test_rounding_is_no_spread_where_one_example_differs() -> None:
    """Resamples without it are all alike, but for rounding, which must not make t huge."""
    for value in (-0.0357142857142857, 0.1, 1 / 3, 7.3):
        differences = np.zeros(100)
        differences[3] = value
        bounds = studentized(differences).interval()
        assert bounds is not None
        assert max(map(abs, bounds)) < abs(value)
