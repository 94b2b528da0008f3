"""One measurement in a fresh process: a specification on stdin, the figure as the last line of stdout."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from typing import Any

from bench.context import Context, Figure, quiet
from bench.peers import Access, create_namespace


def main() -> None:
    """Run the function that stdin names."""
    specification: dict[str, Any] = json.load(sys.stdin)
    cpu = specification["cpu"]
    if cpu is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})
    warnings.simplefilter("ignore")  # the peers' experimental warnings
    quiet()
    context = Context(
        specification["peer"],
        Access(**specification["access"]),
        specification["namespace"],
        specification["params"],
    )
    create_namespace(context.peer, context.access, context.namespace)
    function = getattr(importlib.import_module(specification["module"]), specification["function"])
    figure: Figure = function(context)
    print(json.dumps(figure.as_json()), flush=True)


if __name__ == "__main__":
    main()
    # No storage is worth a slow farewell: interpreters of 100 000 trials take seconds to end.
    sys.stdout.flush()
    os._exit(0)
