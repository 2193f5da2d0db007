"""The service: hosts DBOS workflows as durable agent runs and serves them over gRPC."""
