"""Work that threads do ahead of who needs it: in order, and bounded in memory by the pixels that wait."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD = 4  # items that are worked on before they are needed
# Pixels that wait: two images of 4000 x 4000, so 100 MB as they are and about 1 GB with the maps of six tasks.
PIXELS = 2**25

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_background(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int = AHEAD,
    pixels: Callable[[Item], int] = lambda _: 0,
) -> Iterator[Result]:
    """map(function, items) by threads, in order, before the consumer asks.

    Args:
      function: of one item.
      items: taken one after another, when there is room.
      ahead: so many are worked on at most.
      pixels: of an item; those that wait have at most PIXELS together, unless it is a single one.

    Returns:
      The results.
    """
    pool = ThreadPoolExecutor(ahead)
    waiting: deque[tuple[Future[Result], int]] = deque()
    held = 0
    try:
        for item in items:
            weight = pixels(item)
            while waiting and held + weight > PIXELS:
                future, freed = waiting.popleft()
                yield future.result()
                del future  # and with it the result
                held -= freed
            waiting.append((pool.submit(function, item), weight))
            held += weight
            del item
            if len(waiting) == ahead:
                future, freed = waiting.popleft()
                yield future.result()
                del future
                held -= freed
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
