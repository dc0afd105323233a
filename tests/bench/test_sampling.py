"""What the sampler's settings do to the nano model's pictures: each is seen."""

import pytest

from bench import sampling


@pytest.mark.slow
def test_every_setting_does_what_it_is_for(capsys):
    assert sampling.main(["--scenes", "20"]) == 0
    out = capsys.readouterr().err
    assert "negative prompt, cfg 3" in out and "threshold steps" in out
