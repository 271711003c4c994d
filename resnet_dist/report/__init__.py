"""What people look at: plots and tables of a run or an evaluation."""
