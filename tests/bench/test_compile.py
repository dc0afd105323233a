"""Every kernel in every shipped configuration compiles for an RTX 4090 and an H100, without a card:
no spill, no more shared memory than they have, tensor cores where matrices are multiplied."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile import verdict

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str) -> list[str]:
    """Returns its output. In a process of its own: one that interprets cannot compile."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_compiles_for_the_real_cards():
    rows = [line for line in run("bench.compile", "--arch", "89", "90") if " sm_" in line]
    assert len(rows) > 200 and {"sm_89", "sm_90"} == {row[61:66] for row in rows}
    for op in (
        *("lora_gemm", "gemm_8bit", "quantize_rows", "nf4_codes", "hadamard", "attention"),
        *("qk_norm_rope", "norm_modulate", "gelu", "gate_residual"),
    ):
        assert any(op in row for row in rows), op


@pytest.mark.slow
def test_a_transposed_weight_is_the_shorter_way_to_dx():
    """As `bench/LOG.md` says, and as the dispatch's rows rely on."""
    table = run("bench.dx_layouts", "--arch", "89")
    lines = [line for line in table if line.startswith(("int8", "fp8"))]
    per_mma = {line[:18].strip(): float(line.split()[-1]) for line in lines}
    assert len(per_mma) == 4
    # e4m3 adds its sums up after each step, both ways
    for kind, least in (("int8", 2.0), ("fp8", 1.7)):
        stored, transposed = (
            next(n for name, n in per_mma.items() if name.startswith(kind) and way in name)
            for way in ("as kept", "transposed")
        )
        assert least * transposed < stored, (kind, per_mma)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"stack": 8}, "spills"),
        ({"sass": {"HMMA": 4, "STL": 1}}, "spills"),
        ({"shared": 101_377}, "shared memory"),
        ({"sass": {"FFMA": 9}}, "tensor cores"),
    ],
)
def test_faults_are_named(change, fault):
    from bench.compile_cases import KernelCase

    cost = {"stack": 0, "shared": 101_376, "sass": {"HMMA": 4}} | change
    found = verdict(KernelCase("k", None, {}, {}, matrix=True), cost, 89)
    assert found is None if fault is None else fault in found
