"""What settings are made from and checked with, beside the sections."""
