"""Hash tables in numpy arrays, for thousands of keys at a time. Keys are 64-bit hashes (int64) and stand for what was
hashed: among 2^24 of them two are the same with a probability of 1e-5."""

import numpy as np


class HashTable:
    """Key -> entry, numbered from 1 on as they come; 0 is no entry. `columns`: a value for each entry, 0 for new ones.

    Open addressing with double hashing, a quarter full at most, and half full at `max_entries`. An entry takes 8 bytes
    for its key and those of its columns, up to twice as much after arrays have doubled, and 8 to 32 for its slots.
    """

    def __init__(self, max_entries: int, **columns: type):
        self.max_entries, self.size = max_entries, 1
        self.slots, self.keys = np.zeros(2, np.int32), np.zeros(1, np.int64)
        self.columns = {name: np.zeros(1, dtype) for name, dtype in columns.items()}

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (self.slots, self.keys, *self.columns.values()))

    def find(self, keys: np.ndarray) -> np.ndarray:
        entries = np.zeros(len(keys), np.int64)
        left = self.slots[self._first_slots(keys)].nonzero()[0]  # most that are absent are seen to be at once
        entries[left] = self._probe(keys[left], adds=False)
        return entries

    def find_or_add(self, keys: np.ndarray) -> np.ndarray:
        """The keys may repeat."""
        self._make_room(self.size + len(keys))
        return self._probe(keys, adds=True)

    def _probe(self, keys: np.ndarray, adds: bool) -> np.ndarray:
        entries, pending, slots = np.zeros(len(keys), np.int64), np.arange(len(keys)), self._first_slots(keys)
        while len(pending):
            found = self.slots[slots]
            if adds:
                empty = np.flatnonzero(found == 0)
                self._claim(slots[empty], keys[empty])
                found[empty] = self.slots[slots[empty]]
            entries[pending] = found
            left = ((found != 0) & (self.keys[found] != keys)).nonzero()[0]
            pending, keys, slots = pending[left], keys[left], slots[left]
            slots = self._next_slots(slots, keys)
        return entries

    def _claim(self, slots: np.ndarray, keys: np.ndarray) -> None:
        """New entries in empty slots; of several keys that want one slot, one has it."""
        claims = np.arange(len(slots), dtype=np.int32)
        self.slots[slots] = claims
        winners = np.flatnonzero(self.slots[slots] == claims)
        new = np.arange(self.size, self.size + len(winners))
        self.slots[slots[winners]], self.keys[new] = new, keys[winners]
        self.size += len(winners)

    def _make_room(self, size: int) -> None:
        if size > len(self.keys):
            more = max(size, min(2 * len(self.keys), self.max_entries)) - len(self.keys)
            self.keys = np.append(self.keys, np.zeros(more, np.int64))
            self.columns = {name: np.append(c, np.zeros(more, c.dtype)) for name, c in self.columns.items()}
        if len(self.slots) < (room := min(4 * size, 2 * max(size, self.max_entries))):
            self.slots = np.zeros(1 << (room - 1).bit_length(), np.int32)
            entries, keys = np.arange(1, self.size, dtype=np.int32), self.keys[1 : self.size]
            slots = self._first_slots(keys)
            while len(entries):
                free = self.slots[slots] == 0
                self.slots[slots[free]] = entries[free]
                left = self.slots[slots] != entries
                entries, keys, slots = entries[left], keys[left], slots[left]
                slots = self._next_slots(slots, keys)

    def _first_slots(self, keys: np.ndarray) -> np.ndarray:
        """By the highest bits: `SampledTable` chooses by the lowest."""
        mask = len(self.slots) - 1
        return (keys >> (64 - mask.bit_length())) & mask

    def _next_slots(self, slots: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return (slots + ((keys >> 20) | 1)) & (len(self.slots) - 1)


def is_kept(keys: np.ndarray, every: int) -> np.ndarray:
    """One in `every`, a power of two, chosen by the keys themselves."""
    return keys & (every - 1) == 0


class SampledTable:
    """Key -> position for at most `limit` keys, multiples of `every`, which doubles when it is full."""

    def __init__(self, limit: int, every: int = 1):
        self.limit, self.every = limit, every
        self._table = HashTable(limit, after=np.int64)  # the position + 1

    @property
    def size(self) -> int:
        return self._table.size - 1

    @property
    def num_bytes(self) -> int:
        return self._table.num_bytes

    @property
    def positions(self) -> np.ndarray:
        """Of all keys, in the order in which they came."""
        return self._table.columns["after"][1 : self._table.size] - 1

    def keeps(self, keys: np.ndarray) -> np.ndarray:
        return is_kept(keys, self.every)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The position of each key, or -1."""
        return self._table.columns["after"][self._table.find(keys)] - 1

    def add(self, keys: np.ndarray, positions: np.ndarray, since: int = 0) -> np.ndarray:
        """The position of each of these different keys: its own if there was none from `since` on, and kept then."""
        num_known, entries = self.size, self._table.find_or_add(keys)
        after = self._table.columns["after"]
        found = after[entries] - 1
        is_new = found < since
        after[entries[is_new]] = positions[is_new] + 1
        if num_known + is_new.sum() > self.limit:
            self._thin(num_known, keys[is_new])
        return np.where(is_new, positions, found)

    def _thin(self, num_known: int, new: np.ndarray) -> None:
        used = slice(1, self._table.size)
        keys, positions = self._table.keys[used], self.positions
        while self.keeps(keys[:num_known]).sum() + self.keeps(new).sum() > self.limit:
            self.every *= 2
        kept, self._table = self.keeps(keys), HashTable(self.limit, after=np.int64)
        self.add(keys[kept], positions[kept])

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys in their order, and their positions."""
        keys = np.sort(self._table.keys[1 : self._table.size])
        return keys, self.find(keys)
