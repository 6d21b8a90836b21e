"""The parts of an app beside the layers: its objects, lifespans and telemetry."""
