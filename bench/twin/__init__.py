"""The GPU that is not here: what a training step would do on one, found out without one."""
