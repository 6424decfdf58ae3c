"""RecordIndex: which content lies in which record of the disk tier's file."""

from collections import OrderedDict


class RecordIndex:
    """Digests of the records ``0 .. num_records - 1``; the one used longest ago is given up first.

    A record is free, being written (nobody finds it), or found by its digest.
    """

    def __init__(self, num_records: int) -> None:
        self.num_records = num_records
        self._free = list(range(num_records - 1, -1, -1))
        self._record_of: OrderedDict[bytes, int] = OrderedDict()  # oldest first
        self._pinned: dict[bytes, int] = {}  # how many readers

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._record_of

    def __len__(self) -> int:
        return len(self._record_of)

    def allocate(self) -> int | None:
        """A record to be written, None if all are being read or written."""
        if self._free:
            return self._free.pop()
        for digest in self._record_of:
            if digest not in self._pinned:
                return self._record_of.pop(digest)
        return None

    def put(self, digest: bytes, record: int) -> None:
        """A record from allocate was written; a second one of the same content is free again."""
        if digest in self._record_of:
            self._free.append(record)
        else:
            self._record_of[digest] = record

    def give_back(self, record: int) -> None:
        """A record from allocate was not written."""
        self._free.append(record)

    def pin(self, digest: bytes) -> int:
        """The record of a digest, which stays until `unpin`."""
        self._record_of.move_to_end(digest)
        self._pinned[digest] = self._pinned.get(digest, 0) + 1
        return self._record_of[digest]

    def unpin(self, digest: bytes) -> None:
        """Ends a `pin`."""
        self._pinned[digest] -= 1
        if not self._pinned[digest]:
            del self._pinned[digest]

    def drop(self, digest: bytes) -> None:
        """Forgets a record that cannot be read; it is written to again."""
        assert digest not in self._pinned
        self._free.append(self._record_of.pop(digest))

    def check(self, num_writing: int) -> None:
        """Raises AssertionError if a record is lost or in two places."""
        found = sorted([*self._free, *self._record_of.values()])
        assert len(found) == len(set(found)), f"records in two places: {found}"
        assert len(found) + num_writing == self.num_records, (
            f"{len(found)} records and {num_writing} being written of {self.num_records}"
        )
        assert self._pinned.keys() <= self._record_of.keys(), "a record that is read is gone"
