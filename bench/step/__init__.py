"""A whole training step, beside diffusers + peft + bitsandbytes: `python -m bench.step`."""
