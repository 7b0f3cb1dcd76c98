"""The dependency arrows of the package: an import that points back fails."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lower numbers know nothing of higher ones. Modules of one number may share: both references are one formula.
FAMILIES = ("gae", "linear_logprobs", "token_logprobs")
COMPILED = (".cpp", ".cu", ".cuh", ".h", ".inc")
ABOVE_POLICY = (
    "distill",
    "linear_policy_loss",
    "linear_preference_loss",
    "value_loss",
)  # families made of the others: their parts share one rank
RANKS = {
    "_": 0,
    "reference": 1,
    "estimators": 1,
    "aggregate": 1,
    "advantages": 1,
    "moments": 1,
    "projection": 1,
    "design": 2,
    "exponentials": 2,
    "gradient_gemms": 2,
    "group_design": 2,
    "groups": 2,
    "groups_torch": 2,
    "groups_triton": 2,
    "kernels_chunk": 2,
    "kernels_rows": 2,
    "unit_gradient": 2,
    "kernels_unit": 2,
    "torch_impl": 2,
    "kernels": 2,
    "kernels_bwd": 2,
    "kernels_exp": 2,
    "kernels_gemm": 2,
    "topk_native": 2,
    "native": 2,
    "op": 3,
    "topk": 3,
    "divergence": 4,
    "control": 4,
    "policy_spec": 5,
    "surrogates": 5,
    "policy": 6,
    "preference_spec": 5,
    "preference_formulas": 5,
    "preference": 6,
    "distill": 7,
    "linear_policy_loss": 7,
    "linear_preference_loss": 7,
    "returns": 7,
    "value_loss": 7,
    "__init__": 9,
    "trainers": 10,
    "trainers.cli": 11,
}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ((ROOT / "dppo_kernels", "dppo_kernels"), (ROOT / "trainers", "dppo_kernels.trainers")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Absolute module names imported anywhere in the file, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names}
    return names


def rank(module: str) -> int:
    if module == "dppo_kernels":
        return RANKS["__init__"]
    parts = module.removeprefix("dppo_kernels.").split(".")
    if parts[0] == "trainers":
        return RANKS["trainers.cli"] if parts[-1] == "cli" else RANKS["trainers"]
    if parts[0] in ABOVE_POLICY:
        return RANKS[parts[0]]
    if parts[0] in FAMILIES:
        return RANKS["op"] if len(parts) == 1 else RANKS["_" if parts[1].startswith("_") else parts[1]]
    return RANKS["_" if parts[0].startswith("_") else parts[0]]


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    for name in imports(modules()[module]):
        if name.startswith("dppo_kernels") and name != module:
            assert rank(name) <= rank(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in modules() if not m.startswith("dppo_kernels.trainers")])
def test_the_core_knows_only_torch(module: str) -> None:
    allowed = {"dppo_kernels", "torch", *sys.stdlib_module_names}
    if module.split(".")[-1] in (
        "kernels",
        "kernels_bwd",
        "kernels_chunk",
        "kernels_exp",
        "kernels_gemm",
        "kernels_unit",
        "kernels_rows",
        "triton_impl",
        "groups_triton",
        "logits_triton",
        "_tl",
        "_triton",
    ):  # imported by ops when a call runs on Triton
        allowed.add("triton")
    third_party = {name.split(".")[0] for name in imports(modules()[module])} - allowed
    assert not third_party, f"{module} imports {third_party}"


@pytest.mark.parametrize("module", [m for m in modules() if m.endswith("reference")])
def test_references_import_no_kernels(module: str) -> None:
    assert not any("triton" in name or "torch_impl" in name for name in imports(modules()[module]))


def test_only_the_seam_reads_private_names_of_trl() -> None:
    for module, path in modules().items():
        if not module.endswith("_trl_seam"):
            assert not [name for name in imports(path) if name.startswith("trl.")], module


def test_files_hold_one_idea() -> None:
    tracked = [p for folder in ("dppo_kernels", "trainers", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    tracked += [p for folder in ("csrc", "tests") for p in (ROOT / folder).rglob("*") if p.suffix in COMPILED]
    long = {str(p.relative_to(ROOT)): n for p in tracked if (n := len(p.read_text().splitlines())) > 600}
    assert not long
