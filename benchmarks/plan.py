"""A step of policy training on 8 to 1024 GPUs: what the head costs in memory, time and traffic, and what the rest does.

A model of first order: products at a share of the peak, weights at the bandwidth of the memory, bytes at that of the links,
nothing overlapped. `HEAD_FLOPS`, `PARTIALS` and `NAIVE_BYTES` are counted or measured by tests of this repository; a machine's
figures are those of data sheets, and the efficiencies are assumptions: no GPU has run this.
"""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.report import ROOT

HEAD_FLOPS = 6  # of a row, in H V, with the head trained: counted in tests/linear_policy_loss/test_work.py
PARTIALS = 2  # fp32 numbers of a row that ranks sum: counted in tests/distributed/test_vocab_parallel.py
NAIVE_BYTES = 10  # of a logit, with full logits and autograd: measured in tests/linear_policy_loss/test_memory.py, float32
WORKSPACE = 512 << 20  # default on a GPU
STATE_BYTES = 14  # of a parameter: 16-bit weight, fp32 copy, Adam's two moments; sharded over all ranks
BEGIN, END = "<!-- plan: written by `python -m benchmarks plan --write` -->", "<!-- end of plan -->"
DOCUMENT = ROOT / "docs" / "scaling.md"


@dataclass(frozen=True)
class Machine:
    """A GPU and its links; of the data sheet, not measured."""

    name: str = "H100 SXM"
    flops: float = 989e12  # 16 bit, dense
    bandwidth: float = 3.35e12  # bytes a second, of its memory
    link: float = 450e9  # bytes a second one way, within a node of 8
    network: float = 50e9  # bytes a second one way and GPU, between nodes
    efficiency: float = 0.5  # of products; assumed
    streaming: float = 0.7  # of the memory's bandwidth while decoding; assumed


@dataclass(frozen=True)
class Model:
    """A dense decoder; sizes of its model card."""

    name: str
    body: float  # parameters but for embedding and head
    hidden: int
    vocab: int
    layers: int
    kv_width: int  # numbers of a token's keys in a layer


MODELS = (
    Model("Qwen2.5-1.5B", 1.31e9, 1536, 151936, 28, 256),
    Model("Qwen2.5-7B", 6.53e9, 3584, 152064, 28, 512),
    Model("Llama-3.1-70B", 68.5e9, 8192, 128256, 80, 1024),
)


@dataclass(frozen=True)
class Step:
    """One optimiser step: on-policy, the rollout's log-probs serve as the anchor, the head is trained."""

    model: Model
    gpus: int
    tensor_parallel: int  # ranks that share the body's layers and the head
    sequences: int = 1024
    prompt: int = 512
    completion: int = 2048
    micro_rows: int = 16384  # completion tokens of a micro-batch

    def __post_init__(self) -> None:
        if self.gpus % self.tensor_parallel:
            raise ValueError(f"`gpus` must be a multiple of `tensor_parallel`: got {self.gpus} and {self.tensor_parallel}")

    @property
    def replicas(self) -> int:
        return self.gpus // self.tensor_parallel

    @property
    def rows(self) -> float:
        """Completion tokens of a replica."""
        return self.sequences * self.completion / self.replicas

    def head_flops(self) -> float:
        """Of one GPU."""
        return HEAD_FLOPS * self.rows * self.model.hidden * self.model.vocab / self.tensor_parallel

    def body_flops(self) -> float:
        tokens = self.sequences * (self.prompt + self.completion) / self.replicas
        return 6 * self.model.body * tokens / self.tensor_parallel

    def head_state(self) -> float:
        """Bytes of the head, its fp32 copy and Adam's moments, sharded over all ranks (FSDP or ZeRO-3 beside TP)."""
        return STATE_BYTES * self.model.hidden * self.model.vocab / self.gpus

    def state(self) -> float:
        """Bytes of the same of the whole model; embedding and head are two."""
        return STATE_BYTES * self.model.body / self.gpus + 2 * self.head_state()

    def head_transient(self) -> float:
        """Bytes while the loss runs: gathered 16-bit weight, its fp32 gradient, workspace, hidden states and their gradient."""
        head = self.model.hidden * self.model.vocab / self.tensor_parallel
        return (2 + 4) * head + WORKSPACE + (2 + 4) * min(self.micro_rows, self.rows) * self.model.hidden

    def naive_logits(self) -> float:
        """Bytes that full logits would take instead of the workspace."""
        return NAIVE_BYTES * min(self.micro_rows, self.rows) * self.model.vocab / self.tensor_parallel

    def head_traffic(self) -> tuple[float, float]:
        """Bytes a rank sends per step in a ring of its tensor-parallel group: (sums of rows, gradient of hidden states)."""
        ring = 2 * (self.tensor_parallel - 1) / self.tensor_parallel
        return ring * 4 * PARTIALS * self.rows, ring * 4 * self.model.hidden * self.rows

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Of each part, one after the other."""
        model, ranks = self.model, self.tensor_parallel
        weights = 2 * (model.body + model.hidden * model.vocab) / ranks
        sequences = self.sequences / self.replicas
        context = self.prompt + self.completion / 2
        cache = sequences * context * 2 * 2 * model.layers * model.kv_width / ranks
        decoding = (weights + cache) / (machine.bandwidth * machine.streaming)
        shared = self.replicas > 1
        link = machine.network if self.gpus > 8 else machine.link
        # Of each micro-batch: weights are gathered for the forward and the backward, gradients reduced, in 16 bits.
        micro_batches = max(1.0, self.rows / self.micro_rows)
        sharding = micro_batches * 3 * weights * (self.replicas - 1) / self.replicas / link if shared else 0.0
        # Four sums of a layer, of all tokens' hidden states in 16 bits.
        tokens = self.sequences * (self.prompt + self.completion) / self.replicas
        layers = 2 * (ranks - 1) / ranks * 4 * model.layers * 2 * model.hidden * tokens
        return {
            "rollout": self.completion * decoding,
            "body": self.body_flops() / (machine.flops * machine.efficiency),
            "head": self.head_flops() / (machine.flops * machine.efficiency),
            "body's sums": layers / machine.link,
            "head's sums": sum(self.head_traffic()) / machine.link,
            "sharding": sharding,
        }


def steps() -> list[Step]:
    """What the document tabulates."""
    found = []
    for model, ranks in zip(MODELS, (1, 2, 8), strict=True):
        larger = Model(f"{model.name}, V = 512k", model.body, model.hidden, 524288, model.layers, model.kv_width)
        for one in (model, larger):
            found += [Step(one, gpus, ranks) for gpus in (8, 64, 256, 1024)]
    return found


HEADER = (
    "model",
    "GPUs",
    "TP",
    "model: state",
    "head: state",
    "while it runs",
    "full logits",
    "sent for it",
    "rollout s",
    "body s",
    "head s",
    "body's sums s",
    "head's sums s",
    "sharding s",
    "head of training",
    "rollout of step",
)


def table(planned: list[Step], machine: Machine) -> list[tuple[str, ...]]:
    """Rows under `HEADER`; GB and seconds of one GPU and step."""
    rows = []
    for step in planned:
        seconds = step.seconds(machine)
        training = sum(seconds.values()) - seconds["rollout"]
        of_head = seconds["head"] + seconds["head's sums"]
        sizes = (step.state(), step.head_state(), step.head_transient(), step.naive_logits(), sum(step.head_traffic()))
        rows.append(
            (
                step.model.name,
                str(step.gpus),
                str(step.tensor_parallel),
                *(f"{size / 1e9:.2f}" for size in sizes),
                *(f"{value:.2f}" for value in seconds.values()),
                f"{of_head / training:.0%}",
                f"{seconds['rollout'] / sum(seconds.values()):.0%}",
            )
        )
    return rows


def markdown() -> str:
    """The document's table."""
    lines = [HEADER, tuple("---" for _ in HEADER), *table(steps(), Machine())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(step: Step, console: Console) -> None:
    printed = Table(title=f"one step on {Machine().name}, GB and seconds of a GPU")
    for column in HEADER:
        printed.add_column(column)
    for row in table([step], Machine()):
        printed.add_row(*row)
    console.print(printed)


def write() -> None:
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{markdown()}\n{END}{rest.split(END)[1]}")
