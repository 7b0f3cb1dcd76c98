"""``dppo train``: shipped configs, options, and the whole command on a tiny budget."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from dppo_kernels import DIVERGENCES, PRESETS
from dppo_kernels.trainers import cli
from dppo_kernels.trainers.demo.offline import build_offline_model, careless_solutions
from dppo_kernels.trainers.loss_spec import LOSS_TYPES
from dppo_kernels.trainers.sampling import EXHAUSTED_POLICIES, SURPLUS_POLICIES
from dppo_kernels.trainers.train import ALGORITHMS, parse, shipped_configs, train

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--offline_warmup_steps", "30", "--max_steps", "4", "--per_device_train_batch_size", "16", "--num_generations", "4"),
    *("--eval_size", "8", "--per_device_eval_batch_size", "32", "--eval_steps", "4", "--logging_steps", "4"),
    "--use_cpu",
]


# A model that has learnt next to nothing is hardly ever right, but its lengths differ.
MIXED = ["--filter_groups_metric", "reward"]
CPU = ["--use_cpu", "--bf16", "false"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_shipped_config_is_understood(algorithm: str, monkeypatch) -> None:
    configs = shipped_configs(algorithm)
    expected = {"pythia-1b"} if algorithm in ("ppo", "decoupled-ppo") else {"qwen2.5_0.5b_quick_test", "paper"}
    expected = {"qwen2.5_0.5b"} if algorithm == "distill-ppo" else expected
    assert set(configs) == {"cpu_quick_test", *expected}
    for name, path in configs.items():
        data, config, model = parse(algorithm, ["--config", name, *CPU])
        written = yaml.safe_load(path.read_text())
        for key, value in written.items():
            owner = next(x for x in (data, config, model) if hasattr(x, key))
            if key not in ("use_cpu", "bf16", "report_to"):
                assert getattr(owner, key) == value, (name, key)
        assert config.report_to == ["tensorboard"]


def test_the_papers_settings(monkeypatch) -> None:
    monkeypatch.setattr(ALGORITHMS["dapo"][0], "world_size", 8)
    data, config, model = parse("dapo", ["--config", "paper", *CPU])
    assert model.model_name_or_path == "Qwen/Qwen2.5-32B"
    assert config.generation_batch_size == 512 * 16
    assert 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps == 512
    assert config.steps_per_generation // config.gradient_accumulation_steps == 16
    assert config.policy_loss_spec() == PRESETS["dapo"].replace(kl_ratio_weighted=True)
    assert (config.learning_rate, config.warmup_steps, config.max_completion_length) == (1e-6, 20, 16384 + 4096)
    penalty = config.overlong_penalty()
    assert (penalty.max_completion_length, penalty.buffer_len, penalty.factor) == (20480, 4096, 1.0)
    assert config.filter_groups_enable
    assert (data.correct_reward, data.wrong_reward) == (1, -1)
    _, dppo, _ = parse("dppo", ["--config", "paper", *CPU])
    assert dppo.policy_loss_spec().ratio_cap == 5
    assert dppo.policy_loss_spec().epsilon_low == dppo.policy_loss_spec().epsilon_high == 0.2


def test_flags_win_over_the_file_and_both_know_the_alias(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model_name_or_path: m\nentropy_coeff: 0.02\nnum_generations: 4\nuse_cpu: true\nbf16: false\n")
    _, config, model = parse("dapo", ["--config", str(file), "--num_generations", "8"])
    assert (config.entropy_coef, config.num_generations, model.model_name_or_path) == (0.02, 8, "m")
    _, config, _ = parse("dapo", ["--config", str(file), "--entropy_coeff", "0.03"])
    assert config.entropy_coef == 0.03
    _, config, _ = parse("dapo", ["--config", str(file), "--entropy_coef", "0.04", "--divergence_type", "binary_kl"])
    assert config.policy_loss_spec().entropy_coef == 0.04
    assert config.policy_loss_spec().divergence == "binary_kl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "usage: dppo train"),
        (["train", "ppo2"], "invalid choice"),
        (["train", "dapo", "--overlong"], "ambiguous option"),
        (["train", "dapo", *CPU, "--model_name_or_path", "m", "--flitre", "1"], "--flitre"),
        (["train", "dapo", *CPU], "--model_name_or_path is needed"),
        (["train", "dapo", "--config", "nothing"], "shipped ones: cpu_quick_test, paper, qwen2.5_0.5b_quick_test"),
        (["train", "dapo", "--config", "cpu_quick_test", "--eval_size", "0"], "--eval_strategy steps needs --eval_size"),
        (
            ["train", "dapo", "--config=cpu_quick_test", "--eval_strategy", "no"],
            "--eval_size 128 takes prompts out of training",
        ),
        (["train", "dapo", "--config", "cpu_quick_test", "--overlong_buffer_len", "13"], "`buffer_len` must be in"),
        (["train", "dapo", "--config", "cpu_quick_test", "--eval_size", "-1"], "`eval_size` must not be negative"),
        (["train", "dppo", "--config", "cpu_quick_test", "--loss_type", "grpo"], "would be ignored by DPPO"),
        (
            ["train", "dapo", "--config", "cpu_quick_test", "--reward_funcs", "none"],
            "needs a --reward_model_path, which PPO takes",
        ),
        (["train", "ppo", "--config", "cpu_quick_test", "--reward_funcs", "none"], "needs a --reward_model_path"),
        (["train", "distill-ppo", *CPU, "--model_name_or_path", "m"], "--teacher_model_path is needed"),
        (["train", "distill-ppo", "--config", "cpu_quick_test", "--offline_teacher_steps", "0"], "must be at least 1, got 0"),
        (["train", "distill-ppo", "--config", "cpu_quick_test", "--num_ppo_epochs", "3"], "set `ppo_epochs` instead"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_keys_of_a_file_are_an_error(tmp_path, capsys) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model_name_or_path: m\noverlong_bufer_len: 3\n")
    with pytest.raises(SystemExit):
        parse("dapo", ["--config", str(file), *CPU])
    assert "overlong_bufer_len" in capsys.readouterr().err


def tags(folder: Path) -> dict[str, list[float]]:
    """Logged scalars of the only TensorBoard file below `folder`."""
    [file] = folder.rglob("events.out.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_quick_test_trains_evaluates_logs_and_saves(tmp_path, capsys) -> None:
    """The shipped config of the CPU, smaller; saved half-way, and resumed from there with the same end."""
    out = tmp_path / "out"
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    saving += ["--resume_from_checkpoint", "false"]
    assert cli.main(["train", "dapo", "--config", "cpu_quick_test", *TINY, *MIXED, "--output_dir", str(out), *saving]) == 0
    printed = capsys.readouterr().out
    assert "held-out answers that are right: " in printed
    assert f"tensorboard --logdir {out}" in printed
    for column in ("Completi", "math_ans", "overlong", "extracte"):  # TRL's table of completions, as wide as the terminal
        assert column in printed
    logged = tags(out)
    assert {f"train/{name}" for name in REQUESTED} <= set(logged)
    assert len(documented_metrics()) > 30
    assert {f"train/{name}" for name in documented_metrics() - {"kl"}} <= set(logged)  # the KL needs a `beta`
    assert {"eval/answers/correct", "eval/reward/mean"} <= set(logged)
    assert logged["train/frac_reward_zero_std"] == [0]
    assert len(logged["eval/answers/correct"]) == 2
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer("27+35=", return_tensors="pt", return_token_type_ids=False)
    assert len(tokenizer.decode(model.generate(**ids, max_new_tokens=12)[0])) > 6
    resume = ["--resume_from_checkpoint", str(out / "checkpoint-2")]
    trainer = train(
        "dapo", ["--config", "cpu_quick_test", *TINY, *MIXED, "--output_dir", str(out), *resume, "--report_to", "none"]
    )
    resumed = trainer.model.state_dict()
    assert all((resumed[name] == p).all() for name, p in model.state_dict().items())


DOCUMENT = (ROOT / "docs" / "dapo.md").read_text()


def documented_metrics() -> set[str]:
    """Names in the first column of the table of docs/dapo.md."""
    rows = re.findall(r"^\| (`[^|]+) \|", DOCUMENT.split("## What is logged")[1].split("## ")[0], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


# The metrics that were asked for by name, by the request and by the issue.
REQUESTED = [
    *("reward/mean", "reward/std", "loss", "learning_rate", "clip_fraction", "entropy", "grad_norm", "frac_reward_zero_std"),
    *("reward/mean_before_filter", "reward/std_before_filter", "overlong/frac", "overlong/mean_penalty"),
    *(f"dapo/{name}" for name in ("num_gen_batches", "frac_all_correct", "frac_all_wrong", "frac_kept", "surplus")),
    *("clip_ratio/low", "clip_ratio/high", "answers/correct", "answers/timeout"),
]


def test_dppo_with_an_own_reward_file_and_chats(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, **_):\n    return [-float(len(c[0]['content'])) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    problems = load_rows(40)
    build_offline_model(tmp_path / "model", *problems, steps=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.dumps({"problem": p, "solution": a}) for p, a in zip(*problems, strict=True)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    options = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", "data.jsonl", "--as_chat"]
    arguments = [*("--config", "cpu_quick_test"), *TINY, *options, "--reward_funcs", "my_rewards.short", "--output_dir", "out"]
    trainer = train("dppo", arguments)
    assert trainer.train_dataset[0]["prompt"] == [{"role": "user", "content": trainer.train_dataset[0]["prompt"][0]["content"]}]
    assert trainer.state.global_step > 0
    assert any("divergence/mean" in entry for entry in trainer.state.log_history)
    assert any("rewards/short/mean" in entry for entry in trainer.state.log_history)
    with pytest.raises(ValueError, match="`reward_funcs` holds 'exact': expected 'math_answer' or an import path"):
        train("dppo", [*arguments, "--reward_funcs", "exact"])
    with pytest.raises(ValueError, match="`train_dataset` has 12 prompts, fewer than the 16 of one rollout"):
        train("dppo", [*arguments, "--dataset_limit", "20"])
    monkeypatch.delitem(sys.modules, "my_rewards")


def load_rows(size: int) -> tuple[list[str], list[str]]:
    from dppo_kernels.trainers.data import load_prompts

    rows = load_prompts(f"addition:{size}")
    return rows["prompt"][:], rows["answer"][:]


def test_the_teacher_of_the_offline_model_is_careless() -> None:
    prompts, answers = load_rows(2000)
    written = [text.removeprefix("Answer: ") for _, text in careless_solutions(prompts, answers, seed=0)]
    short = [(int(a), int(w)) for a, w in zip(answers, written, strict=True) if a != w]
    assert all(right - wrong == 10 for right, wrong in short)
    assert len(short) / sum(int(a) >= 10 for a in answers) == pytest.approx(0.6, abs=0.04)
    with pytest.raises(ValueError, match=r"the offline model knows no '\.', which 'What\.' holds"):
        build_offline_model(Path("unused"), ["What."], ["1"])


def run_script(name: str, tmp_path: Path, arguments: list[str], environment: dict[str, str]) -> list[str]:
    """Arguments with which the script calls `dppo` or `accelerate`, which are replaced by something that prints them."""
    for command in ("dppo", "accelerate"):
        stand_in = tmp_path / command
        stand_in.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" {command} "$@"\n')
        stand_in.chmod(0o755)
    result = subprocess.run(
        ["bash", str(ROOT / "examples" / "dapo" / name), *arguments],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "arguments", "environment", "expected"),
    [
        ("run_dapo.sh", [], {}, {"num_generations": 16, "max_completion_length": 20480, "gradient_accumulation_steps": 32}),
        (
            "run_dapo.sh",
            ["--learning_rate", "2e-6"],
            {
                "MODEL_PATH": "Qwen/Qwen2.5-7B-Instruct",
                "NUM_GENERATIONS": "8",
                "PER_DEVICE_BATCH_SIZE": "2",
                "REPORT_TO": "none",
            },
            {"num_generations": 8, "per_device_train_batch_size": 2, "learning_rate": 2e-6, "report_to": []},
        ),
        ("test_dapo.sh", [], {"NUM_GENERATIONS": "4"}, {"num_generations": 4, "max_steps": 2}),
    ],
)
def test_launch_scripts(
    tmp_path, name: str, arguments: list[str], environment: dict[str, str], expected: dict[str, Any]
) -> None:
    called = run_script(name, tmp_path, arguments, environment)
    assert called[:3] == ["dppo", "train", "dapo"]
    data, config, model = parse("dapo", [*called[3:], *CPU])
    for key, value in expected.items():
        assert getattr(config, key) == value, key
    assert model.model_name_or_path == environment.get("MODEL_PATH", "Qwen/Qwen2.5-0.5B-Instruct")
    assert data.dataset_name == "BytedTsinghua-SIA/DAPO-Math-17k"
    assert config.filter_groups_enable
    assert config.apply_overlong_penalty


def test_options_that_the_document_names_exist() -> None:
    table = DOCUMENT.split("## The parts and their options")[1].split("## ")[0]
    fields = {field.name for field in dataclasses.fields(ALGORITHMS["dapo"][0])}
    named = {name for row in re.findall(r"^\|[^|]+\|(.*)\|$", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert len(named & fields) >= 20
    values = {*LOSS_TYPES, *DIVERGENCES, *EXHAUSTED_POLICIES, *SURPLUS_POLICIES, "group", "none"}
    assert named <= fields | values


def test_the_launch_script_on_several_processes(tmp_path) -> None:
    called = run_script("run_dapo.sh", tmp_path, [], {"NUM_PROCESSES": "8"})
    start = ["accelerate", "launch", "--multi_gpu", "--num_processes", "8", "-m", "dppo_kernels.trainers.cli", "train", "dapo"]
    assert called[:9] == start
