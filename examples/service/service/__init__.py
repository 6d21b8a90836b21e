"""Airports of the world and what visitors report about them: a service on fastapi-prodkit."""
