"""Which of two implementations of an operation computes a call: named, or measured once for every shape and remembered.

A measurement may turn out either way from run to run, and the two differ in their last bits. So what was chosen can be read
(`choices`), kept with a run and set again (`set_choices`): a resumed run then computes what it would have computed.
"""

import logging
from collections.abc import Callable, Mapping

import torch

_log = logging.getLogger("fastgrpo")

AUTO = "auto"


def milliseconds(call: Callable[[], object], repeats: int = 5, calls: int = 4) -> float:
    """Of one call on the current CUDA device: the median over repeats, after three calls that do not count."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[repeats // 2]


class Backends:
    """The two backends of one operation, and which of them computes which calls.

    operation: its name, for messages. always: the backend that every machine has. other: the one that may be missing.
    why_not: () -> None if `other` can be had here, else the reason in a line. failures: what a call of `other` raises where
    it cannot compute. clock: a call -> how long it takes.
    """

    def __init__(
        self,
        operation: str,
        always: str,
        other: str,
        why_not: Callable[[], str | None],
        failures: type[Exception],
        clock: Callable[[Callable[[], object]], float] = milliseconds,
    ) -> None:
        self.operation, self.always, self.other = operation, always, other
        self._why_not, self._failures, self._clock = why_not, failures, clock
        self._setting = AUTO
        self._chosen: dict[str, str] = {}
        self._told: set[str] = set()

    def set(self, name: str) -> None:
        """From now on use the backend of this name for every call, or with "auto" the faster one for each kind of call.

        Raises ValueError for another name, and for `other` where it cannot be had.
        """
        accepted = (AUTO, self.always, self.other)
        if name not in accepted:
            raise ValueError(f"the backend of {self.operation} is {name!r}; {', '.join(accepted)} are accepted")
        if name == self.other and (reason := self._why_not()):
            raise ValueError(f"the backend of {self.operation} cannot be {name!r}: {reason}")
        self._setting = name

    def choices(self) -> dict[str, str]:
        """What "auto" has chosen so far: kind of call -> backend; plain strings, so that a run can keep them as JSON."""
        return dict(self._chosen)

    def set_choices(self, choices: Mapping[str, str]) -> None:
        """Replace what "auto" has chosen by the `choices` of an earlier run; kinds of calls not among them are measured.

        Raises ValueError where a backend is not one of the two. One that cannot be had here is given up when it is called
        for, with a warning.
        """
        for key, name in choices.items():
            if name not in (self.always, self.other):
                raise ValueError(
                    f"the backend of {self.operation} chosen for {key!r} is {name!r}; {self.always} and {self.other} are "
                    "accepted"
                )
        self._chosen = dict(choices)

    def choose(self, key: str, calls: Mapping[str, Callable[[], object]]) -> str:
        """The name of the backend for the call at hand. key: its kind. calls: backend -> the call made with it."""
        if self._setting != AUTO:
            return self._setting
        name = self._chosen.get(key)
        if name is None or (name == self.other and self._why_not()):
            name = self._chosen[key] = self._measured(calls)
        return name

    def _measured(self, calls: Mapping[str, Callable[[], object]]) -> str:
        if reason := self._why_not():
            return self._only_always(reason)
        if torch.cuda.is_current_stream_capturing():
            return self.always  # nothing can be timed inside of a graph
        try:
            times = {name: self._clock(call) for name, call in calls.items()}
        except self._failures as error:
            return self._only_always(str(error))
        return min(times, key=times.__getitem__)

    def _only_always(self, reason: str) -> str:
        """Says why, once for every reason."""
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("%s: %s only, since %s cannot be used: %s", self.operation, self.always, self.other, reason)
        return self.always
