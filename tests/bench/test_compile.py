"""Every kernel in every shipped configuration compiles for an RTX 4090 and an H100, without a card:
no spill, no more shared memory than they have, tensor cores where matrices are multiplied."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile import verdict

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_compiles_for_the_real_cards():
    # a process that interprets cannot compile
    done = subprocess.run(
        [sys.executable, "-m", "bench.compile", "--arch", "89", "90"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if " sm_" in line]
    assert len(rows) > 200 and {"sm_89", "sm_90"} == {row[61:66] for row in rows}
    for op in (
        "lora_gemm",
        "gemm_8bit",
        "quantize_rows",
        "nf4_codes",
        "hadamard",
        "attention",
        "qk_norm_rope",
        "norm_modulate",
        "gelu",
        "gate_residual",
    ):
        assert any(op in row for row in rows), op


@pytest.mark.slow
def test_a_transposed_weight_is_the_shortest_way_to_dx():
    """What `bench/LOG.md` says of the three ways, and what the dispatch's rows rest on."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.dx_layouts", "--arch", "89"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("int8", "fp8"))]
    a_product = {line[:18].strip(): float(line.split()[-1]) for line in lines}
    assert len(a_product) == 6
    for kind in ("int8", "fp8"):
        kept, swapped, transposed = (
            next(n for name, n in a_product.items() if name.startswith(kind) and way in name)
            for way in ("as kept", "swapped", "transposed")
        )
        assert 2 * transposed < kept < swapped, (kind, a_product)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"stack": 8}, "spills"),
        ({"sass": {"HMMA": 4, "STL": 1}}, "spills"),
        ({"shared": 101_377}, "shared memory"),
        ({"sass": {"FFMA": 9}}, "tensor cores"),
    ],
)
def test_what_is_wrong_is_said(change, said):
    from bench.compile_cases import KernelCase

    cost = {"stack": 0, "shared": 101_376, "sass": {"HMMA": 4}} | change
    problem = verdict(KernelCase("k", None, {}, {}, matrix=True), cost, 89)
    assert problem is None if said is None else said in problem
