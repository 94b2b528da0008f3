"""Run the schedules of these seeds, or of a range FIRST:END; print what happened in one, or which failed."""

from __future__ import annotations

import argparse
import time

from tests.simulation.mistakes import MISTAKES
from tests.simulation.schedule import MASTERS, Runner, Setup


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", help="a seed, or FIRST:END")
    parser.add_argument("--masters", choices=MASTERS, default="plain")
    parser.add_argument("--mistake", choices=MISTAKES, help="make it")
    options = parser.parse_args()
    first, _, end = options.seeds.partition(":")
    seeds = range(int(first), int(end) if end else int(first) + 1)
    runner = Runner()
    setup = MISTAKES[options.mistake] if options.mistake else Setup(masters=options.masters)
    failed = messages = trials = reads = 0
    start = time.perf_counter()
    try:
        for seed in seeds:
            result = runner.run(seed, setup, keeps_trace=len(seeds) == 1)
            messages += result.messages
            trials += result.trials
            reads += result.reads
            if result.lines is not None:
                print("\n".join(result.lines))
            if result.problem is not None:
                failed += 1
                print(f"seed {seed}: {result.problem}", flush=True)
    finally:
        runner.close()
    took = time.perf_counter() - start
    print(
        f"{len(seeds)} schedules, {failed} failed; {messages} messages, {trials} trials, {reads} reads; "
        f"{took:.1f} s, {1000 * took / len(seeds):.1f} ms each"
    )
    return failed > 0


if __name__ == "__main__":
    raise SystemExit(main())
