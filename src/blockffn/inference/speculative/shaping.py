"""Trees shaped by cost: a node stays where the tokens it promises are worth the time that verifying it takes.

A text of many rounds is decoded fastest when each round maximises `expected tokens - rate * milliseconds`, with the
rate of the whole text. Maximising tokens per millisecond round by round would spend too much where drafts are bad.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from blockffn.inference.speculative.cost import CostModel, DraftingCost, union_and_pairs
from blockffn.inference.speculative.decode import MOST, Round, Routine, Shaper
from blockffn.inference.speculative.drafting import STEPS, Drafted, WayOfDrafting, first_choices
from blockffn.inference.speculative.estimates import (
    OUTLIER,
    AcceptanceEstimate,
    Calibration,
    TimeEstimate,
    UnionEstimate,
)
from blockffn.inference.speculative.growth import Budget
from blockffn.inference.speculative.tree import ROOT, DraftTree
from blockffn.inference.speculative.verify import Verdict
from blockffn.inference.target import Step

FORGET_RATE, FIRST_ROUNDS = 0.99, 2  # plain ones, from which the rate starts
# Plain rounds that are tried in a row, and those before one is measured: the first is slow,
# presumably because the draft has taken the target's place in the caches.
PLAIN_TRY, COLD = 3, 1
CLEAR_GAIN = 1.25  # over plain decoding: where drafts bring more, plain rounds are not tried
FEWEST_PLAIN = 8  # the time of a plain round is a mean of so many
LEARN, FIRST_LEARNT = 0.01, 32  # of the time, what learning may take; rounds that teach whatever it takes
# Of the limit from which nodes pay, a logarithm: how far a round moves it, where it lies if all of them pay; and what
# counts as never accepted.
LEAST_STEP, BEYOND, LEAST_REACH = 0.2, 0.5, 1e-6
MOST_ALIKE, MOST_REST = 32, 128  # rounds of which nothing is asked, with drafts and without
TRY, TRY_STEPS = 12, 7  # rounds with drafts to see whether they pay, and the least steps of these
PLAIN_EVERY = 256  # rounds with drafts, in rows, before plain ones are tried again
# What learning takes of a round's time where rounds with drafts come in rows; as how many of the first rounds each of
# them counts there.
QUICK, MANY = 0.08, 8
# Nodes that a round may draft there which does not learn, as a multiple of those that paid lately; how slowly these are
# forgotten.
ROOMY, KEPT = 2, 0.9
HOPELESS = 0.25  # of the rate: what a node must promise per millisecond for growth to go on
EXPLORE, MOST_CREDIT = 0.0125, 0.5  # of the time; of a round's
FURTHER, WIDER = (1, 2, 4), 2  # steps more, in turn; times as many nodes
# In place of more steps: drafting without branches instead of with, or the other way round; a plain round.
OTHER_WAY, NO_DRAFTS = 0, -1
NOTHING = Budget(nodes=0, depth=0)
FORGET_LEAD, FEWEST_TREES = 0.97, 4.0  # as for what a step is worth; of trees that were compared with their chains


@dataclass(frozen=True)
class Choice:
    """Nodes worth verifying, a tree, in the order in which they were added, and the milliseconds that each adds."""

    nodes: list[int]
    prices: list[float]


@dataclass(frozen=True)
class Prices:
    """What `choose_nodes` needs to know of the target: the cost model, the union, and what any drafts cost at all."""

    cost: CostModel
    union: UnionEstimate
    drafts: float = 0.0

    def milliseconds(self, tokens: int, log_used: float) -> float:
        spent = self.cost.milliseconds(tokens, self.union.union(log_used), tokens * self.union.active)
        return spent + self.drafts if tokens > 1 else spent


def choose_nodes(
    tree: DraftTree, *, reach: Sequence[float], brings: Sequence[float], prices: Prices, rate: float,
    among: Collection[int] | None = None,
) -> Choice:  # fmt: skip
    """The part of a tree that is worth verifying, maybe nothing.

    Nodes are added one by one, always the one with the most expected tokens per millisecond among those whose parent
    is in; the best of all the trees on the way is kept. Its measure is `tokens - rate * milliseconds`.

    Args:
        reach: probability of each node that its path is accepted. brings: see `UnionEstimate.brings`.
        among: nodes that may be chosen, with all their ancestors; `None`: all.
    """
    children: dict[int, list[int]] = {}
    parents = tree.parent_list
    for node in range(len(tree)) if among is None else among:
        children.setdefault(parents[node], []).append(node)
    tokens, log_used = 1.0, prices.union.start()
    now = prices.milliseconds(1, log_used)
    order: list[int] = []
    paid: list[float] = []
    best_value = tokens - rate * now
    best_count = 0
    frontier = list(children.get(ROOT, ()))
    while frontier:
        after = {b: prices.milliseconds(len(order) + 2, log_used + b) for b in {brings[node] for node in frontier}}
        node = max(frontier, key=lambda n: reach[n] / max(after[brings[n]] - now, 1e-9))
        if reach[node] < HOPELESS * rate * (after[brings[node]] - now):
            break
        frontier.remove(node)
        frontier += children.get(node, ())
        order.append(node)
        paid.append(after[brings[node]] - now)
        tokens, log_used, now = tokens + reach[node], log_used + brings[node], after[brings[node]]
        value = tokens - rate * now
        if value > best_value:
            best_value, best_count = value, len(order)
    return Choice(order[:best_count], paid[:best_count])


class CostAwareShaper(Shaper):
    """Cuts drafted trees to what pays, by a cost model and by what it learns from every round.

    It drafts with branches or without, whichever is worth more. A tree holds the chain of its first choices, so
    whenever a tree was drafted both are known of the same text.

    Two things are learnt from what was tried alone: whether drafting goes on where a path is improbable, and how often
    improbable nodes are accepted; and while chains are drafted, what trees would bring. So some rounds explore: they
    draft further or the other way, or verify more than seems to pay. What they lose is taken from a credit that grows
    by `EXPLORE` of the time, so it is bounded whatever the draft; where they lose nothing, because more was accepted
    than expected, the next round explores too.

    Learning has a share of the time as well: it takes some tenths of a millisecond, in caches that a step has emptied,
    which may be as long as a small model's step. Rounds beyond that share do what seemed to pay lately:
    the same steps of drafting, and of the nodes those that are accepted as probably as nodes had to be.

    Args:
        cost: of the target, from `calibrate`.
        num_experts: in all layers together; 1 for a dense model.
        clock: seconds; what drafting and verifying cost is learnt by it. `None`: costs are as given.
        tree: what drafting a tree costs, from `calibrate_drafter`; nothing for n-grams.
        chain: the same of a chain; `None`: chains are not drafted, as where a tree costs no more.
        calibration: how often the draft's tokens were accepted before; `None`: not known.

    Draft large trees: a shaper can only cut.
    """

    def __init__(
        self,
        cost: CostModel,
        *,
        num_experts: int,
        clock: Callable[[], float] | None = None,
        tree: DraftingCost | None = None,
        chain: DraftingCost | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts counts those of all layers, 1 for a dense model; got {num_experts}")
        self.acceptance = AcceptanceEstimate(calibration)
        self._cost, self._clock = cost, clock
        self._union = UnionEstimate(num_experts, share=1.0 if num_experts == 1 else 0.15)
        plain = cost.milliseconds(1, self._union.active, self._union.active)
        self._tree = WayOfDrafting(tree or DraftingCost(), chain=False, plain=plain)
        self._chain = None if chain is None else WayOfDrafting(chain, chain=True, plain=plain)
        self._ways = [self._tree] if self._chain is None else [self._tree, self._chain]
        # Of a round, its tokens, and the cost model's milliseconds.
        self._verifying = TimeEstimate((0.0, 0.0, 1.0), doubts=(plain / 2, plain / 16, 0.25))
        self._plain_time, self._plain_measured = plain, 0  # milliseconds of a plain round; how many were measured
        self._tokens, self._milliseconds = float(FIRST_ROUNDS), FIRST_ROUNDS * plain
        self._lead, self._compared = 0.0, FEWEST_TREES  # tokens that trees brought more than their chains
        self._credit, self._explored = -plain, 0  # milliseconds, rounds
        self._way, self._taken = self._tree, 0  # of this round, and its steps of drafting
        self._explores = self._is_other = False  # this round; by drafting the other way
        self._lost = 0.0  # by exploring, in this round, as far as is known before the verification
        self._hopes: dict[int, float] = {}  # nodes that are verified to explore, with the hope of each
        self._drafted: tuple[int, ...] | None = None  # quantities of the way's `times`, where it was measured
        self._has_drafted = False  # in this round
        self._passed = 0  # rounds since the last whose acceptance was learnt
        self._unread, self._own = 0, 1  # tokens since the last proposal, and of the last round
        self._learns, self._patience = True, 0.0  # this round; milliseconds that learning may take
        self._to_learn, self._spent = FIRST_LEARNT, plain  # rounds that learn in any case; of the last that learnt
        # Nodes that paid, and their levels: about the most of late.
        self._kept, self._kept_depth = float(MOST.nodes), float(MOST.depth)
        self._least = 0.0  # log-probability of acceptance from which nodes pay
        self._learning = 0.0  # milliseconds that it took in the last round that learnt
        self._resting = PLAIN_TRY  # plain rounds to come, whatever seems to pay
        self._plain_rounds = 0  # in a row
        self._to_plain = PLAIN_EVERY  # rounds with drafts until plain ones are tried in a row
        self._verified = (1.0, 1.0, plain)  # of the last that was measured, as `_verifying`
        self._begun = 0.0  # a time in milliseconds

    @property
    def rate(self) -> float:
        """Tokens per millisecond of recent rounds that were measured, of plain decoding at least."""
        return max(self._tokens / self._milliseconds, 1 / self._plain())

    def start(self, tokens: int) -> None:
        """A text of so many tokens begins, which a draft has to read."""
        self._unread = tokens

    def routine(self, most: Budget) -> Routine | None:
        """Where nothing pays, plain rounds until there is credit to explore. Where learning takes long beside a round,
        chains of the usual steps until there is time to learn, and exploring is a row of chains, too: a draft that has
        not run for long is slow at first."""
        way = self._usual_way()
        if self._resting:
            return None
        if self._to_plain <= 0:
            self._taken, self._to_plain = 0, PLAIN_EVERY
            return Routine(TRY, NOTHING)
        if way.usual:
            is_due = self._patience >= 0 or self._to_learn > 0
            return self._chains(most, way.usual, MOST_ALIKE) if way.chain and self._is_quick and not is_due else None
        if self._credit > 0 and self._chain is not None and self._is_quick:
            return self._chains(most, max(self._chain.best_try, TRY_STEPS), TRY)
        if self._credit > 0 or self._plain_rounds < PLAIN_TRY:
            return None
        self._taken = 0
        return Routine(min(1 + int(-self._credit / max(EXPLORE * self._plain(), 1e-6)), MOST_REST), NOTHING)

    def passed(self, rounds: Sequence[Round]) -> None:
        """Learn from chains together, which takes less time than from one after the other."""
        began = self._now()
        self._learn_chains(rounds)
        self._patience -= self._now() - began

    def rested(self, seconds: Sequence[float]) -> None:
        """Learn what a plain round takes. One that follows drafts is slow, see `COLD`."""
        known, count = seconds if self._plain_rounds >= COLD else seconds[COLD:], len(seconds)
        self._plain_rounds += count
        if self._clock is not None and known:
            self._learn_plain(_mean_milliseconds(known), len(known))
        self._forget(count)
        spent = self._plain()
        lost = 0.0
        if self._usual_way().usual:
            lost = max(spent - 1 / self.rate, 0.0) * count
        else:
            self._learn_rate(1, spent, count)
        self._spent, self._own = spent, 1
        self._unread += count
        self._earn(EXPLORE * spent * count - lost, count)

    @property
    def _is_quick(self) -> bool:
        return self._learning > QUICK * self._spent

    def _chains(self, most: Budget, steps: int, rounds: int) -> Routine:
        self._taken = steps
        return Routine(rounds, most._replace(least=STEPS[steps - 1], chain=True))

    def _learn_chains(self, rounds: Sequence[Round]) -> None:
        """From rounds that drafted chains. The first is slower where there was much to read: it does not count."""
        assert self._chain is not None
        chain, known, plain = self._chain, rounds[1:] or rounds, self._plain()
        is_usual = self._taken <= chain.usual
        count, nodes = len(known), sum(len(round_.tree) for round_ in known)
        tokens = 1 + sum(round_.accepted for round_ in known) / count
        drafting = _mean_milliseconds([round_.draft_seconds for round_ in known])
        spent = drafting + _mean_milliseconds([round_.seconds - round_.draft_seconds for round_ in known])
        self._forget(len(rounds))
        if nodes:
            levels = nodes / count
            chain.times.observe((1, levels, levels, tokens), drafting, count=count)
            chain.learn_chains(
                [(round_.tree, round_.accepted) for round_ in known], steps=self._taken, rate=self.rate,
                verifying=max(spent - drafting - plain, 0.0) / levels, read=tokens,
            )  # fmt: skip
        total = 1000 * sum(round_.seconds for round_ in rounds)
        lost = 0.0
        if is_usual:
            self._learn_rate(tokens, spent, len(rounds))
            if self.rate * plain < CLEAR_GAIN:
                self._to_plain -= len(rounds)
        else:
            lost = max(total - sum(1 + round_.accepted for round_ in rounds) / self.rate, 0.0)
        self._spent, self._plain_rounds = spent, 0
        self._own = self._unread = 1 + rounds[-1].accepted
        self._earn(EXPLORE * total - lost, len(rounds))

    def budget(self, most: Budget) -> Budget:
        """What to draft: the steps that lately brought more than they cost, and more where this round explores."""
        self._begun, self._drafted, self._has_drafted = self._now(), None, False
        self._lost, self._hopes = 0.0, {}
        self._way = self._usual_way()
        self._learns = self._patience >= 0 or self._to_learn > 0 or self._resting > 0
        if self._learns:
            self._patience = 0.0  # neither time that was not needed nor what the first rounds took is kept
        self._taken, self._is_other, self._explores = self._way.usual, False, self._learns and self._credit > 0
        if self._explores and not self._resting:
            self._explore()
        if self._resting:
            self._resting -= 1
            self._taken, self._lost = 0, max(self._plain() - 1 / self.rate, 0.0)
        if not self._taken:
            return NOTHING
        nodes, depth = most.nodes, most.depth
        if not self._learns and self._is_quick:
            nodes, depth = min(nodes, ROOMY * math.ceil(self._kept)), min(depth, math.ceil(self._kept_depth))
        return Budget(nodes, depth, STEPS[self._taken - 1], self._way.chain)

    def shape(self, tree: DraftTree) -> DraftTree:
        """The part of the tree that pays, maybe nothing; more of it where this round explores."""
        self._has_drafted = True
        if not self._learns:
            self._unread = 0
            reach, least = self.acceptance.reach(tree), math.exp(self._least)
            return self._part(tree, [node for node, probability in enumerate(reach) if probability >= least])
        began = self._now()
        drafted = Drafted(tree)
        self._learn_drafting(drafted, began - self._begun)
        reach, brings, rate = self.acceptance.reach(tree), self._union.brings(tree), self.rate
        prices = Prices(self._current_cost(), self._union, max(self._calculated_plain() - self._plain(), 0.0))

        def net_of(among: Collection[int] | None = None) -> dict[int, float]:
            """What each node that pays is worth, in tokens."""
            choice = choose_nodes(tree, reach=reach, brings=brings, prices=prices, rate=rate, among=among)
            return {node: reach[node] - rate * price for node, price in zip(choice.nodes, choice.prices)}

        net = net_of()
        usual = self._way.usual
        worths = self._way.learn(drafted, drafted.by_step(net), steps=self._taken, rate=rate, read=self._own)
        if self._chain is not None and not self._way.chain:
            chain = first_choices(tree)
            self._compare(worths, usual, Drafted(tree, chain), net_of(chain))
        elif self._is_other:  # a tree was not drafted, and is believed to be better by its lead where it pays
            self._lost += (self._lead if self._tree.usual else -sum(worths)) / rate
        if not self._is_other:
            self._lost -= sum(worths[usual:]) / rate
        self._lost = max(self._lost, 0.0)
        nodes = list(net)
        self._learn_least(reach, net)
        self._kept = max(len(net), KEPT * self._kept, 1.0)
        self._kept_depth = max(KEPT * self._kept_depth, 1.0, *(tree.depths[node] for node in net))
        if self._explores and not self._is_other:
            nodes = self._widen(tree, net, reach, brings, prices)
        if self._explores:
            self._hopes = {place: reach[node] for place, node in enumerate(sorted(nodes)) if node not in net}
        self._begun = self._now()
        self._learning = self._begun - began
        self._patience -= self._learning
        return self._part(tree, nodes)

    def observe(self, tree: DraftTree, verdict: Verdict, step: Step) -> None:
        """Learn from a verification of root and tree."""
        own = len(verdict.path) + 1
        drafts = self._has_drafted or len(tree) > 0
        self._plain_rounds = 0 if drafts else self._plain_rounds + 1
        self._forget(1)
        if self._learns:
            self._learn(tree, verdict, step, own)
        else:
            self._earn(EXPLORE * self._spent)
        self._own = own
        self._unread += own

    def _learn(self, tree: DraftTree, verdict: Verdict, step: Step, own: int) -> None:
        """From a round that brought `own` tokens."""
        now = self._now()
        if self._plain_rounds == 0 or self._plain_rounds > COLD:
            self._learn_verifying(tree, verdict, step, now - self._begun)
            spent = self._verifying.milliseconds(self._verified)
        else:
            spent = self._plain()
        if self._drafted is not None:
            spent += self._way.times.milliseconds(self._drafted)
        gained = EXPLORE * spent - self._lost
        if self._hopes:
            luck = sum((node in verdict.path) - hope for node, hope in self._hopes.items())
            gained += luck / self.rate
        self._learn_rate(own, spent, 1)
        self.acceptance.observe(tree, verdict, rounds=self._passed)
        self._passed = 0
        self._spent = spent
        if self._to_learn:
            in_rows = self._chain is not None and self._is_quick
            self._to_learn = max(self._to_learn - (MANY if in_rows else 1), 0)
            if in_rows and not self._to_learn:
                self._to_plain = 0
        took = self._now() - now
        if self._has_drafted:
            self._learning += took
        self._patience -= took
        self._earn(gained)

    def _earn(self, credit: float, rounds: int = 1) -> None:
        """At the end of a round: credit to explore, and time to learn."""
        self._credit = min(self._credit + credit, MOST_CREDIT * self._spent)
        self._patience += LEARN * self._spent * rounds

    def _forget(self, rounds: int) -> None:
        """So many rounds pass."""
        self._passed += rounds
        self._verifying.forget(rounds)
        for way in self._ways:
            way.forget(rounds)
        self._compared = max(FORGET_LEAD**rounds * self._compared, FEWEST_TREES)

    def _learn_rate(self, tokens: float, milliseconds: float, rounds: int) -> None:
        """From rounds that brought so many tokens each, in so long."""
        kept = FORGET_RATE**rounds
        new = (1 - kept) / (1 - FORGET_RATE)
        self._tokens = kept * self._tokens + new * tokens
        self._milliseconds = kept * self._milliseconds + new * milliseconds

    def _learn_plain(self, milliseconds: float, rounds: int) -> None:
        """From plain rounds that took so long each."""
        self._plain_measured += rounds
        missed = min(milliseconds, OUTLIER * self._plain_time) - self._plain_time
        self._plain_time += missed * min(rounds / min(self._plain_measured, FEWEST_PLAIN), 1.0)

    def _learn_verifying(self, tree: DraftTree, verdict: Verdict, step: Step, milliseconds: float) -> None:
        union, pairs = union_and_pairs(step)
        cost = self._cost.milliseconds(len(tree) + 1, union, pairs)
        self._verified = (1.0, len(tree) + 1.0, cost)
        if self._clock is not None:
            self._verifying.observe(self._verified, milliseconds)
            if self._plain_rounds:
                self._learn_plain(milliseconds, 1)
        if step.active is None:
            return
        last = verdict.path[-1] + 1 if verdict.path else 0
        self._union.observe(tree, union=union, active=step.active.sum(dim=0).tolist(), last=last)

    def _now(self) -> float:
        return 1000 * self._clock() if self._clock is not None else 0.0

    def _usual_way(self) -> WayOfDrafting:
        """With branches where trees bring more than their chains; the other way where so nothing pays."""
        ways = self._ways if self._lead >= 0 else self._ways[::-1]
        return next((way for way in ways if way.usual), ways[0])

    def _explore(self) -> None:
        """Draft further, or the other way, or not at all."""
        self._explored += 1
        if not self._taken:  # seldom the other way where nothing pays
            in_turn: tuple[int, ...] = FURTHER if self._chain is None else (*FURTHER, OTHER_WAY)
        else:
            in_turn = FURTHER if self._chain is None else tuple(step for more in FURTHER for step in (more, OTHER_WAY))
            if self.rate * self._plain() < CLEAR_GAIN:
                in_turn = (*in_turn, NO_DRAFTS)
        further = in_turn[self._explored % len(in_turn)]
        if further == NO_DRAFTS:
            self._resting = PLAIN_TRY
        elif further == OTHER_WAY:
            self._way = next(way for way in self._ways if way is not self._way)
            self._taken, self._is_other = max(self._way.usual, 1), True
        else:
            self._taken = min(self._way.usual + further, len(STEPS))

    def _plain(self) -> float:
        """Milliseconds of a round without drafts: as measured, for in a row they are faster than a fit to all says."""
        return self._plain_time if self._plain_measured else self._calculated_plain()

    def _calculated_plain(self) -> float:
        active = self._union.active
        return self._current_cost().milliseconds(1, active, active)

    def _current_cost(self) -> CostModel:
        every, token, factor = self._verifying.prices
        cost = self._cost
        return CostModel(
            every + factor * cost.fixed,
            token + factor * cost.per_token,
            factor * cost.per_expert,
            factor * cost.per_pair,
        )

    def _learn_drafting(self, drafted: Drafted, milliseconds: float) -> None:
        self._drafted = (*drafted.quantities(STEPS[self._taken - 1]), self._unread)
        if not self._usual_way().usual:  # else it would have been read anyway
            self._lost += self._way.backlog(max(self._unread - self._own, 0))
        self._unread = 0
        if self._clock is None:
            return
        self._way.times.observe(self._drafted, milliseconds)
        if self._explores:  # it is charged for no more than what was measured
            self._lost += min(milliseconds - self._way.times.milliseconds(self._drafted), 0.0)

    def _learn_least(self, reach: Sequence[float], net: Collection[int]) -> None:
        """From the nodes that pay: the limit lies between them and the others, or beyond all of them."""
        logs = [math.log(max(probability, LEAST_REACH)) for probability in reach]
        pays, fails = ([log for node, log in enumerate(logs) if (node in net) is wanted] for wanted in (True, False))
        if pays and fails:
            limit = (min(pays) + max(fails)) / 2
        elif pays:
            limit = min(min(pays) - BEYOND, self._least)
        else:
            limit = max(max(fails) / 2, self._least)  # 0 is the logarithm of what is certain
        self._least += LEAST_STEP * (limit - self._least)

    @staticmethod
    def _part(tree: DraftTree, nodes: list[int]) -> DraftTree:
        return tree if len(nodes) == len(tree) else tree.subtree(nodes)

    def _compare(self, worths: list[float], usual: int, drafted: Drafted, net: dict[int, float]) -> None:
        """A tree with its chain: what its steps were worth, how many of them are usual, and of the chain what was
        drafted and what its nodes are worth.

        Of steps that the tree did not take but a chain would, the chain's are expected to be worth what they were.
        """
        assert self._chain is not None
        rate, chains = self.rate, self._chain.usual
        known = self._chain.learn(drafted, drafted.by_step(net), steps=self._taken, rate=rate, read=self._own)
        of_chain = sum(known[:chains]) + self._chain.worth(self._taken, chains)
        self._compared += 1
        self._lead += (sum(worths[:usual]) - of_chain - self._lead) / self._compared
        if self._is_other:
            self._lost += (of_chain - sum(worths)) / rate

    def _widen(
        self, tree: DraftTree, net: dict[int, float], reach: list[float], brings: list[float], prices: Prices
    ) -> list[int]:
        """More nodes than pay, to see whether they are accepted."""
        count = max(WIDER * len(net), 2)
        nodes = sorted(tree.most_probable(count))
        log_used = prices.union.start() + sum(brings[node] for node in nodes)
        spent = prices.milliseconds(len(nodes) + 1, log_used) - prices.milliseconds(1, prices.union.start())
        worth = sum(reach[node] for node in nodes) - self.rate * spent
        self._lost += max(sum(net.values()) - worth, 0.0) / self.rate
        return nodes


def _mean_milliseconds(seconds: Sequence[float]) -> float:
    """What took far longer than the others was the machine being busy with something else."""
    most = OUTLIER * sorted(seconds)[len(seconds) // 2]
    return 1000 * sum(min(each, most) for each in seconds) / len(seconds)
