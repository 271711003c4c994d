"""Reading and writing files: the run folder, the rule for outputs, bounded reads. Imports no torch."""
