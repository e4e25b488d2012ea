"""Token buckets: how often something may happen, with a burst. And memory that is bounded, however much comes."""

from collections import OrderedDict
from collections.abc import Hashable


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


class Kept[Value, Key: Hashable = str](OrderedDict[Key, Value]):
    """The values of the last `most` keys that were asked for: how ever many come, it holds no more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def asked_for(self, key: Key) -> Value | None:
        found = self.get(key)
        if found is not None:
            self.move_to_end(key)
        return found

    def keep(self, key: Key, value: Value) -> Value:
        self[key] = value
        if len(self) > self._most:
            self.popitem(last=False)
        return value


class Lately:
    """What was noted within the last `seconds`, or twice that at most; of more than `most` in that time it forgets the
    earlier ones sooner. Keeps 64 bits of each, so it may seldom take one for another."""

    def __init__(self, seconds: float, most: int, now: float) -> None:
        self._seconds, self._most = seconds, most
        self._since = now
        self._earlier, self._noted = set[int](), set[int]()

    def __len__(self) -> int:
        return len(self._earlier) + len(self._noted)

    def again(self, what: Hashable, now: float) -> bool:
        """Notes it. Whether it was noted before."""
        if now - self._since > self._seconds or len(self._noted) >= self._most:
            self._earlier = self._noted if now - self._since <= 2 * self._seconds else set()
            self._noted, self._since = set(), now
        noted = hash(what)
        before = noted in self._noted or noted in self._earlier
        self._noted.add(noted)
        return before
