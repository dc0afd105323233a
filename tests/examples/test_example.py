"""The shipped photographs train by the shipped configuration, as with `make photos`."""

import json
import re

import pytest
from small import logged

from fluxfast.config.schema import load_config
from fluxfast.train import train


@pytest.mark.slow
def test_photographs_train_in_several_buckets(nano_model, tmp_path):
    settings = [f"model.path={nano_model}", f"output_dir={tmp_path}", "train.steps=6"]
    config = load_config("examples/nano/train.yaml", [*settings, "log_every=2"])
    with logged() as lines:
        path = train(config)
    (line,) = [line for line in lines if "buckets" in line]
    assert "11 of 11 pictures" in line and int(re.search(r"in (\d+) buckets", line)[1]) >= 5
    rows = [json.loads(row) for row in (config.run_dir / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["loss"] > 0 and row["skipped_steps"] == 0 for row in rows)
    assert path.stat().st_size > 100_000
