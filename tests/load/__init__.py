"""Programs that measure; not part of `make test`."""
