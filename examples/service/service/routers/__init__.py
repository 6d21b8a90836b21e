"""The HTTP side: each router turns requests into calls of services, and results into schemas."""
