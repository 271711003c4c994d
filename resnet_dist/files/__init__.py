"""What is read and written: the run folder, the rule for outputs, bounded reads. No torch here."""
