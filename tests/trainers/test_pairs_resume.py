"""A run of pairs that was killed goes on where it was, to the same bytes; anything else in its folder is refused."""

import copy
import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Qwen3ForCausalLM

from dppo_kernels import __version__
from dppo_kernels.trainers.pairs_fingerprint import describe_reward, digest_of, module_digest
from tests.trainers.conftest import reward_length, small_config
from tests.trainers.pairs_worker import PROMPTS, Reward, run

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 4  # of 11 prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> str:
    """A model and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(small_config(len(tokenizer)))
    model.lm_head.weight.data *= 12
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def whole(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    file = tmp_path_factory.mktemp("whole") / "pairs.parquet"
    reward = Reward()
    pairs, statistics = run(folder, str(file), reward)
    assert reward._calls == SHARDS
    assert 5 < len(pairs) == statistics.pairs
    assert statistics.unscored > 0
    return file


def contents(file: Path) -> tuple[bytes, bytes]:
    return file.read_bytes(), file.with_suffix(".statistics.json").read_bytes()


@pytest.mark.parametrize("stop_at", [0, 2])
def test_a_run_that_failed_goes_on(tmp_path: Path, folder: str, whole: Path, stop_at: int) -> None:
    file = tmp_path / "pairs.parquet"
    with pytest.raises(RuntimeError, match="the reward failed"):
        run(folder, str(file), Reward(stop_at))
    assert not file.exists()
    assert len(list(tmp_path.glob("pairs.shards/shard-*"))) == stop_at
    torch.rand(5)  # generators stand elsewhere than they did
    rest = Reward()
    run(folder, str(file), rest)
    assert rest._calls == SHARDS - stop_at
    assert contents(file) == contents(whole)


def test_a_process_that_was_killed_goes_on(tmp_path: Path, folder: str, whole: Path) -> None:
    file = tmp_path / "pairs.parquet"
    code = f"from tests.trainers.pairs_worker import main; main({folder!r}, {str(file)!r}, 2)"
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    shards = tmp_path / "pairs.shards"
    assert sorted(path.name for path in shards.iterdir()) == ["manifest.json", "shard-000000.json", "shard-000001.json"]
    (shards / "shard-000002.json.tmp").write_text('[{"row": 6, "comp')  # as one that is killed while it writes leaves it
    rest = Reward()
    run(folder, str(file), rest)
    assert rest._calls == 2
    assert contents(file) == contents(whole)
    assert not [*tmp_path.rglob("*.tmp")]


def test_a_complete_run_is_read_again(folder: str, whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    file.with_suffix(".shards").symlink_to(whole.with_suffix(".shards"))
    pairs, statistics = run(folder, str(file), Reward(stop_at=0))
    assert contents(file) == contents(whole)
    assert statistics.as_dict() == json.loads(whole.with_suffix(".statistics.json").read_text())
    assert len(pairs) == statistics.pairs


def test_batches_draw_differently(folder: str, tmp_path: Path) -> None:
    """Equal prompts in different batches: each batch has a seed of its own."""
    rows = Dataset.from_dict({"prompt": ["1+1="] * 4, "row": range(1, 5)})
    seen: list[str] = []

    def keep(completions: list[str], **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return reward_length(completions)

    run(folder, str(tmp_path / "pairs.parquet"), keep, rows=rows, batch_size=1)
    assert len(set(seen)) > 12


class OtherReward(Reward):
    pass


def weights_changed(folder: str) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data[3] += 1e-6
    return model


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"temperatures": [0.6, 0.8, 1.0]}, r"temperatures was \[0.6, 0.8, 1.0, 1.2\], is \[0.6, 0.8, 1.0\]"),
        ({"seed": 43}, "seed was 42, is 43"),
        ({"batch_size": 4, "min_gap": 0.5}, "batch_size was 3, is 4; min_gap was 0.01, is 0.5"),
        ({"max_completion_length": 7}, "max_completion_length was 6, is 7"),
        ({"rows": Dataset.from_dict({"prompt": ["1"] * 11, "row": range(11)})}, "prompts was"),
        (
            {"rows": Dataset.from_dict({"prompt": PROMPTS, "row": [0] * 11})},
            "prompts was",  # columns that only rewards read
        ),
        ({"model": weights_changed}, "model was"),
        ({"reward": OtherReward()}, "rewards was"),
        ({"reward": [Reward(), Reward()]}, "rewards was"),
    ],
)
def test_a_folder_of_another_run_is_refused(folder: str, whole: Path, changes: dict[str, Any], differs: str) -> None:
    before = contents(whole)
    reward = changes.get("reward", Reward(stop_at=0))
    others = {name: value for name, value in changes.items() if name != "reward"}
    if "model" in changes:
        others["model"] = changes["model"](folder)
    with pytest.raises(ValueError, match=f"holds shards of another run: {differs}") as error:
        run(folder, str(whole), reward, **others)
    assert str(error.value).count(" was ") == (2 if "min_gap" in changes else 1)
    assert contents(whole) == before


def test_a_file_of_unknown_origin_is_not_written_over(folder: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    file.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"exists, and .* does not say what it was made from"):
        run(folder, str(file), Reward(stop_at=0))
    assert file.read_bytes() == b"mine"


def test_shards_of_unknown_origin_are_not_read(folder: str, whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    shutil.copytree(whole.with_suffix(".shards"), file.with_suffix(".shards"))
    (file.with_suffix(".shards") / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"pairs.shards' exists, and .* does not say what it was made from"):
        run(folder, str(file), Reward(stop_at=0))
    assert not file.exists()


@pytest.mark.parametrize("changes", [{}, {"seed": 1}], ids=["the same run", "another run"])
def test_one_run_at_a_time(folder: str, whole: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The second starts before the first has a shard, and again behind the first one."""
    file = str(tmp_path / "pairs.parquet")
    refused = []
    first = Reward()

    def reward(*args: Any, **kwargs: Any) -> list[float | None]:
        if first._calls < 2:
            with pytest.raises(ValueError, match=r"pairs.parquet' is being made by another run, which has '.*manifest.json'"):
                run(folder, file, Reward(stop_at=0), **changes)
            refused.append(sorted(path.name for path in tmp_path.rglob("shard-*")))
        return first(*args, **kwargs)

    run(folder, file, reward)
    assert refused == [[], ["shard-000000.json"]]
    assert contents(Path(file)) == contents(whole)


def test_a_run_that_made_nothing_is_in_nobodys_way(folder: str, whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.parquet"
    with pytest.raises(RuntimeError, match="the reward failed"):
        run(folder, str(file), Reward(stop_at=0), seed=1)
    run(folder, str(file), Reward())
    assert contents(file) == contents(whole)


def scaled(completions: list[str], scale: float) -> list[float]:
    return [scale * x for x in reward_length(completions)]


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale, self._cache = scale, object()

    def score(self, completions: list[str], **kwargs: Any) -> list[float]:
        return scaled(completions, self.scale)

    __call__ = score


def test_settings_of_rewards_are_told_apart() -> None:
    for make in (Scaled, lambda x: Scaled(x).score, lambda x: functools.partial(scaled, scale=x)):
        assert describe_reward(make(2.0)) == describe_reward(make(2.0))
        assert describe_reward(make(2.0)) != describe_reward(make(3.0))
    assert describe_reward(scaled) != describe_reward(reward_length)
    assert json.dumps(describe_reward(len))  # without source


@dataclasses.dataclass
class Options:
    scale: float
    words: tuple[str, ...] = ()


def nonlocal_scale(scale: Any) -> Any:
    return lambda completions, **kwargs: scaled(completions, scale)


def default_scale(scale: Any) -> Any:
    def reward(completions: list[str], by: Any = scale, **kwargs: Any) -> list[float]:
        return scaled(completions, by)

    return reward


def keyword_default(scale: Any) -> Any:
    def reward(completions: list[str], *, by: Any = scale, **kwargs: Any) -> list[float]:
        return scaled(completions, by)

    return reward


def decorated(scale: Any) -> Any:
    @functools.wraps(scaled)
    def reward(**kwargs: Any) -> Any:
        return inner(**kwargs)

    inner = nonlocal_scale(scale)
    return reward


WAYS = [Scaled, lambda x: Scaled(x).score, lambda x: functools.partial(scaled, scale=x), lambda x: functools.partial(scaled, x)]
WAYS += [nonlocal_scale, default_scale, keyword_default, decorated, lambda x: functools.partial(nonlocal_scale(x), 1)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (2.0, 3.0),
        ([1, 2], [2, 1]),
        ((1, [2]), (1, [3])),
        ({"a": {"b": 1}}, {"a": {"b": 2}}),
        ({"a"}, {"b"}),
        (list(range(200)), list(range(201))),
        (nonlocal_scale(1), nonlocal_scale(2)),
        (Options(1.0), Options(2.0)),
        (torch.nn.Linear, torch.nn.Module),
    ],
    ids=["number", "list", "nested", "dict", "set", "long", "function", "dataclass", "class"],
)
def test_whatever_holds_a_reward_s_settings(way: Any, one: Any, other: Any) -> None:
    def described(value: Any) -> str:
        return json.dumps(describe_reward(way(value)))

    assert described(one) == described(copy.deepcopy(one))
    assert described(one) != described(other)
    assert len(described(one)) < 1500


def test_states_of_rewards_are_no_settings() -> None:
    """What a name says is private, and objects whose insides are not for others to see."""
    described = {json.dumps(describe_reward(nonlocal_scale(model))) for model in (torch.nn.Linear(1, 1), torch.nn.Linear(2, 2))}
    assert len(described) == 1

    def calls(_seen: list[int]) -> Any:
        return lambda completions, **kwargs: _seen

    assert describe_reward(calls([])) == describe_reward(calls([1]))
    circle: list[Any] = []
    circle.append(circle)
    assert json.dumps(describe_reward(nonlocal_scale(circle)))

    def recursive(completions: list[str], **kwargs: Any) -> Any:
        return recursive(completions[1:])

    assert json.dumps(describe_reward(recursive))


def test_adapters_are_part_of_a_model(model) -> None:
    def wrapped(**changes: Any) -> Any:
        torch.manual_seed(0)
        options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes}
        return get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **options))

    reference = module_digest(wrapped())
    assert module_digest(wrapped()) == reference
    assert module_digest(wrapped(lora_alpha=8)) != reference
    assert module_digest(wrapped(use_rslora=True)) != reference
    lora = wrapped()
    with lora.disable_adapter():
        assert module_digest(lora) != reference
    assert module_digest(lora) == reference
    lora.add_adapter("other", LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    both = module_digest(lora)
    lora.set_adapter("other")
    assert module_digest(lora) != both
    prompt = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    enabled = module_digest(prompt)
    with prompt.disable_adapter():
        assert module_digest(prompt) != enabled


def test_digests_do_not_hang_on_the_order_of_a_set() -> None:
    """Such as an adapter's target modules, which every process hashes in its own way."""
    names = [f"{i:02d}_proj" for i in range(50)]
    assert digest_of({"target_modules": set(names)}) == digest_of({"target_modules": names})


def test_kernels_of_attention_are_part_of_a_model(model) -> None:
    before = module_digest(model)
    model.set_attn_implementation("eager" if model.config._attn_implementation != "eager" else "sdpa")
    assert module_digest(model) != before


def test_the_version_of_this_package_is_in_the_manifest(whole: Path) -> None:
    manifest = json.loads((whole.with_suffix(".shards") / "manifest.json").read_text())
    assert manifest["versions"]["dppo-kernels"] == __version__
