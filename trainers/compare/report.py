"""The report of a comparison, from its results alone: Markdown and one figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dppo_kernels.trainers.compare.checks import check
from dppo_kernels.trainers.compare.conclusion import METRICS, Finding, compare, in_words
from dppo_kernels.trainers.compare.config import LEVELS, METHODS, WARM_START

# What real rows measure, for the metrics that have it.
REAL = {
    "utility": "utility_real",
    "marginal_tv": "marginal_tv_real",
    "correlation_error": "correlation_error_real",
    "dcr": "dcr_real",
    "too_close_share": "too_close_share_real",
    "copied_share": "copied_share_real",
}
TITLES = {metric.name: metric.title for metric in METRICS} | {
    "reward_std": "spread of the reward over completions",
    **{level: f"{level} level (training discriminators)" for level in LEVELS},
    **{f"judge_{level}": f"{level} level (judge)" for level in LEVELS},
    "tokens": "tokens of a completion",
}
TABLE = (
    *("reward", "reward_std", "reward_if_valid", *LEVELS),
    *("judge_reward", "judge_reward_if_valid", *(f"judge_{level}" for level in LEVELS)),
    *("validity", "tokens", "kl", "utility", "marginal_tv", "correlation_error"),
    *("dcr", "too_close_share", "copied_share", "distinct_share", "spread"),
)
LOGGED = {
    "DPO": {
        "chosen": "chosen reward",
        "rejected": "rejected reward",
        "gap": "gap",
        "loss": "loss",
        "accuracy": "accuracy",
        "margin": "margin of implicit rewards",
        "chosen_temperature": "temperature of the chosen",
        "prompts": "prompts",
        "pairs": "pairs",
    },
    "PPO": {
        "reward": "mean reward",
        "reward_std": "reward std",
        "kl": "KL in the rewards (nats)",
        "ended": "completions that end",
        "clip_fraction": "clip fraction",
        "explained_variance": "explained variance",
    },
}
GATED = (
    "Rewards are 0 for what is no whole row, so that the share of valid rows is in them, and not in those of valid rows alone."
)
CAVEATS = (
    "The model is tiny and the table small: nothing here says which method is better on a language model of billions.",
    "Both learning rates, and lambda 1 and a value coefficient of .5 for PPO, were chosen on this task, by a few short runs on "
    "one seed of it: three settings of PPO and one of DPO, an advantage for PPO. Other settings were not tuned.",
    "PPO samples each rollout with the policy that it has by then; DPO samples a round's pairs at its beginning, and sees each "
    "of them more than once.",
    "All seeds divide the same rows anew: intervals are about this table, and too narrow for another one.",
    "Intervals are Student's t over seeds, one for each measure, not corrected for there being several: of twenty, one "
    "excludes 0 by chance. A difference that is not shown is not an absence of difference.",
    "The methods are compared at the same number of tokens, not at the same KL: read rewards with the KL beside them. Where "
    "the reward of valid rows alone is the same, a method that is higher writes more whole rows, not more real ones.",
    "Both methods make the same number of optimiser steps on as many completions. DPO's are the best and the worst of each "
    "prompt's; PPO's are all of them, and it trains a value model beside its policy: seconds are not equal.",
    "Marginal TV and correlation error fall with the number of rows by themselves, and only valid rows enter them: where a "
    "method writes more valid rows, it has an advantage in both.",
    "Optimisers start anew in each round, for both methods; PPO's value model goes on.",
    "Peak memory is of the whole process on a CPU, with all that the other method and the discriminators hold.",
)


def values_of(results: dict[str, Any], who: str) -> dict[str, list[float | None]]:
    """Measures of a method or the warm start, each a list over seeds."""
    seeds = results["seeds"]
    found = [(seed if who == WARM_START else seed["methods"])[who]["measures"] for seed in seeds]
    values = {name: [measures[name] for measures in found] for name in found[0] if name != "reasons"}
    # What is no row has the reward 0, so that the mean over all completions is that over valid ones times their share.
    for name in ("reward", "judge_reward"):
        values[f"{name}_if_valid"] = [m[name] / m["validity"] if m["validity"] else None for m in found]
    return values


def conclude(results: dict[str, Any]) -> list[Finding]:
    """Of the two methods."""
    first, second = METHODS
    return compare(first, values_of(results, first), second, values_of(results, second))


def render(results: dict[str, Any], figure: str = "report.png") -> str:
    """The Markdown of `results`, which `dppo compare` writes; `figure` is the file that it shows."""
    findings = conclude(results)
    parts = [
        *("# DPO and PPO on synthetic table rows", _introduction(results)),
        *("## Conclusion", f"{in_words(findings)} {GATED}", _bullets(finding.sentence for finding in findings)),
        *(f"![reward, KL and levels over generated tokens]({figure})", "## Measures", _measures(results)),
        *("## What it took", _costs(results)),
        *("## Training, by round", *(_logged(results, method) for method in METHODS)),
        *("## Signs of reward hacking", _checks(results)),
        *("## Discriminators", _discriminators(results)),
        *("## Each seed", _seeds(results)),
        *("## Caveats", _bullets(CAVEATS)),
        *("## Options and versions", _options(results)),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(results: dict[str, Any]) -> str:
    config, count = results["config"], len(results["seeds"])
    return (
        f"`{results['command']}` (commit {results['commit']}), {results['device']}, "
        f"{results['seconds'] / 60:.1f} minutes.\n\n"
        f"Data: {config['data']}. {count} seed{'s' if count > 1 else ''}, {config['rounds']} rounds, {config['total_steps']} "
        f"optimiser steps of each method on {config['batch_size']} completions each. In every seed both methods start from the "
        "same supervised model, face the same discriminators in every round, and generate as many tokens. Measures are of "
        f"{config['eval_samples']} fresh completions at temperature 1; numbers are means ± standard deviations over seeds."
    )


def _measures(results: dict[str, Any]) -> str:
    start, (first, second) = values_of(results, WARM_START), METHODS
    by_method = {method: values_of(results, method) for method in METHODS}
    real = {name: start[source] for name, source in REAL.items()}
    real |= {name: [seed["real"][name] for seed in results["seeds"]] for name in results["seeds"][0]["real"]}
    differences = {finding.metric.name: finding.difference for finding in conclude(results)}
    rows = [
        [
            TITLES[name],
            mean_and_spread(real[name]) if name in real else "",
            mean_and_spread(start[name]),
            *(mean_and_spread(by_method[method][name]) for method in METHODS),
            str(differences.get(name) or ""),
        ]
        for name in TABLE
    ]
    headings = ("", "real rows", WARM_START, *METHODS, f"{first} minus {second} [95 %]")
    floor = mean_and_spread(start["utility_marginals"])
    note = (
        "Real rows: what training rows teach a classifier (the ceiling of the TSTR AUC), else what evaluation rows measure. "
        f"Floor of the TSTR AUC, from columns drawn each by itself: {floor}. Levels are means over valid rows."
    )
    return f"{_table(headings, rows)}\n\n{note}"


def _costs(results: dict[str, Any]) -> str:
    rows = []
    for name, title in (
        ("generated_tokens", "generated tokens"),
        ("steps", "optimiser steps"),
        ("seconds", "seconds, generation and training"),
        ("peak_memory", "peak memory of the process (MiB)"),
    ):
        found = [[seed["methods"][method][name] for seed in results["seeds"]] for method in METHODS]
        rows.append([title, *(mean_and_spread(values) for values in found)])
    wanted = results["config"]["total_steps"]
    short = [
        f"{method} made {mean_and_spread(steps)} of {wanted} optimiser steps, as no pair was found in some rounds."
        for method in METHODS
        if min(steps := [seed["methods"][method]["steps"] for seed in results["seeds"]]) < wanted
    ]
    rows.append(["learning rate", *(f"{rate:g}" for rate in results["learning_rates"].values())])
    return "\n\n".join([_table(("", *METHODS), rows), *short])


def _logged(results: dict[str, Any], method: str) -> str:
    rounds = [seed["methods"][method]["rounds"] for seed in results["seeds"]]
    count = len(rounds[0])
    rows = []
    for name, title in LOGGED[method].items():
        rows.append([title, *(mean_and_spread([points[i]["logged"].get(name) for points in rounds]) for i in range(count))])
    rows.append(
        ["KL to the warm start (nats)", *(mean_and_spread([points[i]["kl"] for points in rounds]) for i in range(count))]
    )
    for when in ("before", "after"):
        values = [[points[i][when]["reward"] for points in rounds] for i in range(count)]
        rows.append([f"reward {when} the round, same discriminators", *map(mean_and_spread, values)])
    return _table((method, *(str(i + 1) for i in range(count))), rows)


def _checks(results: dict[str, Any]) -> str:
    start = values_of(results, WARM_START)
    found = {method: check(values_of(results, method), start) for method in METHODS}
    rows = [
        [one.name if method == METHODS[0] else "", method, f"**{one.verdict}**" if one.warns else one.verdict, one.numbers]
        for row in zip(*found.values(), strict=True)
        for method, one in zip(METHODS, row, strict=True)
    ]
    note = "Numbers are changes from the warm start [95 % over seeds], unless said otherwise; only an interval can warn."
    return f"{note}\n\n{_table(('sign', 'method', 'verdict', 'numbers'), rows)}"


def _discriminators(results: dict[str, Any]) -> str:
    seeds = results["seeds"]
    reports = {
        "first round": [seed["discriminators"][0] for seed in seeds],
        "last round": [seed["discriminators"][-1] for seed in seeds],
        "judge": [seed["judge"] for seed in seeds],
    }
    rows = [
        [
            level,
            *(
                f"{mean_and_spread([found[level]['auc'] for found in by_seed])}; "
                f"{mean_and_spread([found[level]['ece'] for found in by_seed])}"
                for by_seed in reports.values()
            ),
        ]
        for level in reports["judge"][0]
    ]
    note = (
        "AUC and expected calibration error on real rows set apart, against corrupted rows and what the policies wrote. The "
        "judge learned from other real rows and from samples of the warm start and of both methods; nothing was trained on it."
    )
    return f"{note}\n\n{_table(('level', *reports), rows)}"


def _seeds(results: dict[str, Any]) -> str:
    names = ("reward", "judge_reward", "validity", "kl", "utility", "correlation_error", "too_close_share")
    rows = []
    for seed in results["seeds"]:
        for who in (WARM_START, *METHODS):
            measures = (seed if who == WARM_START else seed["methods"])[who]["measures"]
            tokens = "" if who == WARM_START else str(seed["methods"][who]["generated_tokens"])
            rows.append([str(seed["seed"]), who, *(_number(measures[name]) for name in names), tokens])
    return _table(("seed", "", *(TITLES[name] for name in names), "generated tokens"), rows)


def _options(results: dict[str, Any]) -> str:
    options = ", ".join(f"`{name}` {value}" for name, value in results["config"].items() if name != "output_dir")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{options}.\n\n{versions}."


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Any) -> str:
    return "\n".join(f"* {line}" for line in lines)


def mean_and_spread(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {_number(float(np.std(known, ddof=1)), 2)}" if len(known) > 1 else ""
    missing = f" ({len(known)} of {len(values)} seeds)" if len(known) < len(values) else ""
    return f"{_number(float(np.mean(known)))}{spread}{missing}"


def _number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, and no exponent where the number is large."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def draw(results: dict[str, Any], path: Path) -> Path:
    """Rewards, KL and levels over generated tokens, and reward over KL; one line a seed, one colour a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(16, 7), layout="constrained")
    panels = [("reward, by the round's discriminators", "reward", "tokens"), ("judge reward", "judge_reward", "tokens")]
    panels += [("KL to the warm start (nats)", "kl", "tokens"), ("judge reward over KL", "judge_reward", "kl")]
    panels += [(f"{level} level (judge)", f"judge_{level}", "tokens") for level in LEVELS]
    for axis, (title, name, against) in zip(axes.flat, panels, strict=True):
        for i, method in enumerate(METHODS):
            for j, seed in enumerate(results["seeds"]):
                points = _curve(seed, method)
                x, y = (
                    [np.nan if point[key] is None else point[key] / (1000 if key == "tokens" else 1) for point in points]
                    for key in (against, name)
                )
                axis.plot(x, y, f"C{i}.-", alpha=0.8, linewidth=1.2, label=method if j == 0 else None)
        axis.set_title(title)
        axis.set_xlabel("thousands of generated tokens" if against == "tokens" else "KL (nats)")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path


def _curve(seed: dict[str, Any], method: str) -> list[dict[str, float]]:
    """From the warm start on, a point after each round."""
    rounds = seed["methods"][method]["rounds"]
    start = seed[WARM_START]["curve"]
    first = {**start, "tokens": start["generated_tokens"], "reward": rounds[0]["before"]["reward"]}
    return [first, *({**point, "tokens": point["generated_tokens"], "reward": point["after"]["reward"]} for point in rounds)]
