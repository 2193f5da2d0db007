"""SQL: everything Perdure reads and writes itself, synchronous SQLAlchemy Core on the engine that DBOS uses too."""
