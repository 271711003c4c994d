"""One module per verb: its options (`Config`) and what it does (`main`). torch is imported only once `main` runs."""
