"""Every trainer under DDP, FSDP2, ZeRO-2 and ZeRO-3: six steps of two processes are those of one, and resumed ones too."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.trainers import runs
from tests.distributed.trainers.ranks import WRAPPERS, run

NAMES = ("dppo", "dapo", "ppo", "shared", "decoupled", "distill", "dpo")
TYPES = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}


SAVING = {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 3}


@functools.cache
def of_one_process(name: str, options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    [found] = run(runs.train, None, name, dict(options))
    return found


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[list[dict[str, Any]], Path]]:
    """A run of two processes by trainer and wrapper, made once, and where it saved itself at its third step."""

    @functools.cache
    def made(name: str, wrapper: str) -> tuple[list[dict[str, Any]], Path]:
        out = tmp_path_factory.mktemp(f"{name}-{wrapper}")
        ranks = run(runs.train, wrapper, name, SAVING, str(out))
        return ranks, next(out.glob("**/checkpoint-3"))

    return made


def check(name: str, wrapper: str, ranks: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Of two processes: the wrapper, the same bits on both, and the weights and logs of one."""
    alone = of_one_process(name, tuple(options.items()))
    moved = max((alone["weights"][key] - start).abs().max().item() for key, start in alone["before"].items())
    assert moved > 1e-3
    for rank in ranks:
        assert rank["wrapper"].startswith(TYPES[wrapper])
        assert rank["processes"] == 2
        assert rank["weights"].keys() == alone["weights"].keys()
        for key, weight in alone["weights"].items():
            error = (rank["weights"][key] - weight).abs().max().item()
            assert error <= 1e-6, f"{key} is {error:.1e} from that of one process"
            assert torch.equal(rank["weights"][key], ranks[0]["weights"][key]), f"{key} differs from rank to rank"
    for row, expected in zip(ranks[0]["logged"], alone["logged"], strict=True):
        assert row.keys() == expected.keys()
        known = {key: value for key, value in expected.items() if "time" not in key}
        assert {key: row[key] for key in known} == pytest.approx(known, rel=1e-5, abs=1e-5)


def compare(name: str, wrapper: str, broken: str = "", **options: Any) -> None:
    check(name, wrapper, run(runs.train, wrapper, name, options, None, None, broken), options)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(whole: Any, name: str, wrapper: str) -> None:
    check(name, wrapper, whole(name, wrapper)[0], {"lr_scheduler_type": "linear"})


# Engines that save alike: all trainers with one of them.
RESUMED = [(name, wrapper) for name in NAMES for wrapper in ("fsdp2", "zero3")]
RESUMED += [(name, wrapper) for name in ("dppo", "decoupled") for wrapper in ("ddp", "zero2")]


@pytest.mark.parametrize(("name", "wrapper"), RESUMED)
def test_resuming_is_exact(whole: Any, name: str, wrapper: str, tmp_path: Path) -> None:
    first, checkpoint = whole(name, wrapper)
    again = run(runs.train, wrapper, name, SAVING, str(tmp_path), str(checkpoint))
    for rank, expected in zip(again, first, strict=True):
        for key, weight in expected["weights"].items():
            assert torch.equal(rank["weights"][key], weight), key
        assert [row["loss"] for row in rank["logged"]] == [row["loss"] for row in expected["logged"]]


# DDP's are in `tests/trainers/test_*_ddp.py`.
@pytest.mark.parametrize("wrapper", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("name", ["dapo", "distill", "dpo"])
def test_gradient_accumulation(name: str, wrapper: str) -> None:
    compare(name, wrapper, accumulation=2)


@pytest.mark.parametrize(("name", "wrapper"), [(name, wrapper) for name in NAMES for wrapper in ("fsdp2", "zero3")])
def test_adapters(name: str, wrapper: str) -> None:
    compare(name, wrapper, lora=True)


@pytest.mark.parametrize("wrapper", ["fsdp2", "zero3"])
@pytest.mark.parametrize("name", ["dppo", "distill", "dpo"])
def test_tied_heads(name: str, wrapper: str) -> None:
    compare(name, wrapper, tied=True)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_both_models_are_clipped_together(wrapper: str) -> None:
    compare("ppo", wrapper, max_grad_norm=0.5)


@pytest.mark.parametrize(("name", "broken"), [("dppo", "policy"), ("ppo", "values")])
def test_ranks_that_diverge_are_seen(name: str, broken: str) -> None:
    with pytest.raises(AssertionError, match=r"from that of one process|differs from rank to rank"):
        compare(name, "ddp", broken)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_policy_that_writes_is_the_one_that_trains(wrapper: str) -> None:
    """What was captured while generating is what is scored, on processes that write for longer or shorter."""
    first, second = run(runs.rollouts, wrapper)
    assert first["lengths"] != second["lengths"]
    for rank in (first, second):
        assert len(rank["mismatch"]) == 3
        assert max(rank["mismatch"]) < 1e-5
    assert all(torch.equal(weight, second["weights"][key]) for key, weight in first["weights"].items())


@pytest.mark.parametrize("tied", [False, True])
def test_fsdp_gathers_the_head_for_its_op(tied: bool) -> None:
    """Once a training step, forward and backward; an untied one is divided while the layers run, both are afterwards."""
    for rank in run(runs.gatherings, "fsdp2", tied):
        assert rank["per_step"] == [1, 1]
        assert tied or all(rank["in_layers"])
        assert rank["after_training"]
        assert rank["after_scoring"]


@pytest.mark.parametrize("wrapper", ["fsdp2", "zero3"])
def test_no_model_stays_gathered(wrapper: str) -> None:
    """References and teachers are divided as the policy is, a value model is not."""
    for rank in run(runs.divided, wrapper):
        assert rank == {"policy": True, "reference": True, "teacher": True, "whole inside": True, "values": False}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_logprobs_keep_their_digits_in_mixed_precision(wrapper: str) -> None:
    """accelerate's FSDP2 casts what a model is given, and what it returns, to bfloat16."""
    for rank in run(runs.precision, wrapper):
        assert rank["in"]
        assert rank["out"]
        assert rank["digits"]


@pytest.mark.parametrize("wrapper", ["fsdp2", "zero2", "zero3"])
def test_precomputed_references(wrapper: str, tmp_path: Path) -> None:
    """Of pairs in a file, whose cache processes share."""
    runs.write_pairs(tmp_path / "pairs.parquet")
    compare("dpo", wrapper, precompute_ref_log_probs=True, pairs=str(tmp_path / "pairs.parquet"))


@pytest.mark.parametrize("wrapper", ["fsdp2", "zero3"])
@pytest.mark.parametrize("teacher", ["granite", "own logits"])
def test_other_teachers(teacher: str, wrapper: str) -> None:
    """Of another architecture, and one that is asked for logits by a method of its own, which no engine knows."""
    compare("distill", wrapper, teacher=teacher)


def test_layers_are_wrapped_whatever_the_teacher_is() -> None:
    """accelerate wraps, in all models, the layers of the first one that it prepares."""
    for rank in run(runs.wrapped_layers, "fsdp2"):
        assert rank == {"policy": True, "teacher": True}
