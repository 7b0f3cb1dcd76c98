"""A small Qwen3, its supervised warm-up, and greedy accuracy."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dppo_kernels.trainers.demo.task import MAX_ANSWER_TOKENS, Problem

STEPS = 500
BATCH = 128
LEARNING_RATE = 2e-3


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, width: int = 96, positions: int = 64) -> Qwen3ForCausalLM:
    """Two layers, about 190 thousand parameters at the default width, for texts of at most `positions` tokens."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def warm_up(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[tuple[str, str]],
    *,
    seed: int,
    steps: int = STEPS,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Imitate `examples`, pairs of prompt and answer: cross entropy on the answers, Adam, learning rate to zero."""
    generator = torch.Generator().manual_seed(seed)
    texts = [prompt + answer for prompt, answer in examples]
    ids = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    ids = torch.cat([ids, torch.full((len(texts), 1), tokenizer.eos_token_id)], 1)
    attention = (ids != tokenizer.pad_token_id).long()
    prompt_lengths = torch.tensor([len(row) for row in tokenizer([prompt for prompt, _ in examples])["input_ids"]])
    labels = ids.masked_fill(attention.cumsum(1) <= prompt_lengths[:, None], -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    model.train()
    for step in range(steps):
        rows = torch.randint(len(examples), (batch,), generator=generator)
        logits = model(input_ids=ids[rows], attention_mask=attention[rows]).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[rows][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())


@torch.no_grad()
def greedy_accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> float:
    """Share of problems whose greedily decoded answer is exactly right."""
    was_training = model.training
    model.eval()
    prompts = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True, return_token_type_ids=False)
    written = model.generate(**prompts, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(written[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return sum(text == p.answer for text, p in zip(texts, problems, strict=True)) / len(problems)
