r"""The math reward on answers as models write them, and its processes: slow, killed, forked, outlived."""

import gc
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("math_verify", reason="the trl extra is not installed")

from dppo_kernels.trainers.rewards import MathAnswerReward, verifier
from dppo_kernels.trainers.rewards.verifier import Verdict, Verifier

CASES = json.loads((Path(__file__).parents[2] / "golden" / "golden.json").read_text())["cases"]
GOLDEN = next(case for case in CASES if case["id"] == "s3.math_dapo_answers")
SLOW = ("1", "10^{10^{10}}")  # sympy multiplies it out

# (end of the completion, gold answer, right or wrong; None where the gold answer cannot be read)
ROWS = [
    # integers
    ("Answer: 34", "34", True),
    ("Answer: 35", "34", False),
    ("Answer: -34", "34", False),
    ("Answer: −34", "-34", True),
    ("Answer: 34.", "34", True),
    ("Answer: 34.0", "34", True),
    ("Answer: 17 \\cdot 2", "34", True),
    ("Answer: 3 4", "34", False),
    ("Answer: 3 4", "7", False),
    ("Answer: 3,4", "34", False),
    ("Answer: (3,4)", "34", False),
    ("Answer: 1,000", "1000", True),
    ("Answer: 12,345,678", "12345678", True),
    ("Answer: 1000", "1,000", True),
    ("Answer: 1.000", "1000", False),
    ("Answer: (1,000, 2)", "(1000, 2)", True),
    ("Answer: $2^{10}$", "1024", True),
    ("Answer: $5!$", "120", True),
    ("Answer: $\\binom{5}{2}$", "10", True),
    # where it stands
    ("Answer: 33\nAnswer: 34", "34", True),
    ("Answer: 34\nAnswer: 33", "34", False),
    ("**Answer:** 34", "34", True),
    ("**Answer: 34**", "34", True),
    ("Answer: **34** ", "34", True),
    ("Answer: $\\boxed{34}$", "34", True),
    ("The answer is 34", "34", False),
    ("thus $\\boxed{34}$.", "34", True),
    ("thus \\boxed{34}\nAnswer: 35", "34", False),
    ("the roots are $\\boxed{3}$ and $\\boxed{4}$", "4", False),
    ("the roots are $\\boxed{3}$ and $\\boxed{4}$", "3, 4", True),
    ("Answer:", "34", False),
    ("34", "34", False),
    # more, or less, than the number
    ("Answer: not 34", "34", False),
    ("Answer: not 0", "0", False),
    ("Answer: 34 or 35", "34", False),
    ("Answer: 34, 35", "34", False),
    ("Answer: at least 34", "34", False),
    ("Answer: 34x", "34", False),
    ("Answer: 34 thousand", "34", False),
    ("Answer: $x \\neq 34$", "34", False),
    ("Answer: $x \\not= 34$", "34", False),
    ("Answer: x != 34", "34", False),
    ("Answer: x < = 34", "34", False),
    ("Answer: $x+1$", "1", False),
    # fractions and decimals
    ("Answer: 1/2", "\\frac{1}{2}", True),
    ("Answer: \\frac12", "0.5", True),
    ("Answer: 0.5", "\\frac{1}{2}", True),
    ("Answer: $-\\dfrac{3}{4}$", "\\frac{-3}{4}", True),
    ("Answer: $\\frac{2}{6}$", "\\frac{1}{3}", True),
    ("Answer: $\\frac{3}{1}$", "\\frac{1}{3}", False),
    ("Answer: 0.33", "\\frac{1}{3}", False),
    ("Answer: 0.333333", "\\frac{1}{3}", True),
    ("Answer: $0.\\overline{3}$", "1/3", True),
    ("Answer: 1 1/2", "\\frac{3}{2}", True),
    ("Answer: 1 1/2", "\\frac{11}{2}", False),
    ("Answer: $1\\frac{1}{2}$", "1.5", True),
    ("Answer: .25", "1/4", True),
    ("Answer: 1.5e3", "1500", True),
    ("Answer: $3.5 \\times 10^4$", "35000", True),
    ("Answer: $2\\times10^{-9}$", "0.000000001", False),
    ("Answer: 0.0000002", "0.0000001", False),
    # percent, money, units
    ("Answer: 50%", "50", True),
    ("Answer: 50\\%", "0.5", True),
    ("Answer: 50", "50\\%", True),
    ("Answer: 0.5%", "0.5", False),
    ("Answer: 5%", "0.5", False),
    ("Answer: 12.5 percent", "12.5", True),
    ("Answer: \\$5.00", "5", True),
    ("Answer: $1,234", "1234", True),
    ("Answer: 5 dollars", "5", True),
    ("Answer: 12 cm", "12", True),
    ("Answer: $12\\text{ cm}^2$", "12", True),
    ("Answer: 12 cm", "12 m", False),
    ("Answer: 60 miles per hour", "60", True),
    ("Answer: 7 apples", "7", True),
    ("Answer: 90^\\circ", "90", True),
    ("Answer: 90°", "90^\\circ", True),
    ("Answer: 2:30 PM", "2:30 p.m.", True),
    ("Answer: 2:30 AM", "2:30 PM", False),
    # roots, constants, functions
    ("Answer: $2\\sqrt3$", "\\sqrt{12}", True),
    ("Answer: 2√3", "\\sqrt{12}", True),
    ("Answer: sqrt(12)", "2\\sqrt{3}", True),
    ("Answer: $\\frac{1}{\\sqrt{3}}$", "\\frac{\\sqrt{3}}{3}", True),
    ("Answer: $\\sqrt{2}$", "2", False),
    ("Answer: 36π", "36\\pi", True),
    ("Answer: 113.1", "36\\pi", False),
    ("Answer: $\\log_2 8$", "3", True),
    ("Answer: $\\sin(\\pi/6)$", "\\frac{1}{2}", True),
    # expressions and equations
    ("Answer: $x = 5$", "5", True),
    ("Answer: 5", "x = 5", True),
    ("Answer: $y = 5$", "x = 5", False),
    ("Answer: $x = 3, y = 4$", "4", False),
    ("Answer: $x = 3, y = 4$", "y = 4, x = 3", True),
    ("Answer: $f(x) = x^2$", "x^2", True),
    ("Answer: $(x+1)^2$", "x^2+2x+1", True),
    ("Answer: $(x-1)(x+2)$", "x^2-1", False),
    ("Answer: $\\frac{x}{2}$", "0.5x", True),
    ("Answer: $2x - y + 1 = 0$", "y = 2x + 1", True),
    # sets, tuples, intervals, inequalities
    ("Answer: $\\{2, 1\\}$", "\\{1,2\\}", True),
    ("Answer: 2 and 1", "1, 2", True),
    ("Answer: $x = 1$ or $x = 2$", "1, 2", True),
    ("Answer: $\\pm 2$", "2, -2", True),
    ("Answer: 1", "1, 2", False),
    ("Answer: 1, 2, 3", "1, 2", False),
    ("Answer: $(1, 2)$", "(1,2)", True),
    ("Answer: $(2, 1)$", "(1,2)", False),
    ("Answer: $(1, 3, 2)$", "(1,2,3)", False),
    ("Answer: $\\{1, 2\\}$", "(1, 2)", False),
    ("Answer: $(2, 1), (3, 4)$", "(1, 2), (3, 4)", False),
    ("Answer: $[2, \\infty)$", "[2,\\infty)", True),
    ("Answer: $(2, \\infty)$", "[2,\\infty)", False),
    ("Answer: $x \\ge 2$", "[2,\\infty)", True),
    ("Answer: $(3,\\infty) \\cup (-\\infty,2)$", "(-\\infty,2)\\cup(3,\\infty)", True),
    ("Answer: $34 > x$", "x < 34", True),
    ("Answer: $x \\le 34$", "x < 34", False),
    # complex numbers and matrices
    ("Answer: $4i + 3$", "3 + 4i", True),
    ("Answer: $3 - 4i$", "3 + 4i", False),
    ("Answer: $0.5 + 0.5i$", "\\frac{1+i}{2}", True),
    ("Answer: $\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}$", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", True),
    ("Answer: $\\begin{pmatrix} 1 & 2 \\\\ 4 & 3 \\end{pmatrix}$", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", False),
    # choices and words
    ("Answer: (B)", "B", True),
    ("Answer: \\text{(B)}.", "B", True),
    ("Answer: C", "B", False),
    ("Answer: \\text{Monday}", "Monday", True),
    ("Answer: monday", "Monday", True),
    ("Answer: Tuesday", "Monday", False),
    ("Answer: silent", "listen", False),
    ("Answer: ACB", "ABC", False),
    ("Answer: No", "Yes", False),
    ("Answer: a square", "square", True),
    # golds
    ("Answer: ]2,3]", "]2,3]", True),
    ("Answer: (2,3]", "]2,3]", None),
    ("Answer: 5", "", None),
    ("Answer: 5", "{5", None),
]
HOSTILE = [
    *(
        "10^{10^{10}}",
        "\\frac{1}{0}",
        "\\frac{0}{0}",
        "\\frac{",
        "}",
        "}{",
        "\\boxed{",
        "\\",
        "{" * 150,
        "1\x00",
        "😀",
        "\ud800",
        "\r\n",
    ),
    *(
        "9" * 290,
        "x" * 290,
        "=" * 290,
        "^" * 290,
        "\\sqrt" * 50,
        "1" * 10**6,
        "(" * 10**6,
        "\\input{/etc/passwd}",
        "__import__('os')",
    ),
]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids(judge: Verifier) -> list[int]:
    return [worker.process.pid for worker in judge._workers]


@pytest.fixture(scope="module")
def shared() -> Verifier:
    return Verifier()


@pytest.fixture(scope="module")
def rewards() -> list[float | None]:
    texts, golds, _ = zip(*ROWS, strict=True)
    return MathAnswerReward(correct=1.0, wrong=0.0)([f"Let me think. {text}" for text in texts], answer=list(golds))


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[f"{text[:30]}|{gold[:20]}" for text, gold, _ in ROWS])
def test_answers_of_models(rewards: list[float | None], row: int) -> None:
    assert rewards[row] == ROWS[row][2]


@pytest.mark.parametrize(
    ("boxed", "column"),
    [("never", "reward_without_box_fallback"), ("fallback", "reward_with_box_fallback(verl HEAD since #7407)")],
)
def test_published_cases(boxed: str, column: str) -> None:
    completions, golds = zip(*GOLDEN["inputs"]["cases"], strict=True)
    reward = MathAnswerReward(boxed=boxed, column="solution")
    assert reward(list(completions), solution=list(golds)) == GOLDEN["expected"][column]
    assert not pids(reward._verifier)  # strings were enough


def test_strict_mode_compares_exact_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reward = MathAnswerReward(boxed="only")
    completions = [r"\boxed{34}", r"\boxed{ 34 }", r"\boxed{34.0}", "Answer: 34", r"\boxed{34" + "}" * 200]
    assert reward(completions, answer=["34"] * 5) == [1.0, -1.0, -1.0, -1.0, -1.0]


def test_golds_that_are_worked_solutions() -> None:
    golds = [
        "48/2 = 24.\n48 + 24 = 72.\n#### 72",
        r"It follows that $x = \boxed{72}$.",
        "Add them.\nThere are 72 clips.",
        "7" * 1001,
    ]
    metrics: dict[str, float] = {}
    reward = MathAnswerReward()
    assert reward(["Answer: 72"] * 4, answer=golds, log_metric=metrics.__setitem__) == [1.0, 1.0, None, None]
    assert metrics["answers/gold_unparseable"] == 0.5


def test_chats_and_reports() -> None:
    extra: dict[str, list] = {}
    metrics: dict[str, float] = {}
    reward = MathAnswerReward(column="gold", max_answer_chars=8, time_limit=0.7)
    contents: list[Any] = ["Answer: 34", None, "Answer: 123456789", "Answer: 3 +", "Answer: \\frac{1}{3}x^2"]
    contents += [
        [{"type": "text", "text": "Answer: "}, {"type": "image"}, {"type": "text", "text": "35"}],
        "Answer: 9!!!!!",
        "Answer: 1",
    ]
    completions: list[Any] = [[{"role": "assistant", "content": content}] for content in contents]
    completions[0].insert(0, {"role": "assistant", "content": "Answer: 0"})
    golds = [34, "34", "34", "34", "34", "34", "1", "{1"]
    values = reward(completions, log_extra=extra.__setitem__, log_metric=metrics.__setitem__, gold=golds, prompts=golds)
    assert values == [1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, None]
    assert extra["acc"] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None]
    assert extra["extracted_answer"] == ["34", None, "123456789", "3 +", "\\frac{1}{3}x^2", "35", "9!!!!!", "1"]
    shares = {"correct": 1, "missing": 1, "too_long": 2, "unparseable": 1, "timeout": 1, "gold_unparseable": 1}
    assert metrics == {f"answers/{name}": count / 8 for name, count in shares.items()}
    assert reward([], gold=[], log_metric=metrics.__setitem__) == []
    assert reward([[]], gold=[None]) == [None]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (
            {"solution": ["1"], "prompts": ["p"]},
            ValueError,
            r"`column` is 'answer', which the dataset lacks: it has \['solution'\]",
        ),
        ({"answer": ["1", "2"]}, ValueError, "column 'answer' has 2 gold answers for 1 completions"),
        ({"answer": [["1"]]}, TypeError, r"column 'answer' must hold strings or numbers, got \['1'\]"),
    ],
)
def test_bad_columns(columns: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MathAnswerReward()(["Answer: 1"], **columns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"correct": 0.0, "wrong": 0.0}, "`correct` must be above `wrong`, both finite, got 0.0 and 0.0"),
        ({"wrong": float("nan")}, "`correct` must be above `wrong`"),
        ({"boxed": "always"}, "`boxed` must be one of .* got 'always'"),
        ({"tail": 0}, "`tail` must be at least 1, got 0"),
        ({"max_answer_chars": 0}, "`max_answer_chars` must be at least 1"),
        ({"time_limit": 0.0}, "`time_limit` must be positive, got 0.0"),
        ({"processes": 0}, "`processes` must be positive, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MathAnswerReward(**arguments)


def test_hostile_answers_are_wrong_and_end() -> None:
    reward = MathAnswerReward(time_limit=0.5, tail=200_000, max_answer_chars=200_000)
    start = time.monotonic()
    assert reward([f"Answer: {text}" for text in HOSTILE], answer=["34"] * len(HOSTILE)) == [-1.0] * len(HOSTILE)
    assert time.monotonic() - start < 60


def test_a_missing_math_verify_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Verifier()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs math-verify: pip install 'dppo-kernels\[trl\]'"):
        MathAnswerReward()
    with pytest.raises(ImportError, match="math-verify"):
        judge.verify([("1", "2")])
    assert not pids(judge)


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("print('no antlr')", ImportError, r"does not load \(no antlr\)"),
        ("raise SystemExit(3)", RuntimeError, "ended with 3; run it"),
    ],
)
def test_processes_that_do_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "worker.py").write_text(script)
    monkeypatch.setattr(verifier, "_WORKER", tmp_path / "worker.py")
    judge = Verifier()
    with pytest.raises(error, match=message):
        judge.verify([("1", "2")])
    assert not pids(judge)


def test_order_is_kept_and_pairs_are_compared_once(shared: Verifier) -> None:
    pairs = [(str(k % 7), f"{k % 5}+1") for k in range(200)]
    expected = [Verdict.EQUAL if k % 7 == k % 5 + 1 else Verdict.DIFFERENT for k in range(200)]
    assert shared.verify(pairs) == expected
    assert len(shared._known) == 35
    shared._known[("2", "1+1")] = Verdict.UNPARSEABLE  # what is known is not compared again
    assert shared.verify([("2", "1+1")]) == ["unparseable"]
    assert shared.verify([("]", "1"), ("1", "]"), ("]", "]")]) == ["gold_unparseable", "unparseable", "gold_unparseable"]
    assert shared.verify([]) == []


def test_a_slow_pair_costs_nobody_else(shared: Verifier) -> None:
    judge = Verifier(processes=2, time_limit=1.0)
    pairs = [(str(k), f"{k}+0") for k in range(20)]
    pairs.insert(5, SLOW)
    verdicts = judge.verify(pairs)
    assert verdicts.pop(5) == "timeout"
    assert set(verdicts) == {"equal"}
    before = pids(judge)
    assert SLOW not in judge._known
    assert judge.verify([("1", "2"), ("3", "3.0")]) == ["different", "equal"]
    assert set(before) <= set(pids(judge))


def test_a_batch_of_slow_pairs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a policy that collapses into such answers would stop training for hours."""
    monkeypatch.setattr(verifier, "_PATIENCE", 2)
    monkeypatch.setattr(verifier, "_GIVING_UP", 2)
    judge = Verifier(processes=2, time_limit=0.8)
    slow = [(f"{SLOW[0]}+{k}", SLOW[1]) for k in range(50)]
    start = time.monotonic()
    assert judge.verify([("1", "1+0"), *slow]) == ["equal", *["timeout"] * 50]
    assert time.monotonic() - start < 15  # all of them would take 20 s of computing and 50 starts of a process
    assert judge.verify([("2", "1+1")]) == ["equal"]  # the next call starts afresh


def test_a_killed_process_costs_its_pair_and_is_replaced() -> None:
    judge = Verifier(processes=1, time_limit=60)

    def kill_when_busy() -> None:
        while not any(worker.pair == SLOW for worker in judge._workers):
            time.sleep(0.01)
        os.kill(pids(judge)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_when_busy)
    killer.start()
    assert judge.verify([("1", "1.0"), SLOW, ("2", "2.0")]) == ["equal", "error", "equal"]
    killer.join()
    (idle,) = pids(judge)
    os.kill(idle, signal.SIGKILL)
    os.waitid(os.P_PID, idle, os.WEXITED | os.WNOWAIT)
    assert judge.verify([("3", "3.0")]) == ["equal"]  # nobody's fault
    (pid,) = pids(judge)
    assert pid != idle
    judge.close()
    assert not alive(pid)


def test_the_memory_limit_holds() -> None:
    judge = Verifier(processes=1, memory_bytes=100 * 2**20)
    assert judge.verify([("1", "2^{8000000000}"), ("1", "1.0")]) in (["different", "equal"], ["error", "equal"])


def test_interrupts(shared: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    shared.verify([("1", "1+0")])
    before = pids(shared)
    for pid in before:
        os.kill(pid, signal.SIGINT)  # as Ctrl-C does to the whole process group
    assert shared.verify([("1", "1+1+0"), ("2", "1+1+0")]) == ["different", "equal"]
    assert pids(shared) == before

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verifier, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            shared.verify([("1", "1+2+0"), ("3", "1+2+0")])
    assert not pids(shared)
    assert not any(map(alive, before))
    assert shared.verify([("3", "2+1+0")]) == ["equal"]  # not the answer to the interrupted call


def test_any_thread_may_call(shared: Verifier) -> None:
    results: dict[int, list[Verdict]] = {}
    threads = [
        threading.Thread(target=lambda k=k: results.__setitem__(k, shared.verify([(str(k), f"{k}+{k}-{k}"), ("0", f"{k}+1")])))
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: ["equal", "different"] for k in range(4)}


def test_pickles_start_processes_of_their_own(shared: Verifier) -> None:
    reward = MathAnswerReward(correct=2.0, wrong=0.0, column="gold")
    reward._verifier = shared
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == "math_answer"
    assert (copy.correct, copy.wrong, copy.column) == (2.0, 0.0, "gold")
    assert not pids(copy._verifier)
    assert copy(["Answer: 0.5"], gold=[r"\frac{1}{2}"]) == [2.0]


def test_no_process_survives_its_verifier() -> None:
    judge = Verifier(processes=1)
    judge.verify([("1", "2")])
    (pid,) = pids(judge)
    assert alive(pid)
    del judge
    gc.collect()
    assert not alive(pid)


# Without a __main__ guard, in a folder that knows nothing of the package. By path: an import of the package loads torch.
SCRIPT = """
import importlib.util, json, os, signal
spec = importlib.util.spec_from_file_location("verifier", {path!r})
verifier = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verifier)
judge = verifier.Verifier(processes=1)
said = [judge.verify([("1", "1.0")]), [worker.process.pid for worker in judge._workers]]
print(json.dumps(said), flush=True)
child = os.fork()
said = [judge.verify([("2", "2.0")]), [worker.process.pid for worker in judge._workers]]
if child == 0:
    print(json.dumps(said), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
print(json.dumps(said), flush=True)
"""


def test_forks_exits_and_scripts_without_a_guard(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(path=verifier.__file__))
    run = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert run.stderr == ""
    before, child, parent = map(json.loads, run.stdout.splitlines())
    assert before[0] == child[0] == parent[0] == ["equal"]
    assert before[1] == parent[1] != child[1]
    deadline = time.monotonic() + 20  # the killed child's process ends by itself when its stdin does
    while any(map(alive, before[1] + child[1])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, before[1] + child[1]))
