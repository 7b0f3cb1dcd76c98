"""A policy loss over an lm_head that is shared out over ranks, each of which holds V / ranks rows of it.

    torchrun --nproc_per_node 2 examples/vocab_parallel/train_head.py

Random hidden states stand for the model in front of the head: on every rank they must be the same, as tensor parallelism makes
them. The head is a DTensor here, as `parallelize_module` leaves it; a plain shard works with `vocab_start` and `vocab_size`.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dppo_kernels import PRESETS, linear_logprobs, linear_policy_loss

BATCH, STEPS, HIDDEN, VOCAB = 8, 32, 64, 50257  # the vocabulary is no multiple of the ranks, and need not be


def main(steps: int = 5) -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    group = mesh.get_group("tp")
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, STEPS, HIDDEN, generator=g).to(device)
    ids = torch.randint(0, VOCAB, (BATCH, STEPS), generator=g).to(device)
    advantages = torch.randn(BATCH, generator=g).to(device)
    mask = torch.ones(BATCH, STEPS, dtype=torch.bool, device=device)
    whole = torch.randn(VOCAB, HIDDEN, generator=g).to(device) / HIDDEN**0.5
    head = distribute_tensor(whole, mesh, [Shard(0)]).requires_grad_()

    with torch.no_grad():
        anchor = linear_logprobs(hidden, head, ids, process_group=group).logprobs
    optimizer = torch.optim.SGD([head], lr=0.2)
    losses = []
    for step in range(steps):
        loss, stats = linear_policy_loss(hidden, head, ids, anchor, advantages, mask, spec=PRESETS["ppo"], process_group=group)
        loss.backward()
        assert isinstance(head.grad, DTensor)  # of this rank's rows; nothing of the whole head's size was sent
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dist.get_rank() == 0:
            rows = f"{head.to_local().shape[0]} of {VOCAB} rows here"
            print(f"step {step}: loss {losses[-1]:.4f}, ratio {stats['ratio'].mean:.3f}, {rows}")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
