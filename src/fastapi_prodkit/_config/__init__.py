"""Variable names, middleware keywords and production rules: what the settings use beside the sections."""
