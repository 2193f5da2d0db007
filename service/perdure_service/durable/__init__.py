"""DBOS: the only folder that touches its internals. What a caller can ask of runs is `service.RunService`."""
