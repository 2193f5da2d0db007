"""The door: servicers, conversion, validation and the one interceptor that maps errors. Only here is gRPC spoken."""
