"""The parts of the settings beside the sections: variable names, middleware keywords and production rules."""
