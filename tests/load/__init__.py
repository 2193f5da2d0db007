"""Benchmarks: how long what the product promises takes, in numbers. `make bench` runs them."""
