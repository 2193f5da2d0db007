"""The public API of perdure: generated messages and service stubs."""
