"""The comparison with bitsandbytes: it compares bytes before times, and says what is too slow."""

import json

import pytest
from fluxfast_kernels.quant import native

from bench import quantize


def row(name, what, ratio, reason=None):
    return {"name": name, "what": what, "ratio": ratio, "reason": reason}


@pytest.mark.slow
def test_a_small_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(quantize, "LEAST", {"quantize": 0.0, "decode": 0.0})
    monkeypatch.setattr(quantize, "ROWS", tmp_path / "rows.jsonl")
    assert quantize.main(["--rounds", "2", "--rows", "64", "--columns", "128", "--save"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["what"], r["name"]) for r in rows] == [
        ("quantize", quantize.THEIRS),
        ("quantize", quantize.OURS),
        ("decode", quantize.THEIRS),
        ("decode", quantize.FRESH),
        ("decode", quantize.OURS),
    ]
    for found in rows:
        assert found["status"] == "ok" and found["rounds"] == 2 and found["gweights_per_s"] > 0
        assert found["isa"] == native.isa() and found["commit"] and found["bitsandbytes"]
    assert "G weights/s" in capsys.readouterr().out


def test_what_is_too_slow():
    fast = [row(quantize.OURS, "quantize", 1 / 31), row(quantize.OURS, "decode", 1 / 2.6)]
    slow = [row(quantize.OURS, "quantize", 1 / 29), row(quantize.OURS, "decode", 1 / 2.4)]
    assert quantize.too_slow(fast, "avx512") == []
    assert len(quantize.too_slow(slow, "avx512")) == 2
    assert quantize.too_slow(slow, "avx2") == []
    # another candidate's times are not ours
    assert quantize.too_slow([row(quantize.FRESH, "decode", 1.0)], "avx512") == []


@pytest.mark.parametrize("isa", ["avx512", None])
def test_wrong_bytes_are_never_timed(monkeypatch, isa):
    monkeypatch.setattr(
        quantize.fk, "nf4_dequantize", lambda weight, dtype, out=None: weight.absmax
    )
    rows = quantize.run((64, 128), 1, 0)
    decode = [r for r in rows if r["what"] == "decode"]
    assert {r["status"] for r in decode} == {"gate failed"}
    assert all(r["median_ms"] is None for r in decode)
    assert len(quantize.too_slow(rows, isa)) >= len(decode)
