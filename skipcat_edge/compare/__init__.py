"""One model in many files: built, measured side by side, and reported on one page."""
