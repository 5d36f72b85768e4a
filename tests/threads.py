"""Running something in several threads at once."""

import threading
from collections.abc import Callable


def in_threads(count: int, run: Callable[[int], object]) -> None:
    """Call `run(0)` to `run(count - 1)` at once and wait for all; what one raises is raised here."""
    errors: list[BaseException] = []
    gate = threading.Barrier(count)

    def guarded(number: int) -> None:
        try:
            gate.wait(10)
            run(number)
        except BaseException as error:  # noqa: BLE001 - told in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
