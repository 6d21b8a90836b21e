"""HTTP: each router calls services, and returns their results as schemas."""
