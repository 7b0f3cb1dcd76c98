"""A limit on prompts in tokens, as the model sees them: after the chat template."""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger

if TYPE_CHECKING:
    from dppo_kernels.trainers._trl_seam import GRPOTrainer as Host
else:
    Host = object  # a mixin: GRPOTrainer comes after it in the bases

logger = get_logger(__name__)

PROMPT_OVERFLOW = ("left", "drop")


class PromptLengthMixin(Host):
    """Put before GRPOTrainer in the bases; reads `args.max_prompt_length` and `args.prompt_overflow`.

    "left": the last `max_prompt_length` tokens of a longer prompt stay, in training and evaluation; the share of prompts that
    were cut is logged as "prompts/truncated". "drop": longer prompts are taken out of the training set before it starts. A
    `rollout_func`, which renders prompts itself, gets them whole.
    """

    train_dataset: Any  # TRL's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.max_prompt_length is None or self.args.prompt_overflow != "drop":
            return
        if not hasattr(self.train_dataset, "__len__"):
            raise ValueError("`prompt_overflow`='drop' needs a dataset of known length, got an IterableDataset")
        if self.environment_factories is not None:
            raise ValueError(
                "`prompt_overflow`='drop' cannot know the prompts that an `environment_factory` adds to: use 'left', or "
                "`max_prompt_length`=None"
            )
        short = [row for row, prompt in enumerate(self.train_dataset["prompt"]) if self._fits(prompt)]
        dropped = len(self.train_dataset) - len(short)
        if not short:
            raise ValueError(
                f"`max_prompt_length`={self.args.max_prompt_length} with `prompt_overflow`='drop' leaves none of "
                f"{len(self.train_dataset)} prompts"
            )
        if dropped:
            logger.info(f"{dropped} of {len(self.train_dataset)} prompts are longer than {self.args.max_prompt_length} tokens")
            self.train_dataset = self.train_dataset.select(short)

    def _fits(self, prompt: Any) -> bool:
        return len(super()._tokenize_prompts([prompt])[0][0]) <= self.args.max_prompt_length

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, ...]:
        prompt_ids, *rest = super()._tokenize_prompts(prompts)
        limit = self.args.max_prompt_length
        if limit is None:
            return prompt_ids, *rest
        cut = [ids[-limit:] for ids in prompt_ids]
        changed = torch.tensor([len(ids) > limit for ids in prompt_ids], dtype=torch.float32, device=self.accelerator.device)
        share = self.accelerator.reduce(changed.mean(), reduction="mean").item()  # every process has as many prompts
        self._metrics["train" if self.model.training else "eval"]["prompts/truncated"].append(share)
        return cut, *rest
