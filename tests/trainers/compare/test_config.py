"""Options under the names of the request, what follows from them, and what is refused."""

import pytest

from dppo_kernels.trainers import cli
from dppo_kernels.trainers.compare import command
from dppo_kernels.trainers.compare.config import CompareConfig


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[CompareConfig, str]]:
    """What `dppo compare` would have run."""
    found: list[tuple[CompareConfig, str]] = []
    monkeypatch.setattr(command, "run_compare", lambda config, command: found.append((config, command)))
    return found


def test_the_options_of_the_request(parsed: list) -> None:
    options = "--total_steps 1000 --batch_size 4 --learning_rate 1e-5 --kl_penalty 0.2 --beta 0.3 --temperatures 0.7 1.0"
    assert cli.main(["compare", *options.split()]) == 0
    [(config, said)] = parsed
    assert (config.total_steps, config.batch_size, config.kl_penalty, config.beta) == (1000, 4, 0.2, 0.3)
    assert config.rate("DPO") == config.rate("PPO") == 1e-5
    assert config.temperatures == [0.7, 1.0]
    assert said == f"dppo compare {options}"


def test_the_defaults_are_those_of_the_request(parsed: list) -> None:
    assert cli.main(["compare"]) == 0
    [(config, _)] = parsed
    assert config == CompareConfig()
    assert (config.kl_penalty, config.beta, config.min_gap) == (0.1, 0.1, 0.01)
    assert config.temperatures == [0.6, 0.8, 1.0, 1.2]
    assert config.seeds >= 3
    assert config.rate("DPO") == config.dpo_learning_rate
    assert config.rate("PPO") == config.ppo_learning_rate


def test_a_shipped_configuration_and_flags_over_it(parsed: list) -> None:
    assert cli.main(["compare", "--config", "quick", "--seeds", "1"]) == 0
    [(config, _)] = parsed
    assert config.seeds == 1
    assert config.total_steps < CompareConfig().total_steps
    assert config.output_dir == "outputs/compare-quick"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "0"], "`beta` must be positive, got 0.0"),
        (["--kl_penalty", "-1"], "`kl_penalty` must not be negative, got -1.0"),
        (["--seeds", "0"], "`seeds` must be an int of at least 1, got 0"),
        (["--rounds", "3", "--total_steps", "2"], "`total_steps` must be an int of at least 3, got 2"),
        (["--batch_size", "3"], "`batch_size` must be even"),
        (
            ["--batch_size", "4", "--mini_batches", "1", "--rounds", "4", "--total_steps", "4"],
            "must let PPO generate 4 completions for each of DPO's 4 `temperatures` in a round, got 4",
        ),
        (["--width", "20"], "`width` must be a multiple of 8, got 20"),
        (["--eval_samples", "5"], "`eval_samples` must be an int of at least 20, got 5"),
        (["--temperatures", "1.0", "1.0"], "`temperatures` must be distinct"),
        (["--data", "no_such.csv"], "`data` must be 'breast_cancer' or the path of a CSV file, got 'no_such.csv'"),
        (["--target", "diagnosis"], "`target`, `groups` and `special_values` are for CSV files"),
        (["--config", "no_such"], "no such file, and none of the shipped ones: quick"),
        (["--from_results", "no_such.json"], "`results` must be the path of a results.json"),
        (["--lerning_rate", "1"], "--lerning_rate"),
    ],
)
def test_bad_options_end_with_status_2(arguments: list[str], message: str, parsed: list, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["compare", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not parsed


def test_steps_and_rollouts_of_a_round() -> None:
    config = CompareConfig(rounds=3, total_steps=20, batch_size=8, ppo_epochs=2, mini_batches=2)
    assert [config.steps_of(i) for i in range(3)] == [7, 7, 6]
    # A rollout of 16 completions serves 4 steps; of the last one, steps may be left.
    assert [config.completions_of(i) for i in range(3)] == [32, 32, 32]
    assert CompareConfig(rounds=1, total_steps=8, batch_size=8, ppo_epochs=2, mini_batches=2).completions_of(0) == 32
