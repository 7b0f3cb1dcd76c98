"""The README runs: its Python blocks are executed, its commands exist, its links lead somewhere."""

import re
from pathlib import Path

import pytest

import dppo_kernels

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) < 200


def test_the_plain_pytorch_example_runs(capsys) -> None:
    scope: dict = {}
    exec(BLOCKS[0], scope)
    # Scored with the weights that sampled: no divergence, and the loss of ratio-1 tokens.
    assert "masked 0.0%" in capsys.readouterr().out
    assert scope["stats"]["divergence"].max < 1e-5
    assert scope["hidden"].grad.abs().sum() > 0
    expected = -(scope["advantages"][:, None] * scope["rollout_logprobs"]).mean()
    assert scope["loss"].item() == pytest.approx(expected.item(), abs=1e-4)


def _with_a_model_built_here(block: str, tmp_path: Path) -> str:
    pytest.importorskip("trl", reason="the trl extra is not installed")
    from transformers import Qwen3ForCausalLM

    from tests.trainers import conftest

    tokenizer = conftest.tokenizer.__wrapped__()
    Qwen3ForCausalLM(conftest.small_config(len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for pattern, new in (
        (r'"Qwen/Qwen3-0\.6B"', f'"{tmp_path / "model"}"'),
        (
            r'output_dir="outputs/\w+"',
            f'output_dir="{tmp_path / "out"}", use_cpu=True, bf16=False, max_steps=2, logging_steps=1, report_to=[]',
        ),
    ):
        block, count = re.subn(pattern, new, block)
        assert count == 1
    return block


def test_the_trainer_example_runs(tmp_path) -> None:
    """As printed, with a model built here instead of the hub's, on the CPU, for two steps.

    It never answers right, so no token has an advantage: only with all tokens scored is there something to log.
    """
    scope: dict = {}
    block = _with_a_model_built_here(BLOCKS[1], tmp_path)
    exec(block.replace("num_iterations=2,", "num_iterations=2, score_inactive=True,"), scope)
    assert scope["args"].score_inactive
    history = scope["trainer"].state.log_history
    assert scope["trainer"].state.global_step == 2
    logged = set().union(*history)
    [names] = re.findall(r"It logs (.*?)and GRPO's", TEXT, re.DOTALL)
    patterns = re.findall(r"`([^`]+)`", names)
    assert len(patterns) >= 7
    for pattern in patterns:
        stem, _, rest = pattern.partition("{")
        suffixes = rest.rstrip("}").split(",") if rest else [""]
        assert {stem + suffix for suffix in suffixes} <= logged, pattern


def test_the_dapo_example_runs(tmp_path, monkeypatch) -> None:
    """As printed, but a random model is never right: batches are topped up, and small."""
    block = _with_a_model_built_here(BLOCKS[2], tmp_path)
    more = 'filter_exhausted="top_up", max_filter_gen_batches=1, gradient_accumulation_steps=1, num_generations=2, '
    block = block.replace("filter_groups_enable=True,", more + "filter_groups_enable=True, per_device_train_batch_size=2,")
    block = block.replace("=1024", "=12").replace("=256", "=4")
    from dppo_kernels.trainers import DAPOTrainer

    train, trained = DAPOTrainer.train, []
    monkeypatch.setattr(DAPOTrainer, "train", lambda trainer: trained.append(trainer) or train(trainer))
    exec(block, {})
    [trainer] = trained
    assert trainer.state.global_step == 2
    logged = set().union(*trainer.state.log_history)
    assert {"dapo/frac_kept", "overlong/frac", "answers/correct", "clip_fraction"} <= logged


def test_the_accelerated_example_runs(tmp_path, monkeypatch) -> None:
    block = _with_a_model_built_here(BLOCKS[3], tmp_path)
    from dppo_kernels.trainers.accelerate import LinearLogprobFunction

    forward, calls = LinearLogprobFunction.forward, []
    monkeypatch.setattr(LinearLogprobFunction, "forward", staticmethod(lambda *args: calls.append(args) or forward(*args)))
    exec(block, {})
    assert len(calls) == 2


def test_names_and_files_it_mentions_exist() -> None:
    table = TEXT.split("## Operations")[1].split("## ")[0]
    named = set(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)) - {"name", "---"}
    functions = {name for cell in named for name in re.findall(r"`(\w+)`", cell)}
    assert functions <= set(dppo_kernels.__all__)
    assert functions == {name for name in dppo_kernels.__all__ if name.islower() and not name.startswith("_")}
    presets = re.search(r"`PRESETS`: `([^`]+)`", table)
    assert presets
    for name in presets[1].split():
        assert any(re.fullmatch(name.replace("*", ".*"), preset) for preset in dppo_kernels.PRESETS)
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"make (\w+)", TEXT):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
