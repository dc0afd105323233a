"""Two roots: the trainer at the top, the kernels as a package of their own below kernels/."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fluxfast", "fluxfast.*"]), *find_packages("kernels")],
    package_dir={"": ".", "fluxfast_kernels": "kernels/fluxfast_kernels"},
)
