"""Lease: memory of lenders that holds this rank's KV pages.

A lender's block is set aside before the first page lies in it; the lender keeps no other use of it
and cannot take it back. Whoever maps it keeps it alive (`PeerMemory`), so even a lender that dies
leaves its borrowers sound bytes; that the group has lost a rank, its board tells.
"""

from torch import Tensor

from torch_pd.config import EngineConfig
from torch_pd.dist import World
from torch_pd.peer import PeerMemory
from torch_pd.sizing import GIB, lent_bytes


class Lease:
    """The memory that lenders lend to borrowers; made by all ranks together.

    Args:
        config: peer_kv_gib, and data_ranks: the borrowers. All other ranks lend.
        world: the ranks.
        available: bytes that this rank could lend.
        account: what they are made of, in words.

    Raises:
        ValueError: on all ranks, if a lender lacks the memory or a link is missing.
    """

    def __init__(self, config: EngineConfig, world: World, available: int, account: str):
        borrowers = config.data_ranks or ()
        self.nbytes = int(config.peer_kv_gib * GIB)
        self.lends = world.rank not in borrowers
        """Whether this rank is a lender; else it is a borrower."""
        lenders = [rank for rank in range(world.size) if rank not in borrowers]
        error = None
        missing = [] if self.lends else [rank for rank in world.unlinked if rank in lenders]
        if self.lends and self.nbytes > available:
            error = (
                f"peer_kv_gib={config.peer_kv_gib}: rank {world.rank} is to lend "
                f"{self.nbytes / GIB:.2f} GiB, but has {max(0, available) / GIB:.2f} GiB to give "
                f"({account}): lower peer_kv_gib"
            )
        elif missing:
            error = (
                f"peer_kv_gib={config.peer_kv_gib}: the GPU of rank {world.rank} cannot reach that "
                f"of rank {', '.join(map(str, missing))} directly (NVML reports no peer access): "
                "leave peer_kv_gib out and use host_kv_gib, or choose GPUs that are linked"
            )
        for other in world.all_gather(error):
            if other is not None:
                raise ValueError(other)
        self._memory = PeerMemory(world.device)
        block = self._memory.allocate(self.nbytes if self.lends else 0)
        if world.device.type == "cpu" and self.lends:
            block.zero_()  # takes the memory now, not when a page comes
        arenas = self._memory.connect(f"{world.board.name}-lease", world.rank, world.size)
        self.parts: list[Tensor] = []
        """A borrower's: uint8, its part of each lender's block, mapped here."""
        if not self.lends:
            share = lent_bytes(config.peer_kv_gib, len(borrowers))
            first = borrowers.index(world.rank) * share
            self.parts = [arenas[lender][first : first + share] for lender in lenders]

    def pages(self, page_bytes: int) -> list[Tensor]:
        """A borrower's pages of each lender, uint8 [n, page_bytes]; valid until `close`."""
        pages = []
        for part in self.parts:
            count = len(part) // page_bytes
            pages.append(part[: count * page_bytes].view(count, page_bytes))
        return pages

    def close(self) -> None:
        """Ends this rank's hold; nothing may use the pages any more. The memory is free once the
        lender and the borrowers have closed."""
        self.parts = []
        self._memory.close()
