"""The report says what the results say, and can be made from them alone."""

import copy
import json
from pathlib import Path

import pytest

from dppo_kernels.trainers import cli
from dppo_kernels.trainers.compare import report, write_report
from dppo_kernels.trainers.compare.conclusion import METRICS
from dppo_kernels.trainers.compare.config import METHODS
from tests.trainers.compare import fixed


def rows_of(markdown: str) -> dict[str, list[str]]:
    """Cells of the tables' lines, by the first cell."""
    lines = [line.strip("|").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def section(markdown: str, title: str) -> str:
    return markdown.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_tables_hold_the_numbers() -> None:
    text = report.render(fixed.results())
    measures = rows_of(section(text, "Measures"))
    # Real rows, warm start, DPO, PPO, difference: 0.1 - 0.2 and 0.002 more a seed, so -0.098 +- 4.303 * 0.002 / sqrt(3).
    assert measures["judge reward"] == [
        "0.625 ± 0",
        "0.251 ± 0.001",
        "0.353 ± 0.003",
        "0.451 ± 0.001",
        "-0.098 [-0.103, -0.093]",
    ]
    assert measures["KL to the warm start (nats)"] == ["", "0 ± 0", "2 ± 0", "5 ± 0", "-3 [no interval]"]
    assert measures["TSTR AUC"] == ["0.977 ± 0", "0.9 ± 0", "0.9 ± 0 (2 of 3 seeds)", "0.9 ± 0", "0 [0, 0]"]
    assert measures["judge reward of valid rows alone"][3] == "0.75 ± 0.00042"  # of PPO: 0.45 / 0.6, and 0.001 more a seed
    assert "0.321" in section(text, "Measures")  # the floor
    costs = rows_of(section(text, "What it took"))
    assert costs["generated tokens"] == ["9900 ± 0", "10000 ± 0"]
    assert costs["peak memory of the process (MiB)"] == ["812 ± 0 (2 of 3 seeds)", "812 ± 0 (2 of 3 seeds)"]
    assert costs["learning rate"] == ["0.00025", "0.0005"]
    training = rows_of(section(text, "Training, by round"))
    assert training["chosen reward"] == ["0.625 ± 0"] * 2
    assert training["rejected reward"] == ["0.125 ± 0"] * 2
    assert training["gap"] == ["0.5 ± 0"] * 2
    assert training["mean reward"] == ["0.432 ± 0"] * 2
    assert rows_of(section(text, "Discriminators"))["row"] == [
        "0.75 ± 0; 0.0625 ± 0",
        "0.75 ± 0; 0.0625 ± 0",
        "0.812 ± 0; 0.0312 ± 0",
    ]
    for said in ("dppo compare --rounds 2 --total_steps 16", "commit abc123", "torch 2.99, trl 1.16.7", "`kl_penalty` 0.1"):
        assert said in text


def test_the_conclusion_follows_the_numbers() -> None:
    text = section(report.render(fixed.results()), "Conclusion")
    assert (
        "PPO is better in reward (training discriminators), reward of valid rows alone, judge reward, judge reward of" in text
    )
    assert "so that the share of valid rows is in them" in text
    assert "* PPO is higher than DPO in judge reward by 0.098 [0.093, 0.103], which is better" in text
    assert "* no difference shown in KL to the warm start (nats): DPO minus PPO is -3 [no interval]" in text  # of equal ones
    assert "* no difference shown in valid rows (share): DPO minus PPO is 0 [0, 0]" in text


def test_exchanged_results_exchange_the_conclusion() -> None:
    results = fixed.results()
    exchanged = copy.deepcopy(results)
    first, second = METHODS
    for seed in exchanged["seeds"]:
        seed["methods"] = {first: seed["methods"][second], second: seed["methods"][first]}
    other = {first: second, second: first, None: None}
    pairs = zip(report.conclude(results), report.conclude(exchanged), strict=True)
    assert all(a.winner == other[b.winner] for a, b in pairs)
    for seed in exchanged["seeds"]:
        seed["methods"] = dict.fromkeys(METHODS, seed["methods"][first])
    equal = [finding.sentence for finding in report.conclude(exchanged)]
    assert len(equal) == len(METRICS)
    assert all(sentence.startswith("no difference shown") for sentence in equal)


def test_signs_of_reward_hacking_are_shown_by_method() -> None:
    results = fixed.results()
    for seed in results["seeds"]:
        seed["methods"]["PPO"]["measures"]["judge_reward"] = 0.1
    lines = [line for line in report.render(results).splitlines() if "**warning**" in line]
    assert len(lines) == 1
    assert "| PPO |" in lines[0]
    assert "reward 0.333 [0.331, 0.334]; judge -0.251 [-0.254, -0.248]" in lines[0]  # over .6 valid rows


def test_steps_that_were_not_made_are_said() -> None:
    results = fixed.results()
    said = "optimiser steps, as no pair was found in some rounds."
    assert said not in report.render(results)
    results["seeds"][1]["methods"]["DPO"]["steps"] = 13
    assert f"DPO made 15 ± 1.7 of 16 {said}" in section(report.render(results), "What it took")


def test_one_seed_has_a_report_without_intervals() -> None:
    text = report.render(fixed.results(seeds=1))
    assert "No difference is shown in" in text
    assert rows_of(section(text, "Measures"))["judge reward"][-1] == "-0.1 [no interval]"
    assert "**warning**" not in text


def test_the_report_is_made_again_from_the_results(tmp_path: Path, capsys) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(fixed.results()))
    assert cli.main(["compare", "--from_results", str(path), "--output_dir", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "report.md").read_text() == report.render(fixed.results())
    assert (tmp_path / "again" / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert "PPO is better in" in " ".join(capsys.readouterr().out.split())


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="without seeds"):
        write_report(tmp_path / "results.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must be the path of a results\.json"):
        write_report(tmp_path / "other.json", tmp_path)


def test_a_round_without_valid_rows_is_a_gap_in_the_figure(tmp_path: Path) -> None:
    results = fixed.results()
    results["seeds"][0]["methods"]["PPO"]["rounds"][0]["judge_row"] = None
    assert report.draw(results, tmp_path / "report.png").stat().st_size > 1000
