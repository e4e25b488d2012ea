"""Token buckets: how often something may happen, with a burst."""

from collections import OrderedDict


class Bucket:
    """Holds `burst` tokens when full, and gets `rate` a second. `now` is in seconds, of any clock that only goes on."""

    __slots__ = ("burst", "filled", "level", "rate")

    def __init__(self, burst: float, rate: float, now: float) -> None:
        self.burst, self.rate = burst, rate
        self.level, self.filled = burst, now

    def fill(self, now: float) -> float:
        self.level = min(self.burst, self.level + (now - self.filled) * self.rate)
        self.filled = now
        return self.level

    def take(self, now: float) -> bool:
        if self.fill(now) < 1:
            return False
        self.level -= 1
        return True

    def give_back(self) -> None:
        self.level = min(self.burst, self.level + 1)


class Kept[Value](OrderedDict[str, Value]):
    """The values of the last `most` keys that were asked for: how ever many come, it holds no more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def asked_for(self, key: str) -> Value | None:
        found = self.get(key)
        if found is not None:
            self.move_to_end(key)
        return found

    def keep(self, key: str, value: Value) -> Value:
        self[key] = value
        if len(self) > self._most:
            self.popitem(last=False)
        return value
