"""Pure values and rules: runs, events, approvals, agents, leases. No I/O, no clock, no DBOS, no gRPC."""
