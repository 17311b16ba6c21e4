"""How much longer a run takes, from what was predicted and what its events have shown.

    left = TimeLeft();  left.take(event) for every event;  left.seconds

What is left is counted in pieces, each at its own price:

- **updates**, by the tokens that are left. The price of a token is a mean over the updates so far in which an update's
  weight halves with every quarter of the work done that lies behind it, so that a lasting change of the machine is
  followed and noise is not. It is blended with the predicted price by precision: a prediction weighs as much as the
  error that predictions have (more after a probe), the updates as much as their number and their scatter say.
- **evaluations and checkpoints** that are still to come, by the median of those that were measured; before the first,
  by the prediction, corrected as the updates corrected theirs.
- **the end of the run**: the evaluation of base and tuned on the same rows, and the writing of the outputs.

An update that took more than `OUTLIER` times the usual price (a laptop that slept, a machine that swapped) counts as a
usual one. The time that it lost, together with its neighbours', is expected again as often as it has happened, but for
once, which is no rule; how much is then lost is the median of what was.

Units: seconds.
"""

import math
import statistics
from dataclasses import dataclass

from halfbyte.train.events import Event

OUTLIER = 3.0
USUAL_OF = 17
"""Updates whose median is the usual price."""
HALF_LIFE = 1 / 4
"""Share of the work done after which an update's weight has halved."""
PREDICTION_ERROR, PROBED_ERROR = 0.5, 0.12
"""Standard deviations of ln(measured / predicted): before a probe and after (`plan.calibration`)."""
SCATTER_GUESS, GUESS_WEIGHT = 0.15, 5
"""Standard deviation of ln(price of an update) before there are any, and how many updates that guess counts as."""
FIRST_SCATTER = 0.5
"""The first update alone."""
PLANNED_AT_END = 2
"""Evaluations at the end of a run that a plan counts, base and tuned, whatever the run then does."""
MOST_RECORDS = 1024


@dataclass
class _Record:
    """An update, or several old ones together: tokens, and seconds, without what was lost."""

    tokens: float
    seconds: float


@dataclass
class _Loss:
    """Updates in a row that took far too long: tokens seen when they ended, and the seconds that they lost."""

    position: float
    seconds: float


class TimeLeft:
    """See the module. Knows events and nothing else; those of older versions lack what is predicted and to come."""

    def __init__(self) -> None:
        self.total_steps = 0
        self.step = 0
        self.tokens = 0
        self.total_tokens: int | None = None
        self._plan: Event = {}
        self._prediction: Event = {}
        self._records: list[_Record] = []
        self._losses: list[_Loss] = []
        self._recent: list[tuple[float, float, float]] = []
        self._losing = False
        self._updates = 0
        self._seen = self._work = 0
        self._evaluations: list[float] = []
        self._saves: list[float] = []
        self._best = 0
        self._evaluated_step = self._saved_step = 0

    def take(self, event: Event) -> None:
        """Learn from any event."""
        kind = event["event"]
        if kind in ("start", "resume"):
            self.total_steps, self.total_tokens = event["total_steps"], event.get("total_tokens")
            self.step, self.tokens = event["step"], event.get("tokens", 0)
            self._plan, self._prediction = event, event.get("predicted") or {}
            self._evaluated_step = self._saved_step = self.step
        elif kind == "rehearsal":
            self._prediction = event.get("predicted") or self._prediction
        elif kind == "step":
            self._take_step(event)
        elif kind == "eval":
            self._evaluations.append(event["seconds"])
            self._evaluated_step = event["step"]
            self._best += bool(event.get("best"))
        elif kind == "checkpoint":
            self._saves.append(event["seconds"])
            self._saved_step = event["step"]

    def _take_step(self, event: Event) -> None:
        updates, self.step = max(1, event["step"] - self.step), event["step"]
        self.tokens += event["tokens"]
        if event["seconds"] <= 0 or event["tokens"] <= 0:
            return
        if self._seen == 1:  # the first paid for page faults, the choice of kernels, GaLore's projections
            self._forget()
        self._seen += 1
        self._updates += updates
        self._work += event["tokens"]
        self._recent = [*self._recent[1 - USUAL_OF :], (self._work, event["tokens"], event["seconds"])]
        if self._seen <= USUAL_OF:  # few enough to judge all of them again
            self._records, self._losses, self._losing = [], [], False
            for recent in self._recent:
                self._record(*recent)
        else:
            self._record(*self._recent[-1])
        if len(self._records) > MOST_RECORDS:
            self._records = _merged(self._records)

    def _forget(self) -> None:
        """Begin anew with the updates."""
        self._records, self._losses, self._recent = [], [], []
        self._losing = False
        self._updates = 0

    def _record(self, position: float, tokens: float, seconds: float) -> None:
        """Note an update, or a few in one event, that ended when `position` tokens had been seen."""
        usual = statistics.median_low(self._prices()) * tokens
        before, self._losing = self._losing, seconds > OUTLIER * usual
        if self._losing:
            if not before:
                self._losses.append(_Loss(position, 0.0))
            self._losses[-1].position = position
            self._losses[-1].seconds += seconds - usual
        self._records.append(_Record(tokens, usual if self._losing else seconds))

    def _prices(self) -> list[float]:
        """Seconds a token of the last updates."""
        return [seconds / tokens for _, tokens, seconds in self._recent]

    @property
    def tokens_per_second(self) -> float | None:
        """The rate that is expected to go on; None before the first step."""
        price = self._shown()
        return None if price is None else 1 / price

    @property
    def seconds(self) -> float | None:
        """Seconds until everything is written; None before the first step, unless something was predicted."""
        price, total = self._price(), self.total_tokens
        if price is None:
            return None
        if total is None:
            if self.step == 0:
                return None
            total = round(self.tokens / self.step * self.total_steps)
        updates = max(0, total - self.tokens) * price
        return updates + self._beside(updates)

    def _shown(self) -> float | None:
        """Seconds a token, as the updates so far tell; None before the first."""
        done = sum(record.tokens for record in self._records)
        if not done:
            return None
        seconds, tokens, behind = 0.0, 0.0, 0.0
        for record in reversed(self._records):
            weight = 0.5 ** (behind / (HALF_LIFE * done))
            seconds += weight * record.seconds
            tokens += weight * record.tokens
            behind += record.tokens
        if len(self._losses) > 1:
            losses = sum(0.5 ** ((self._work - loss.position) / (HALF_LIFE * done)) for loss in self._losses)
            losses *= 1 - 1 / len(self._losses)  # once is no rule
            seconds += losses * statistics.median(loss.seconds for loss in self._losses)
        return seconds / tokens

    def _predicted(self, phase: str) -> float | None:
        """Seconds of a phase of the whole run, as they were predicted."""
        found = self._prediction.get("seconds", {}).get(phase)
        return float(found) if found and found > 0 else None

    def _price(self) -> float | None:
        """Seconds a token: what was shown and what was predicted, by their precision."""
        shown, train = self._shown(), self._predicted("train")
        if train is None or not self.total_tokens:
            return shown
        predicted = train / self.total_tokens
        if shown is None:
            return predicted
        error = PROBED_ERROR if self._prediction.get("probed") else PREDICTION_ERROR
        scatter = self._scatter() if self._seen > 1 else FIRST_SCATTER
        ours, theirs = self._updates / scatter**2, 1 / error**2
        return math.exp((ours * math.log(shown) + theirs * math.log(predicted)) / (ours + theirs))

    def _scatter(self) -> float:
        """The standard deviation of ln(price of an update), shrunk towards a guess where updates are few."""
        logs = [math.log(price) for price in self._prices()]
        middle = statistics.median(logs)
        found = 1.4826 * statistics.median(abs(value - middle) for value in logs)
        n = len(logs)
        return math.sqrt((GUESS_WEIGHT * SCATTER_GUESS**2 + n * found**2) / (GUESS_WEIGHT + n))

    def _beside(self, updates: float) -> float:
        """Seconds of everything that is left and no update; `updates`: seconds of those."""
        evaluations = self._to_come(self._plan.get("eval_every"), self._evaluated_step)
        final = float(self._plan.get("final_evaluations") or 0)
        # An evaluation that is the best so far is saved; the last one is followed by the last checkpoint anyway.
        best = self._best / len(self._evaluations) if self._evaluations else 1.0
        saves = self._to_come(self._plan.get("save_steps"), self._saved_step) + best * max(0, evaluations - 1)
        if minutes := self._plan.get("save_minutes"):
            saves += updates // (60 * minutes)
        seconds = (evaluations + final) * self._evaluation_price() + saves * self._save_price()
        return seconds + (self._predicted("save") or 0.0)

    def _to_come(self, every: int | None, done_at: int) -> int:
        """How often something is still due that is done every so many steps (None, 0: never) and after the last.

        0 for events that say nothing about it; `done_at` is the last step at which it was done.
        """
        if "eval_every" not in self._plan or every == 0:
            return 0
        total, step = self.total_steps, self.step
        due = total // every - step // every + (total % every > 0) if every else 1
        if step >= total:
            due = 0
        now = step > 0 and (step == total or (every is not None and step % every == 0)) and done_at < step
        return due + now

    def _evaluation_price(self) -> float:
        if self._evaluations:
            return statistics.median(self._evaluations[-5:])
        predicted, train, price = self._predicted("evaluate"), self._predicted("train"), self._price()
        if predicted is None:
            return 0.0
        every = self._plan.get("eval_every")
        passes = (-(-self.total_steps // every) if every else every is None) + PLANNED_AT_END
        slower = price * self.total_tokens / train if price and train and self.total_tokens else 1.0
        return slower * predicted / max(1, passes)

    def _save_price(self) -> float:
        return statistics.median(self._saves[-5:]) if self._saves else 0.0


def _merged(records: list[_Record]) -> list[_Record]:
    """Half as many, the older ones in pairs of neighbours; the last stays as it is where they are odd."""
    pairs = [
        _Record(a.tokens + b.tokens, a.seconds + b.seconds) for a, b in zip(records[::2], records[1::2], strict=False)
    ]
    return pairs + records[len(pairs) * 2 :]
