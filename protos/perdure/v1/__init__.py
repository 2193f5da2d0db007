"""Version 1 of the public API (package `perdure.v1`)."""
