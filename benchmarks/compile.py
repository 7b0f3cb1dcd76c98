"""``python -m benchmarks compile [--arch 80 90 100 gfx942]``: every kernel with its production tiles, without a GPU.

Prints registers, spills, shared memory, and whether the code uses wgmma (or tcgen05) and TMA. Exits with 1 if a kernel
spills on sm_90 without a reason in `REASONS`, needs more shared memory than the chip has, or is a GEMM without wgmma on sm_90.
CUDA C++ kernels follow (`compile_csrc.py`).
"""

import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.compile_csrc import run_compile_csrc

ARCHITECTURES = ("80", "90", "100", "gfx942")
SHARED_LIMIT = {"80": 163 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}
REASONS: dict[tuple[str, str], str] = {}  # (kernel, architecture) -> why its spills are accepted, with the measured alternative
FP32, I32, I64, BOOL = "*fp32", "*i32", "*i64", "*i1"


@dataclass(frozen=True)
class Case:
    """One kernel as production launches it."""

    kernel: Any
    label: str
    types: dict[str, str]  # argument -> Triton type; what is not named here or in `constants` is an i32
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    gemm: bool = False
    multiples_of_16: tuple[str, ...] = field(default=())


def cases(architecture: str) -> list[Case]:
    """All kernels for bf16 inputs with a head of V = 151936, H = 4096, K = 21, and what TRL asks for (log-probs, entropy).

    GEMM kernels twice where there are tensor descriptors: strides they cannot describe take the pointer path.
    """
    first = _cases(architecture, described=architecture in ("90", "100"))
    first += [
        replace(
            case,
            label=f"{case.label.replace('256', '128')} {name}",
            types={**case.types, "weight": case.types["weight"].replace("[256,", "[128,")},
            constants={**case.constants, **flags, "BLOCK_V": min(case.constants["BLOCK_V"], 128)},
        )
        for case in first
        if case.kernel.fn.__name__ in ("linear_dlogits_kernel", "exponentials_kernel", "logits_kernel")
        for name, flags in {
            "bias": {"HAS_BIAS": True},
            "soft-cap": {"HAS_SOFTCAP": True},
            "both": {"HAS_BIAS": True, "HAS_SOFTCAP": True},
        }.items()
        if name == "both" or case.kernel.fn.__name__ != "logits_kernel"  # it has the least beside the accumulator
    ]
    if architecture not in ("90", "100"):
        return first
    return first + [replace(case, label=f"{case.label} ptr") for case in _cases(architecture, described=False) if case.gemm]


def _cases(architecture: str, *, described: bool) -> list[Case]:
    import torch

    from dppo_kernels._tiling import pick_comparison_plan, pick_gae_plan, pick_grad_plan, pick_lse_plan, pick_row_plan
    from dppo_kernels.distill import kernels as distill
    from dppo_kernels.gae.kernels import gae_kernel
    from dppo_kernels.linear_logprobs import kernels, kernels_bwd, kernels_chunk, kernels_exp, kernels_rows, kernels_unit
    from dppo_kernels.linear_logprobs.groups_triton import COPY_BLOCK
    from dppo_kernels.linear_logprobs.kernels_exp import ROW_BLOCK
    from dppo_kernels.linear_policy_loss.kernels_rows import policy_row_kernel
    from dppo_kernels.token_logprobs import kernels as token
    from dppo_kernels.value_loss.kernels import BLOCK, value_loss_kernel

    capability = {"80": (8, 0), "90": (9, 0), "100": (10, 0)}.get(architecture, (8, 0))
    lse, grad = (pick(capability, torch.bfloat16, described) for pick in (pick_lse_plan, pick_grad_plan))
    row, pair = pick_row_plan(capability), pick_comparison_plan(capability)
    bf16 = "*bf16"

    def operand(rows: int, cols: int) -> str:
        return f"tensordesc<bf16[{rows},{cols}]>" if described else bf16

    flags = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "LOW_RANK": False, "BLOCK_R": 16}
    stats = {"ENTROPY": True, "SUM_SQ": False, "TOTAL": False, "ARGMAX": False}
    tile = {"DESCRIPTOR": described, "UPCAST": False}
    partials = {f"{name}_ptr": FP32 for name in ("max", "sum", "dot", "sum_sq", "total")} | {"argmax_ptr": I32}
    rowwise = {
        f"{name}_ptr": FP32 for name in ("inverse_temperature", "row_max", "log_sum", "on_probs", "on_logprobs", "lse", "z")
    }
    picked = {"ids_ptr": I64, "order_ptr": I64, "count_ptr": I32, "upstream_ptr": FP32, "out_ptr": FP32, "picked_ptr": FP32}
    scalars = {"scale": "fp32", "softcap": "fp32"}
    wide = (
        "H",
        "V",
        "stride_weight_v",
        "N",
        "stride_b_k",
        "stride_out_v",
        "stride_n",
        "stride_a",
        "stride_b",
        "R",
    )
    common = {**rowwise, **picked, **scalars, **dict.fromkeys(("bias_ptr", "dz_ptr", "low_hidden_ptr", "low_weight_ptr"), bf16)}
    gemm = {"BLOCK_M": grad.gemm_m, "BLOCK_H": grad.gemm_h, "BLOCK_K": grad.gemm_k, "COLS": grad.strip_cols, **tile}
    found = [
        Case(
            kernels.linear_lse_fwd_kernel,
            f"{lse.block_n}x{lse.block_v}x{lse.block_h}",
            {
                **common,
                **partials,
                "hidden": operand(lse.block_n, lse.block_h),
                "weight": operand(lse.block_v, lse.block_h),
            },
            {
                **flags,
                **stats,
                **tile,
                "stride_weight_h": 1,
                "BLOCK_N": lse.block_n,
                "BLOCK_V": lse.block_v,
                "BLOCK_H": lse.block_h,
                "SEGMENT_TILES": lse.segment_tiles,
                "GROUP_BLOCKS": lse.group_blocks,
            },
            lse.num_warps,
            lse.num_stages,
            gemm=True,
            multiples_of_16=wide,
        ),
        Case(
            kernels_bwd.linear_dlogits_kernel,
            f"{grad.block_n}x{grad.block_v}x{grad.block_h}",
            {**common, "hidden": operand(grad.block_n, grad.block_h), "weight": operand(grad.block_v, grad.block_h)},
            {
                **flags,
                **tile,
                "ENTROPY": True,
                "stride_weight_h": 1,
                "COLS": grad.strip_cols,
                "BLOCK_N": grad.block_n,
                "BLOCK_V": grad.block_v,
                "BLOCK_H": grad.block_h,
            },
            grad.num_warps,
            grad.num_stages,
            gemm=True,
            multiples_of_16=(*wide, "first_row", "first_col"),
        ),
    ]
    for transposed, block_h in itertools.product((False, True), (grad.gemm_h, 16)):  # 16: a LoRA
        a = operand(grad.gemm_k, grad.gemm_m) if transposed else operand(grad.gemm_m, grad.gemm_k)
        found.append(
            Case(
                kernels_bwd.accumulate_gemm_kernel,
                f"{'dweight' if transposed else 'dhidden'} {grad.gemm_m}x{block_h}x{grad.gemm_k}",
                {
                    **common,
                    "a": a,
                    "b": operand(grad.gemm_k, block_h),
                    "sum_ptr": FP32,
                    "out_ptr": bf16 if transposed else FP32,
                },
                {
                    **gemm,
                    "BLOCK_H": block_h,
                    "TRANSPOSED": transposed,
                    "FIRST": False,
                    "LAST": transposed,
                    "stride_b_h": 1,
                    "stride_out_h": 1,
                },
                grad.num_warps,
                grad.num_stages,
                gemm=True,
                multiples_of_16=(*wide, "first_row", "first_col", "chunk_rows"),
            )
        )
    finished = {f"{name}_ptr": FP32 for name in ("logprobs", "entropy", "log_sum_sq", "mean", "gathered")}
    found += [
        Case(
            kernels.compact_rows_kernel,
            "1024",
            {"source_ptr": bf16, "out_ptr": bf16, "order_ptr": I64, "count_ptr": I32},
            {"stride_h": 1, "UPCAST": False, "BLOCK_H": 1024},
            4,
            multiples_of_16=wide,
        ),
        Case(
            kernels.gather_dot_kernel,
            "K 21, 16x256",
            {**common, "hidden_ptr": bf16, "weight_ptr": bf16},
            {**flags, "stride_weight_h": 1, "BLOCK_K": 16, "BLOCK_H": 256},
            4,
            multiples_of_16=wide,
        ),
        Case(
            kernels.linear_finish_kernel,
            f"{kernels.FINISH_ROWS} rows",
            {**common, **partials, **finished, "is_top1_ptr": BOOL},
            {**stats, "BLOCK_N": kernels.FINISH_ROWS},
            1,
        ),
        Case(
            kernels_unit.unit_gradient_kernel,
            f"K 21, 32x{kernels_unit.GATHER_TILE // 32}",
            {
                **common,
                **{f"{name}_ptr": FP32 for name in ("unit", "gradients", "logprobs")},
                "weight_ptr": bf16,
                "active_ptr": BOOL,
                "out_ptr": bf16,
            },
            {
                "HAS_SOFTCAP": True,
                "stride_weight_h": 1,
                "stride_out_h": 1,
                "BLOCK_K": 32,
                "BLOCK_H": kernels_unit.GATHER_TILE // 32,
            },
            4,
            multiples_of_16=(*wide, "stride_out_n"),
        ),
        Case(kernels_bwd.picked_gradient_kernel, "K 21", common, {"HAS_SOFTCAP": False, "ENTROPY": True, "BLOCK_K": 32}, 1),
        Case(kernels_bwd.scatter_picked_kernel, "K 21", common, {"COLS": grad.strip_cols, "BLOCK_K": 32}, 1),
        Case(
            kernels_bwd.column_sums_kernel,
            "32x64",
            {**common, "sum_ptr": FP32, "weight_ptr": FP32},
            {"WEIGHTED": True, "COLS": grad.strip_cols, "BLOCK_N": 32, "BLOCK_V": 64},
            4,
        ),
        Case(
            token.token_logprobs_fwd_kernel,
            f"{row.block_v}",
            {**common, **finished, "logits_ptr": bf16, "counted_ptr": BOOL},
            {"stride_v": 1, "ENTROPY": True, "BLOCK_V": row.block_v, "BLOCK_K": 32},
            row.num_warps,
            multiples_of_16=wide,
        ),
        Case(
            token.token_logprobs_bwd_kernel,
            f"{row.block_v}",
            {**common, "logits_ptr": bf16, "dlogits_ptr": bf16, "active_ptr": BOOL},
            {
                "stride_v": 1,
                "stride_out_v": 1,
                "ENTROPY": True,
                "PICKED": True,
                "BLOCK_V": row.block_v,
                "BLOCK_K": 32,
            },
            row.num_warps,
            multiples_of_16=(*wide, "stride_out_a", "stride_out_b"),
        ),
    ]
    chunk = dict.fromkeys(
        (
            *("anchor_ptr", "rest_ptr", "dot_ptr", "max_ptr", "target_ptr", "total_rest_ptr", "total_dot_ptr", "factor_ptr"),
            *("at_target_ptr", "offset_ptr", "out_factor_ptr", "rows_ptr", "top_ptr"),
        ),
        FP32,
    )
    chunk |= {"e_ptr": bf16, "redo_ptr": I32, "source_ptr": I64, "keep_ptr": I32}
    padded = -(-151936 // grad.block_v) * grad.block_v
    found.append(
        Case(
            kernels_exp.exponentials_kernel,
            f"{grad.block_n}x{grad.block_v}x{grad.block_h}",
            {**common, **chunk, "hidden": operand(grad.block_n, grad.block_h), "weight": operand(grad.block_v, grad.block_h)},
            {
                **flags,
                **tile,
                "FOLD_SLOPE": True,
                "ENTROPY": True,
                "REDO": False,
                "stride_weight_h": 1,
                "COLS": padded,
                "BLOCK_N": grad.block_n,
                "BLOCK_V": grad.block_v,
                "BLOCK_H": grad.block_h,
            },
            grad.num_warps,
            grad.num_stages,
            gemm=True,
            multiples_of_16=(*wide, "first_row", "chunk_rows"),
        )
    )
    per_row = {
        f"{name}_ptr": FP32 for name in ("advantages", "weights", "anchor_logprobs", "ref", "token_weights", "rollout_topk")
    }
    row_types = {
        **common,
        **chunk,
        **finished,
        **per_row,
        "topk_ids_ptr": I64,
        "topk_valid_ptr": BOOL,
        "entropy_weight_ptr": FP32,
        "loss_ptr": "*fp64",
        "stats_ptr": "*fp64",
        **dict.fromkeys(("epsilon_low", "epsilon_high", "ratio_cap", "sapo_pos", "sapo_neg", "beta"), "fp32"),
    }
    found += [
        Case(
            kernels_exp.merge_sums_kernel,
            f"{ROW_BLOCK} rows",
            {**common, **chunk},
            {"ENTROPY": True, "REDO": False, "BLOCK_N": ROW_BLOCK, "PROJECTION_BLOCK_N": grad.block_n},
            1,
        ),
        Case(
            kernels_chunk.entropy_gradient_kernel,
            f"{ROW_BLOCK}x128",
            {**common, **chunk},
            {"HAS_SOFTCAP": True, "COLS": padded, "BLOCK_N": ROW_BLOCK, "BLOCK_V": 128},
            4,
        ),
        Case(kernels_chunk.move_rows_kernel, f"{COPY_BLOCK}", {**common, **chunk}, {"COLS": padded, "BLOCK_V": COPY_BLOCK}, 4),
        Case(
            kernels_chunk.scale_rows_kernel,
            f"{COPY_BLOCK}",
            {**common, **chunk, "hidden_ptr": bf16, "out_ptr": bf16},
            {"COLS": padded, "UPCAST": False, "BLOCK_H": COPY_BLOCK},
            4,
        ),
        Case(kernels_exp.scatter_rows_kernel, f"{COPY_BLOCK}", {**common, **chunk}, {"BLOCK_H": COPY_BLOCK}, 4),
    ]
    by_group = {**common, **chunk, **finished, "dlogprobs_ptr": FP32, "is_top1_ptr": BOOL, "entropy_weight_ptr": FP32}
    for kernel, asked in (
        (kernels_rows.row_scores_kernel, ("ENTROPY", "TOP1")),
        (kernels_rows.row_operands_kernel, ("HAS_SOFTCAP", "ENTROPY", "ENTROPY_GRADIENT")),
    ):
        found.append(Case(kernel, f"{ROW_BLOCK} rows", by_group, {**dict.fromkeys(asked, True), "BLOCK_N": ROW_BLOCK}, 1))
    for surrogate, kind in (("clip", ""), ("divergence", "binary_kl"), ("divergence", "topk_kl")):
        found.append(
            Case(
                policy_row_kernel,
                f"{kind or surrogate}, {ROW_BLOCK} rows",
                row_types,
                {
                    **dict.fromkeys(("HAS_CAP", "HAS_ANCHOR", "HAS_REF", "KL", "KL_WEIGHTED", "HAS_TOKEN_WEIGHTS"), True),
                    **dict.fromkeys(("HAS_VALID", "HAS_SOFTCAP", "ENTROPY", "ENTROPY_GRADIENT"), True),
                    "SURROGATE": surrogate,
                    "DIVERGENCE": kind,
                    "N_STATS": 12,
                    "BLOCK_N": ROW_BLOCK,
                },
                1,
            )
        )
    compared = dict.fromkeys((f"{name}_ptr" for name in ("student", "teacher", "z", "sum", "teacher_max", "teacher_sum")), FP32)
    compared |= dict.fromkeys(("divergence_ptr", "saved_ptr", "factor_ptr"), FP32)
    compared |= {"counted_ptr": BOOL, "agrees_ptr": BOOL, "out_ptr": bf16, "beta": "fp32", "n_blocks": "i32"}
    strides = {"stride_v": 1, "stride_teacher_v": 1}
    blocks = padded // grad.block_v
    found.append(
        Case(
            distill.logits_kernel,
            f"{grad.block_n}x{grad.block_v}x{grad.block_h}",
            {
                **common,
                **chunk,
                **compared,
                "hidden": operand(grad.block_n, grad.block_h),
                "weight": operand(grad.block_v, grad.block_h),
            },
            {
                **flags,
                **tile,
                "stride_weight_h": 1,
                "COLS": padded,
                "BLOCK_N": grad.block_n,
                "BLOCK_V": grad.block_v,
                "BLOCK_H": grad.block_h,
            },
            grad.num_warps,
            grad.num_stages,
            gemm=True,
            multiples_of_16=(*wide, "first_row", "chunk_rows"),
        )
    )
    given = {**compared, "student_ptr": bf16, "teacher_ptr": bf16}
    for kind, (where, (types, constants)) in itertools.product(
        ("forward_kl", "reverse_kl", "jsd", "tv"),
        {
            "chunk": (compared, {"PARTIALS": True, "COMPACTED": True, "TEMPERED": False, "HAS_SOFTCAP": True}),
            "logits": (given, {"PARTIALS": False, "COMPACTED": False, "TEMPERED": True, "HAS_SOFTCAP": False}),
        }.items(),
    ):
        if where == "logits" and kind != "jsd":  # the one with the most to keep
            continue
        asked = {
            "ENTROPY": True,
            "AGREEMENT": True,
            "SHARDED": False,
            "BLOCK_P": 1 << (blocks - 1).bit_length(),
            "BLOCK_V": pair.block_v,
        }
        found += [
            Case(
                kernel,
                f"{kind}, {where}, {pair.block_v}",
                {**common, **chunk, **finished, **types},
                {**strides, **constants, **asked, "KIND": kind},
                pair.num_warps,
                multiples_of_16=(*wide, "COLS", "stride_teacher_a", "stride_teacher_b"),
            )
            for kernel in (distill.divergence_row_kernel, distill.divergence_gradient_kernel)
        ]
    values = {f"{name}_ptr": FP32 for name in ("rewards", "values", "bootstrap", "decay", "decay_value", "moments", "returns")}
    values |= {f"{name}_ptr": FP32 for name in ("old_values", "weight", "dvalues", "partials")}
    values |= {"advantages_ptr": FP32, "mask_ptr": BOOL, "gamma": "fp32", "clip": "fp32"}
    for steps, extra in itertools.product((128, 65536), (False, True)):
        gae_plan = pick_gae_plan(capability, steps)
        strides = {f"stride_{name}_t": 1 for name in ("rewards", "values", "mask")} | {"stride_decay": 0}
        features = {"HAS_BOOTSTRAP": extra, "TWO": extra, "MOMENTS": extra, "BLOCK_T": gae_plan.block_t}
        label = f"{gae_plan.block_t}{' two lambdas, moments' if extra else ''}"
        found.append(Case(gae_kernel, label, values, {**strides, **features}, gae_plan.num_warps))
    found.append(Case(value_loss_kernel, f"{BLOCK}", values, {"HAS_CLIP": True, "BLOCK_N": BLOCK}, 4))
    with_lora = [case for case in found if "LOW_RANK" in case.kernel.arg_names]
    return found + [replace(x, label=f"{x.label} LoRA", constants={**x.constants, "LOW_RANK": True}) for x in with_lora]


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel."""

    registers: int | None
    spilled_bytes: int | None
    shared: int
    matrix: str  # wgmma, tcgen05, mma, mfma or -
    tma: bool


def compile_case(case: Case, architecture: str) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constants = {name: value for name, value in case.constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else case.types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or (name in case.multiples_of_16)]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants}
    source = ASTSource(case.kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture), 32)
    options = {"num_warps": case.num_warps, "num_stages": min(case.num_stages, 2) if amd else case.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    if amd:
        assembly = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
        return Report(
            int(registers[1]) if registers else None,
            4 * int(spilled[1]) if spilled else None,
            compiled.metadata.shared,
            "mfma" if "mfma" in assembly else "-",
            False,
        )
    ptx = compiled.asm["ptx"]
    log = _ptxas(ptx)
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    matrix = next((name for name in ("tcgen05.mma", "wgmma.mma", "mma.sync") if name in ptx), "-")
    return Report(
        int(registers[1]) if registers else None,
        int(spilled[1]) if spilled else None,
        compiled.metadata.shared,
        matrix,
        "cp.async.bulk.tensor" in ptx,
    )


def _ptxas(ptx: str) -> str:
    """What the assembler of the installed Triton prints about registers and spills."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    target = re.search(r"^\.target (\S+)", ptx, re.MULTILINE)
    assert target
    architecture = target[1].rstrip(",")
    name = next(name for name in ("ptxas-blackwell", "ptxas") if (tools / name).exists())  # the newest: it knows all targets
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [str(tools / name), "-v", f"--gpu-name={architecture}", str(path), "-o", os.devnull]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def complaints(case: Case, architecture: str, report: Report) -> list[str]:
    found = []
    name = case.kernel.fn.__name__
    if architecture == "90" and report.spilled_bytes and (name, architecture) not in REASONS:
        found.append(f"spills {report.spilled_bytes} bytes")
    if report.shared > SHARED_LIMIT[architecture]:
        found.append(f"needs {report.shared} bytes of shared memory, the chip has {SHARED_LIMIT[architecture]}")
    if architecture == "90" and case.gemm and report.matrix != "wgmma.mma":
        found.append("multiplies matrices without wgmma")
    return found


def _compile_numbered(architecture: str, number: int) -> Report:
    """Cases hold kernels, which cannot be sent to another process; their numbers can."""
    return compile_case(cases(architecture)[number], architecture)


def run_compile(architectures: list[str]) -> int:
    """Print the table; the exit status."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    console, failures = Console(width=140), []
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        reports = {a: pool.map(_compile_numbered, itertools.repeat(a), range(len(cases(a)))) for a in architectures}
    for architecture in architectures:
        title = architecture if architecture.startswith("gfx") else f"sm_{architecture}"
        table = Table(title=title)
        for column in ("kernel", "tile", "registers", "spilled bytes", "shared bytes", "matrix unit", "TMA", ""):
            table.add_column(column)
        for case, report in zip(cases(architecture), reports[architecture], strict=True):
            name = case.kernel.fn.__name__
            wrong = complaints(case, architecture, report)
            failures += [f"{title} {name} {case.label}: {what}" for what in wrong]
            values = (report.registers, report.spilled_bytes, report.shared, report.matrix, "yes" if report.tma else "-")
            note = "; ".join(wrong) or REASONS.get((name, architecture), "")
            table.add_row(name, case.label, *(str(value) for value in values), note)
        console.print(table)
    failures += run_compile_csrc(architectures, console)
    for failure in failures:
        console.print(failure, style="red", markup=False)
    return 1 if failures else 0
