"""The gRPC services: messages to the domain and back, with every call's checks, errors and numbers in one place."""
