"""What every command shares: configuration files, run folders, drawing. Knows nothing of models or of methods."""

from records.config_files import ConfigError, read_file, read_sets
from records.drawing import Box, Dot, Drawing, Line, MissingPillow, Text

__all__ = ["Box", "ConfigError", "Dot", "Drawing", "Line", "MissingPillow", "Text", "read_file", "read_sets"]
