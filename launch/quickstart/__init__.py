"""Run the whole product at toy size on two CPU cores: `make quickstart`, or `python -m launch.quickstart`."""
