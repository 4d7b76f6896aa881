"""A conversion in a process of its own that says which phase it is in: the worker of peak_memory.py.

    convert_worker.py OPTIONS     as JSON; source and output among them

Writes a JSON line to stdout where a phase begins or ends, for what is said, and at last for its own peak.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from skipcat_edge.bench_worker import peak_rss_bytes
from skipcat_edge.conversion import convert
from skipcat_edge.errors import UserError


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


@contextmanager
def phase(title: str, total: float) -> Iterator[Callable[[float], None]]:
    tell(begin=title)
    yield lambda amount: None
    tell(end=title)


def main() -> None:
    try:
        convert(**json.loads(sys.argv[1]), phase=phase, warn=lambda text: tell(said=text))
    except UserError as error:
        tell(error=error.message)
        sys.exit(2)
    finally:
        tell(peak=peak_rss_bytes())


if __name__ == "__main__":
    main()
