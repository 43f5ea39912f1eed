"""Commands of the package: `python -m launch.train`, or under torchrun."""
