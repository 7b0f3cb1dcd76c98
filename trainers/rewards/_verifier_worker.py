"""A process that compares formulas with math-verify. `verifier.py` starts it by path, feeds it and kills it.

It imports nothing of this package, whose import loads torch. Arguments: the time limit in seconds, the memory limit in bytes.
On stdin a JSON pair [gold, answer] a line; on stdout "ready" or why it cannot be, and then a verdict a line.
"""

import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable

# Seconds after which a worker kills itself. The parent is quicker unless it has died during a computation.
GRACE = 5.0
# math-verify takes i for imaginary only as a word of its own, and for a real variable in 4i.
IMAGINARY = re.compile(r"(?<=\d)i(?![a-zA-Z])")
# Below this, math-verify's rounding to six decimals makes different numbers equal; they may then differ by this share.
TINY = SHARE = 1e-3


def load() -> Callable[[str, str], str]:
    """Import math-verify; returns what gives the verdict on (gold, answer)."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, I, MatrixBase, Symbol

    # In a box and as LaTeX only: the whole string is the formula, and nothing is picked out of it. Units are split off before.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last")
    config = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=rules)]
    i = Symbol("i", real=False)

    def read(formula: str) -> Basic | MatrixBase | None:
        boxed = rf"\boxed{{{IMAGINARY.sub(' i', formula)}}}"
        found = parse(boxed, config, fallback_mode="no_fallback", parsing_timeout=None)
        if not found:
            return None
        return found[0].subs(i, I) if i in found[0].free_symbols else found[0]

    def judge(gold: str, answer: str) -> str:
        right = read(gold)
        if right is None:
            return "gold_unparseable"
        given = read(answer)
        if given is None:
            return "unparseable"
        try:
            equal = verify(right, given, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
        except MemoryError:
            raise  # this process ends
        except Exception:  # expressions that cannot be subtracted, ordered, solved
            equal = False
        return "equal" if equal and not differ_below_rounding(right, given) else "different"

    return judge


def differ_below_rounding(gold: object, answer: object) -> bool:
    try:
        one, other = complex(gold), complex(answer)  # type: ignore[call-overload]
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return False  # not numbers
    size = max(abs(one), abs(other))
    return size < TINY and abs(one - other) > SHARE * size


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the parent decides
    time_limit, memory = float(sys.argv[1]), int(sys.argv[2])
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # not on this platform, or the hard limit is lower already
    # Replies go to a copy of stdout, which libraries cannot print to.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    logging.disable()
    warnings.simplefilter("ignore")

    try:
        judge = load()
        judge(r"\frac{x}{2}", "0.5x")  # the first comparison builds the parser's tables
    except ImportError as error:
        replies.write(f"{error}".replace("\n", " ").encode() + b"\n")
        return
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, time_limit + GRACE)
        verdict = judge(gold, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(verdict.encode() + b"\n")


if __name__ == "__main__":
    main()
