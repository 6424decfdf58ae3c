"""DecodeGraphs: one CUDA graph for each bucket of rows of a decoding step."""

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGEST = 1024
"""Rows of the largest captured step; the launches of a larger one are nothing beside its work."""


def largest_graph(max_num_seqs: int) -> int:
    """Rows of the largest graph of an engine."""
    return min(LARGEST, max_num_seqs)


def bucket_sizes(most: int) -> list[int]:
    """Rows for which graphs are captured, rising to ``most``: about a sixteenth apart, since large
    steps take time by the row, also by those that pad them."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 256, 16), *range(256, 512, 32)]
    sizes += [*range(512, most, 64)]
    return [size for size in sizes if size < most] + [most]


class DecodeGraphs:
    """Captured passes over fixed addresses, replayed with one launch each.

    Args:
        sizes: rows of each graph, rising.
        prepare: called with a number of rows, and whether they are halved, before each capture;
            returns the pass to capture, which may hold collectives and must not wait for the
            device. It runs once eagerly and once captured; what it returns is kept and handed out
            by `replay`.
        halved: sizes that are captured in half-batches too.

    Raises:
        RuntimeError: the pass cannot be captured.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        prepare: Callable[[int, bool], Callable[[], Tensor]],
        halved: Sequence[int] = (),
    ):
        self.sizes = list(sizes)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        kinds = [(size, False) for size in sizes] + [(size, True) for size in halved]
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        gc.collect()
        # Largest first: the smaller ones find room in the memory of the larger.
        with torch.cuda.stream(stream):
            for kind in sorted(kinds, reverse=True):
                run = prepare(*kind)
                run()  # chooses algorithms and loads kernels
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                # Other threads, such as a watchdog of collectives, may call CUDA meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    out = run()
                finally:
                    graph.capture_end()
                self._graphs[kind] = graph, out
        torch.cuda.current_stream().wait_stream(stream)

    def size_for(self, rows: int) -> int | None:
        """The smallest captured size of at least ``rows``, None if there is none."""
        place = bisect_left(self.sizes, rows)
        return self.sizes[place] if place < len(self.sizes) else None

    def halves(self, size: int) -> bool:
        """Whether the size was captured in half-batches too."""
        return (size, True) in self._graphs

    def replay(self, size: int, halved: bool = False) -> Tensor:
        """Launches the graph on the current stream; its result, overwritten by the next replay of
        any size."""
        graph, out = self._graphs[size, halved]
        graph.replay()
        return out
