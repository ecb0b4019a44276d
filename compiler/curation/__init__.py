"""The search for registers: sensitivity, candidates, trials and the decision."""
