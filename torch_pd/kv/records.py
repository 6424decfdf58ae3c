"""RecordIndex: which content lies in which record of the disk tier's file."""

from collections import OrderedDict


class RecordIndex:
    """The records ``0 .. num_records - 1``; the one used longest ago is given up first.

    A record is free, being written (nobody finds it), found by its content's digest, or held by
    someone who alone knows what is in it.
    """

    def __init__(self, num_records: int) -> None:
        self.num_records = num_records
        self._free = list(range(num_records - 1, -1, -1))
        self._record_of: OrderedDict[bytes, int] = OrderedDict()  # oldest first; not the pinned
        self._pinned: dict[bytes, tuple[int, int]] = {}  # record and how many pins
        self._pinned_digest: dict[int, bytes] = {}  # by record
        self._held: set[int] = set()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._record_of or digest in self._pinned

    def __len__(self) -> int:
        return len(self._record_of) + len(self._pinned)

    @property
    def num_held(self) -> int:
        """Records without a digest."""
        return len(self._held)

    def allocate(self) -> int | None:
        """A record to be written, None if all are pinned, held or being written."""
        if self._free:
            return self._free.pop()
        if self._record_of:
            return self._record_of.popitem(last=False)[1]
        return None

    def put(self, digest: bytes, record: int) -> None:
        """A record from allocate was written; a second one of the same content is free again."""
        if digest in self:
            self._free.append(record)
        else:
            self._record_of[digest] = record

    def hold(self, record: int) -> None:
        """A record from allocate was written with what only the caller knows."""
        self._held.add(record)

    def give_back(self, record: int) -> None:
        """A record from allocate was not written, or one that was held is not needed any more."""
        self._held.discard(record)
        self._free.append(record)

    def pin(self, digest: bytes) -> int:
        """The record of a digest, which stays until `unpin`."""
        if digest in self._pinned:
            record, count = self._pinned[digest]
        else:
            record, count = self._record_of.pop(digest), 0
            self._pinned_digest[record] = digest
        self._pinned[digest] = record, count + 1
        return record

    def unpin(self, digest: bytes) -> None:
        """Ends a `pin`."""
        record, count = self._pinned.pop(digest)
        if count > 1:
            self._pinned[digest] = record, count - 1
        else:
            del self._pinned_digest[record]
            self._record_of[digest] = record

    def pinned_digest(self, record: int) -> bytes | None:
        """Of a pinned record; None if the record is held."""
        return self._pinned_digest.get(record)

    def drop(self, digest: bytes) -> None:
        """Forgets a record that cannot be read, unless others have pinned it; it is written to
        again."""
        if digest in self._record_of:
            self._free.append(self._record_of.pop(digest))

    def check(self, num_writing: int) -> None:
        """Raises AssertionError if a record is lost or in two places."""
        pinned = [record for record, _ in self._pinned.values()]
        found = sorted([*self._free, *self._record_of.values(), *pinned, *self._held])
        assert len(found) == len(set(found)), f"records in two places: {found}"
        assert len(found) + num_writing == self.num_records, (
            f"{len(found)} records and {num_writing} being written of {self.num_records}"
        )
        names = {digest: record for record, digest in self._pinned_digest.items()}
        assert names == {digest: record for digest, (record, _) in self._pinned.items()}
        assert not names.keys() & self._record_of.keys(), "a record is both pinned and not"
