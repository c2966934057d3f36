"""What a completion is worth: refusal, truth, task utility, and the rules that turn numbers into verdicts."""
